"""Pictures brought to the size and channels that a model takes; numpy alone, as small devices have it."""

import numpy as np
from numpy.typing import NDArray

# Recommendation ITU-R BT.601, section 2.5.1: how bright an eye finds red, green and blue.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_COLOUR = 3


def resize(picture: NDArray[np.float32], height: int, width: int, *, nearest: bool = False) -> NDArray[np.float32]:
    """Resize (height, width, channels).

    Each pixel becomes the mean of the area that it covers, in parts where it covers parts, or with `nearest` the
    pixel in the middle of that area. Grown by whole factors, both repeat pixels.
    """
    if picture.shape[:2] == (height, width):
        return picture
    if nearest:
        rows, columns = _middles(picture.shape[0], height), _middles(picture.shape[1], width)
        return picture[rows[:, None], columns]
    # One sum along each axis; the shorter result first is not worth a branch.
    tall = np.tensordot(_covers(picture.shape[0], height), picture, axes=(1, 0))
    return np.asarray(np.tensordot(_covers(picture.shape[1], width), tall, axes=(1, 1)).swapaxes(0, 1))


def with_channels(picture: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """Turn (height, width, channels) grey, or repeat its grey as red, green and blue.

    Raises:
        ValueError: there is no way from these channels to those.
    """
    found = picture.shape[2]
    if found == channels:
        return picture
    if found == _COLOUR and channels == 1:
        return np.asarray(picture @ _LUMA[:, None])
    if found == 1 and channels == _COLOUR:
        return np.repeat(picture, _COLOUR, axis=2)
    raise ValueError(f"{found} channels, expected {channels}")


def _middles(old: int, new: int) -> NDArray[np.int64]:
    return (2 * np.arange(new) + 1) * old // (2 * new)


def _covers(old: int, new: int) -> NDArray[np.float32]:
    """(new, old): the share that each old pixel has in each new one."""
    edges = np.arange(new + 1) * (old / new)
    pixels = np.arange(old)
    ends = np.minimum(edges[1:, None], pixels + 1)
    starts = np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.maximum(ends - starts, 0.0) * (new / old), dtype=np.float32)
