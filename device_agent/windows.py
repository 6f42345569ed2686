"""Readings in a row, made into the windows that a model of a time series takes."""

from collections import deque

import numpy as np
from numpy.typing import NDArray


class Windows:
    """Sliding windows: each starts `stride` readings after the one before. Never spans a `reset`.

    >>> windows = Windows(3, 2)
    >>> [windows.add(np.float32([value])) is not None for value in range(6)]
    [False, False, True, False, True, False]
    """

    def __init__(self, window: int, stride: int) -> None:
        if window < 1 or stride < 1:
            raise ValueError(f"window {window} and stride {stride} must be positive")
        self._stride = stride
        self._window = window
        self._rows: deque[NDArray[np.float32]] = deque(maxlen=window)
        self._missing = window

    def add(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Take a reading; return (window, *its shape), the oldest first, where it completes a window.

        All readings between two resets have one shape.
        """
        self._rows.append(values.copy())  # the source may use its buffer again
        self._missing -= 1
        if self._missing:
            return None
        self._missing = self._stride
        return np.stack(self._rows)

    def reset(self) -> None:
        """Begin anew: what comes next does not follow what came before."""
        self._missing = self._window  # by then, none of the old ones is left
