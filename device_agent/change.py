"""Differential upload, the first half: what has not changed is not worth a model call."""

import numpy as np
from numpy.typing import NDArray


class ChangeDetector:
    """A dead band: a reading is unchanged while every value stays within `threshold` of the baseline.

    The baseline is the last reading that counted as changed. With `adapt` above 0 it also follows unchanged readings
    by that share, so that a slow drift of the sensor is not reported for ever; a fixed baseline (0) cannot be
    crept away from unseen.

    >>> detector = ChangeDetector(threshold=0.5)
    >>> [detector.update(np.float32([value])) for value in (1.0, 1.4, 2.0)]
    [True, False, True]
    """

    def __init__(self, threshold: float, adapt: float = 0.0) -> None:
        if not threshold >= 0 or not 0 <= adapt <= 1:
            raise ValueError(f"threshold {threshold} must not be negative, adapt {adapt} must lie in 0..1")
        self._threshold = threshold
        self._adapt = adapt
        self._baseline: NDArray[np.float32] | None = None

    def update(self, values: NDArray[np.float32]) -> bool:
        """Take a reading; return whether it differs from the baseline. A new shape always does."""
        baseline = self._baseline
        if baseline is None or baseline.shape != values.shape or not self._is_near(values, baseline):
            self._baseline = values.copy()  # the source may use its buffer again
            return True
        if self._adapt:
            self._baseline = baseline + np.float32(self._adapt) * (values - baseline)
        return False

    def _is_near(self, values: NDArray[np.float32], baseline: NDArray[np.float32]) -> bool:
        # `<=` is false for NaN, so a broken sensor always counts as changed.
        with np.errstate(invalid="ignore", over="ignore"):
            return bool((np.abs(values - baseline) <= self._threshold).all())
