"""Differential upload, the first part: what has not changed is not worth a model call.

Every detector answers one question, and an application can ask it without an agent:

>>> should_upload = DeadBand(threshold=0.5).should_upload
>>> [should_upload(value) for value in (20.0, 20.4, 21.0)]
[True, False, True]

A detector says yes to its first reading, to a reading of a new shape, and to every reading that is not finite: a
broken sensor is never silent. A threshold is one number, or one for each channel, that is for each place of the
reading's last axis; thresholds that do not fit a reading's channels say yes to it.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray

_Limit = Annotated[float, Meta(ge=0)]
Threshold = _Limit | Annotated[tuple[_Limit, ...], Meta(min_length=1)]

# Up to here a loop over Python's numbers costs less than numpy's fixed price for each call.
_FEW = 32


class ChangeDetector(Protocol):
    """Compares each reading with what it remembers of those before. Never reads a clock."""

    def should_upload(self, data: ArrayLike, now: float | None = None) -> bool:
        """Take a reading; return whether it differs enough to look at.

        Args:
            data: a number or an array of any shape; the detector keeps no reference to it.
            now: seconds, monotonic; only a rate per second needs it.
        """


class DeadBand:
    """A reading is unchanged while every value stays within `threshold` of the baseline.

    The baseline is the last reading that counted as changed. With `adapt` above 0 it also follows unchanged readings
    by that share, so that a slow drift of the sensor is not reported for ever; a fixed baseline (0) cannot be
    crept away from unseen.
    """

    def __init__(self, threshold: float | Sequence[float] = 0.0, adapt: float = 0.0) -> None:
        if not 0 <= adapt <= 1:
            raise ValueError(f"adapt {adapt} must lie in 0..1")
        self._thresholds = _Thresholds(threshold)
        self._adapt = adapt
        self._baseline: NDArray[np.float64] | None = None

    def should_upload(self, data: ArrayLike, now: float | None = None) -> bool:  # noqa: ARG002 - the protocol's
        values = np.array(data, dtype=np.float64)
        baseline = self._baseline
        if baseline is None or baseline.shape != values.shape or not self._is_near(values, baseline):
            self._baseline = values
            return True
        if self._adapt:
            self._baseline = baseline + self._adapt * (values - baseline)
        return False

    def _is_near(self, values: NDArray[np.float64], baseline: NDArray[np.float64]) -> bool:
        limits = self._thresholds.each(values.shape)
        if values.size > _FEW:
            return _is_within(values - baseline, limits)
        pairs = zip(values.ravel().tolist(), baseline.ravel().tolist(), limits.ravel().tolist(), strict=True)
        # `<=` is false for NaN, and infinity less infinity is NaN.
        for value, base, limit in pairs:  # noqa: SIM110 - twice as fast as a generator
            if not abs(value - base) <= limit:
                return False
        return True


class Ewma:
    """A reading is unchanged while every value stays within `threshold` deviations of its channel's own mean.

    Mean and deviation are exponentially weighted, `adapt` is the weight of the newest reading. They follow every
    finite reading, so that a step of the sensor is reported until it has become usual: about 1 / `adapt` readings.
    """

    def __init__(self, threshold: float | Sequence[float] = 3.0, adapt: float = 0.05) -> None:
        if not 0 < adapt <= 1:
            raise ValueError(f"adapt {adapt} must be above 0 and at most 1")
        self._thresholds = _Thresholds(threshold)
        self._adapt = adapt
        self._mean: NDArray[np.float64] | None = None
        self._variance: NDArray[np.float64] = np.zeros(())
        self._weight = 0.0

    def should_upload(self, data: ArrayLike, now: float | None = None) -> bool:  # noqa: ARG002 - the protocol's
        values = np.array(data, dtype=np.float64)
        if not np.isfinite(values).all():
            return True
        mean = self._mean
        if mean is None or mean.shape != values.shape:
            self._mean, self._variance, self._weight = values, np.zeros(values.shape), 0.0
            return True
        offset = values - mean
        # The variance began at 0: without its weight, the first deviations would look too small.
        deviation = np.sqrt(self._variance / self._weight) if self._weight else self._variance
        limits = self._thresholds.each(values.shape)
        is_changed = not _is_within(offset, limits * deviation)
        keep = 1.0 - self._adapt
        self._mean = mean + self._adapt * offset
        self._variance = keep * (self._variance + self._adapt * offset * offset)
        self._weight = keep * (self._weight + self._adapt)
        return is_changed


class Rate:
    """A reading is unchanged while no value moves faster than `threshold`, per second or per reading.

    It is compared with the reading before, so a drift that is slow enough is never reported.
    """

    def __init__(self, threshold: float | Sequence[float], *, per_second: bool = True) -> None:
        self._thresholds = _Thresholds(threshold)
        self._per_second = per_second
        self._before: NDArray[np.float64] | None = None
        self._before_at = 0.0

    def should_upload(self, data: ArrayLike, now: float | None = None) -> bool:
        """Take a reading; see `ChangeDetector`.

        Raises:
            ValueError: a rate per second, and no `now`.
        """
        if now is None and self._per_second:
            raise ValueError("a rate per second needs the time of each reading")
        values = np.array(data, dtype=np.float64)
        at = now or 0.0
        elapsed = at - self._before_at if self._per_second else 1.0
        before, self._before, self._before_at = self._before, values, at
        if before is None or before.shape != values.shape:
            return True
        with np.errstate(invalid="ignore"):  # infinity less infinity
            return not _is_within(values - before, self._thresholds.each(values.shape) * elapsed)


class DeadBandSettings(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="dead_band", kw_only=True
):
    """`kind = "dead_band"`, in the sensor's own units."""

    threshold: Threshold = 0.0
    adapt: Annotated[float, Meta(ge=0, le=1)] = 0.0


class EwmaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="ewma", kw_only=True):
    """`kind = "ewma"`, in deviations."""

    threshold: Threshold = 3.0
    adapt: Annotated[float, Meta(gt=0, le=1)] = 0.05


class RateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="rate", kw_only=True):
    """`kind = "rate"`, in the sensor's own units per second or per reading."""

    threshold: Threshold
    per: Literal["second", "reading"] = "second"


ChangeSettings = DeadBandSettings | EwmaSettings | RateSettings


def make_change(settings: ChangeSettings) -> ChangeDetector:
    """Make the detector that a `[change]` table describes."""
    match settings:
        case DeadBandSettings():
            return DeadBand(settings.threshold, settings.adapt)
        case EwmaSettings():
            return Ewma(settings.threshold, settings.adapt)
        case RateSettings():
            return Rate(settings.threshold, per_second=settings.per == "second")


class _Thresholds:
    """One number or one for each channel, spread over readings of a shape."""

    def __init__(self, threshold: float | Sequence[float]) -> None:
        self._given = np.array(threshold, dtype=np.float64)
        if self._given.ndim > 1 or not self._given.size or not (self._given >= 0).all():
            raise ValueError(f"threshold {threshold} must not be negative, nor without channels")
        self._spread: NDArray[np.float64] | None = None

    def each(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return the limit of each value; NaN, which nothing is within, where the channels do not fit."""
        if self._spread is None or self._spread.shape != shape:
            fits = self._given.ndim == 0 or (shape and shape[-1] == len(self._given))
            self._spread = np.broadcast_to(self._given if fits else np.nan, shape)
        return self._spread


def _is_within(offset: NDArray[np.float64], limits: NDArray[np.float64]) -> bool:
    # `<=` is false for NaN.
    return bool((np.abs(offset) <= limits).all())
