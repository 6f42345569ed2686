"""What a release says about its input, applied to readings: windows of a series, pictures of its size."""

import math

import numpy as np
from numpy.typing import NDArray

from device_agent.pictures import resize, with_channels
from device_agent.windows import Windows
from shoal.codec import MAX_ROW_BYTES
from shoal.errors import ModelError
from shoal.v1.release_pb2 import InputSchema, Resize

_FLOAT_BYTES = 4
_FLAT, _DEEP = 2, 3
_CHANNELS = (1, 3)
# Of a picture that is to be resized: beyond it, resizing holds up everything else.
MAX_PIXELS = 1 << 22


class InputMaker:
    """Makes a model's inputs of readings. What does not fit passes as it is: the gateway names what is wrong with it.

    Raises:
        ModelError: the schema contradicts itself, or its input could never be asked about.
    """

    def __init__(self, schema: InputSchema) -> None:
        self._shape = tuple(schema.shape)
        self._resize = schema.resize
        self._values = math.prod(self._shape)
        window = max(1, schema.window)
        if schema.resize and window > 1:
            raise ModelError("the input is both a window and a picture")
        if schema.resize:
            _check_picture(self._shape, schema.resize)
        if window > 1:
            _check_window(self._values, window)
        self._reading_values = self._values // window
        self._windows = Windows(window, schema.stride or window) if window > 1 or schema.stride > 1 else None

    def add(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Take a reading; return the input that it completes, or None where more readings are needed."""
        if self._resize and values.ndim in (_FLAT, _DEEP) and values.size:
            return self._picture(values)
        if self._windows is None:
            return values
        if values.size != self._reading_values:
            self.reset()
            return values
        window = self._windows.add(values.ravel())
        return None if window is None else window.reshape(self._shape)

    def reset(self) -> None:
        """What comes next does not follow what came before."""
        if self._windows is not None:
            self._windows.reset()

    def _picture(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        picture = values.reshape((*values.shape[:2], -1))
        height, width, channels = (*self._shape, 1)[:3]
        if picture.shape[0] * picture.shape[1] > MAX_PIXELS or picture.shape[2] not in _CHANNELS:
            return values
        sized = resize(picture, height, width, nearest=self._resize == Resize.RESIZE_NEAREST)
        return with_channels(sized, channels).reshape(self._shape)


def _check_picture(shape: tuple[int, ...], how: int) -> None:
    if how not in (Resize.RESIZE_NEAREST, Resize.RESIZE_AREA):
        raise ModelError(f"unknown way {how} to resize")
    if len(shape) not in (_FLAT, _DEEP) or (*shape, 1)[2] not in _CHANNELS or 0 in shape:
        raise ModelError(f"no picture can be resized to {list(shape)}")


def _check_window(values: int, window: int) -> None:
    if not values or values % window:
        raise ModelError(f"{values} values are not a window of {window} readings")
    if values * _FLOAT_BYTES > MAX_ROW_BYTES:
        raise ModelError(f"a window of {values} values does not fit a message")
