"""What a release says about its input must make sense: to whoever signs it, and again to the device that obeys it."""

import math

from shoal.codec import MAX_ROW_BYTES
from shoal.errors import ModelError
from shoal.v1.release_pb2 import InputSchema, Resize

_FLOAT_BYTES = 4
_FLAT, _DEEP = 2, 3
# Of a picture: grey, or red, green and blue.
PICTURE_CHANNELS = (1, 3)


def check_input_schema(schema: InputSchema) -> None:
    """Refuse what no device could make inputs by.

    Raises:
        ModelError: it contradicts itself, or its input could never be asked about.
    """
    shape = tuple(schema.shape)
    if schema.resize and schema.window > 1:
        raise ModelError("the input is both a window and a picture")
    if schema.stride > 1 and schema.resize:
        raise ModelError("the input is a picture, and pictures have no stride")
    if schema.resize:
        _check_picture(shape, schema.resize)
    if schema.window > 1:
        _check_window(math.prod(shape), schema.window)


def _check_picture(shape: tuple[int, ...], how: int) -> None:
    if how not in (Resize.RESIZE_NEAREST, Resize.RESIZE_AREA):
        raise ModelError(f"unknown way {how} to resize")
    if len(shape) not in (_FLAT, _DEEP) or (*shape, 1)[2] not in PICTURE_CHANNELS or 0 in shape:
        raise ModelError(f"no picture can be resized to {list(shape)}")


def _check_window(values: int, window: int) -> None:
    if not values or values % window:
        raise ModelError(f"{values} values are not a window of {window} readings")
    if values * _FLOAT_BYTES > MAX_ROW_BYTES:
        raise ModelError(f"a window of {values} values does not fit a message")
