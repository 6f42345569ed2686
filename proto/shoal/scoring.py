"""How a model's output becomes a score and a label; device and gateway must agree on it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ModelError
from shoal.v1 import release_pb2 as pb


@dataclass(frozen=True, slots=True)
class Scores:
    """One entry for each row. `labels` is None for models that do not classify."""

    scores: NDArray[np.float32]
    labels: NDArray[np.int64] | None


def all_finite(values: NDArray[np.float32]) -> bool:
    """Whether no value is infinite or not a number: by the sum of squares in half the time, but for huge values."""
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


class Scaler:
    """Scales readings with the statistics that a release carries.

    Args:
        schema: mean and std of the training set, one for each channel or one for all.

    Raises:
        ModelError: a deviation is not positive, or there are not as many as means.
    """

    def __init__(self, schema: pb.InputSchema) -> None:
        self._mean = np.asarray(schema.mean, dtype=np.float32)
        self._std = np.asarray(schema.std, dtype=np.float32)
        if self._std.size != self._mean.size:
            raise ModelError(f"the release has {self._mean.size} means and {self._std.size} deviations")
        if not (self._std > 0).all():
            raise ModelError(f"a deviation is not positive: {self._std.min()}")
        self._is_identity = bool((self._mean == 0).all() and (self._std == 1).all())

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale readings (n, *shape) in the sensor's own units.

        Raises:
            ModelError: the channel counts differ.
        """
        if self._mean.size not in (1, values.shape[-1]):
            raise ModelError(f"{values.shape[-1]} channels, but the release has {self._mean.size} means")
        if self._is_identity:
            return values
        with np.errstate(over="ignore", invalid="ignore"):  # absurdly far from the mean is infinitely far
            return np.asarray((values - self._mean) / self._std, dtype=np.float32)


def scale(values: NDArray[np.float32], schema: pb.InputSchema) -> NDArray[np.float32]:
    """Scale readings once; see `Scaler`."""
    return Scaler(schema)(values)


def score_rows(kind: pb.ScoreKind, scaled: NDArray[np.float32], outputs: NDArray[np.float32]) -> Scores:
    """Score a batch.

    Args:
        kind: from the release.
        scaled: (n, *shape), what went into the model.
        outputs: (n, ...), what came out, in float units.

    Raises:
        ModelError: the release asks for a score that this version does not know, or an output is not finite or
            of another size than its score needs.
    """
    if not all_finite(outputs):
        raise ModelError("the model answered with a value that is not finite")
    if kind == pb.SCORE_KIND_RECONSTRUCTION:
        if outputs.size != scaled.size:
            raise ModelError(f"{outputs.shape} came out, expected {scaled.shape}")
        with np.errstate(over="ignore"):  # absurdly far off scores infinite
            errors = np.square(outputs.reshape(scaled.shape) - scaled).reshape(len(scaled), -1)
            return Scores(errors.sum(axis=1, dtype=np.float32) / np.float32(errors.shape[1]), None)
    if kind == pb.SCORE_KIND_UNCERTAINTY:
        if outputs.size == 0 or outputs.size % len(scaled):
            raise ModelError(f"{outputs.shape} came out, expected the same number for each of {len(scaled)} rows")
        logits = outputs.reshape(len(scaled), -1)
        with np.errstate(over="ignore"):  # exp makes 0 of it
            # The largest of these is 1, and so the certainty is 1 over their sum.
            total = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        return Scores((1.0 - 1.0 / total).astype(np.float32, copy=False), logits.argmax(axis=1))
    raise ModelError(f"unknown score kind {kind}")
