"""What a release says about its input, applied to readings: windows of a series, pictures of its size."""

import math

import numpy as np
from numpy.typing import NDArray

from device_agent.pictures import resize, with_channels
from device_agent.windows import Windows
from shoal.input_schema import PICTURE_CHANNELS, check_input_schema
from shoal.v1.release_pb2 import InputSchema, Resize

_FLAT, _DEEP = 2, 3
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
        check_input_schema(schema)
        window = max(1, schema.window)
        self._reading_values = math.prod(self._shape) // window
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
        if picture.shape[0] * picture.shape[1] > MAX_PIXELS or picture.shape[2] not in PICTURE_CHANNELS:
            return values
        sized = resize(picture, height, width, nearest=self._resize == Resize.RESIZE_NEAREST)
        return with_channels(sized, channels).reshape(self._shape)
