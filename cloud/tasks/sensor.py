"""Anomalies of sensors: windows of 1 to 64 channels, and networks that have seen normal ones only."""

import math
from collections.abc import Mapping
from enum import StrEnum, unique
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import nn

from cloud.models.detectors import CrossPredictor, autoencoder
from cloud.tasks import parse_parameters
from cloud.tasks.base import (
    GateLimits,
    LabelledSamples,
    RecallRule,
    TrainingData,
    TrainingPlan,
    check_extra,
    join,
    split_extra,
)
from cloud.tasks.datasets import SHUTTLE_SELECT, SHUTTLE_TRAIN, load_samples, shuttle_rows
from cloud.tasks.training_options import TrainingOptions
from shoal.errors import ConfigError
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb

MAX_CHANNELS = 64
# Some channels have rare normal spikes of 100 deviations; int8 would spend its 256 steps on them.
_MAX_SPAN = 16.0
_MAX_REPEATS = 8
# The share of a user's rows, in time, that trains; what comes later judges.
_TRAIN_SHARE = 0.75
# Wide, so that a model that detects nothing (average precision near .07) fails and one unlucky seed does not.
_LIMITS = GateLimits(min_metric=0.85, max_drop_from_float=0.02, max_drop_from_parent=0.03)

_Share = Annotated[float, Meta(gt=0, le=1)]
_Count = Annotated[int, Meta(ge=1, le=4096)]


@unique
class Detector(StrEnum):
    """What a tier may run; docs/tasks.md says when which is the better."""

    AUTOENCODER = "autoencoder"
    CROSS_PREDICTOR = "cross_predictor"


class SensorTier(TrainingOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tier's detector and training.

    Attributes:
        widths: of the autoencoder's layers down to its bottleneck; or one, the cross predictor's units for each value.
        recall: share of held-out anomalies that must be found up to here: asked by the device, told by the gateway.
    """

    detector: Detector = Detector.AUTOENCODER
    widths: list[_Count] = msgspec.field(default_factory=list)
    recall: _Share


class SensorParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pipeline file says under `parameters`.

    Attributes:
        data: `shuttle`, or an NPZ file with `x` (n, channel) in order of time and `y` (n,) 1 for an anomaly; the last
            quarter judges, and must hold some.
        window: readings in a row that make one input.
        stride: readings from the start of one to the next.
    """

    data: str = "shuttle"
    window: _Count = 1
    stride: _Count = 1
    device: SensorTier = SensorTier(recall=0.985)
    gateway: SensorTier = SensorTier(recall=0.98)


_PLAN = TrainingPlan(steps=1300, batch_rows=128, learning_rate=1e-2)
_WIDTHS: Mapping[tuple[pb.Tier, Detector], tuple[int, ...]] = MappingProxyType(
    {
        (pb.TIER_DEVICE, Detector.AUTOENCODER): (16, 3),
        (pb.TIER_GATEWAY, Detector.AUTOENCODER): (64, 32, 4),
        (pb.TIER_DEVICE, Detector.CROSS_PREDICTOR): (8,),
        (pb.TIER_GATEWAY, Detector.CROSS_PREDICTOR): (16,),
    }
)


class SensorTask:
    """See the module.

    Raises:
        ConfigError: a parameter is wrong, or the data cannot be read.
    """

    # 1 is an anomaly.
    classes = 2
    score: pb.ScoreKind = pb.SCORE_KIND_RECONSTRUCTION
    metric_name = "average_precision"
    limits: Mapping[pb.Tier, GateLimits] = MappingProxyType(
        {
            pb.TIER_DEVICE: _LIMITS,
            pb.TIER_GATEWAY: GateLimits(
                _LIMITS.min_metric, _LIMITS.max_drop_from_float, _LIMITS.max_drop_from_parent, latency_rows=8
            ),
        }
    )

    def __init__(self, model: str, parameters: Mapping[str, object], base: Path) -> None:
        self._options = options = parse_parameters(parameters, SensorParameters)
        self.model = model
        self._tiers = {pb.TIER_DEVICE: options.device, pb.TIER_GATEWAY: options.gateway}
        self._train, self._holdout = (
            windows_of(rows, options.window, options.stride) for rows in _load(options.data, base)
        )
        self.shape: tuple[int, ...] = self._train.x.shape[1:]
        if not 1 <= self.shape[-1] <= MAX_CHANNELS:
            raise ConfigError(f"{options.data}: {self.shape[-1]} channels, expected 1 to {MAX_CHANNELS}")
        if not self._holdout.y.any():
            raise ConfigError(f"{options.data}: no anomaly among the last {len(self._holdout)} inputs to judge by")
        self.threshold_rule = RecallRule(device=options.device.recall, cascade=options.gateway.recall)

    @property
    def plans(self) -> Mapping[pb.Tier, TrainingPlan]:
        return {tier: options.over(_PLAN) for tier, options in self._tiers.items()}

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        train, holdout = self._train.take(self._train.y == 0), self._holdout
        mean, std = _scaling(train.x)
        if extra is not None and len(extra):
            check_extra(extra, self.shape, self.classes)
            seen, held = split_extra(extra)
            normal = seen.take(seen.y == 0)
            train = join(train, normal, repeats=min(_MAX_REPEATS, len(train) // max(1, len(normal))))
            holdout = join(holdout, held)
        return TrainingData(train, holdout, mean, std, self._options.window, self._options.stride)

    def build_model(self, tier: pb.Tier) -> nn.Module:
        options = self._tiers[tier]
        widths = tuple(options.widths) or _WIDTHS[tier, options.detector]
        if options.detector is Detector.CROSS_PREDICTOR:
            return CrossPredictor(self.shape, widths[0])
        return autoencoder(self.shape, widths)

    def augment(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        del generator
        return rows

    def loss(self, outputs: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        del labels
        return nn.functional.mse_loss(outputs, rows)

    def metric(self, scores: Scores, labels: NDArray[np.int64]) -> float:
        """Average precision of the score."""
        from sklearn.metrics import average_precision_score  # noqa: PLC0415 - takes a second to import

        return float(average_precision_score(labels, scores.scores))


def windows_of(rows: LabelledSamples, window: int, stride: int) -> LabelledSamples:
    """Cut rows in order of time into windows, as devices do; one is an anomaly if its last reading is.

    Args:
        rows: x (n, channel).
        window: readings in each; 1 leaves the rows as they are.
        stride: from one start to the next.

    Returns x (m, window, channel).
    """
    if window == 1:
        return rows.take(slice(None, None, stride))
    starts = np.arange(0, len(rows) - window + 1, stride)
    cut = np.stack([rows.x[start : start + window] for start in starts]) if len(starts) else rows.x[:0, None]
    return LabelledSamples(cut, rows.y[starts + window - 1])


def _load(data: str, base: Path) -> tuple[LabelledSamples, LabelledSamples]:
    """Return rows to train on and later ones to judge by."""
    if data == "shuttle":
        rows = shuttle_rows()
        return rows.take(SHUTTLE_TRAIN), rows.take(SHUTTLE_SELECT)
    rows = load_samples(base / data)
    if rows.x.ndim != 2:  # noqa: PLR2004
        raise ConfigError(f"{data}: rows of shape {rows.x.shape[1:]}, expected one value for each channel")
    first = math.floor(_TRAIN_SHARE * len(rows))
    return rows.take(slice(None, first)), rows.take(slice(first, None))


def _scaling(normal: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and std such that no normal channel spans more than `_MAX_SPAN` deviations."""
    values = normal.reshape(-1, normal.shape[-1])
    spread = np.maximum(values.std(axis=0), np.ptp(values, axis=0) / np.float32(_MAX_SPAN))
    # A channel that never moves has no unit of its own.
    return values.mean(axis=0), np.where(spread > 0, spread, np.float32(1))
