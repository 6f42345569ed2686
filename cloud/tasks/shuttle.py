"""Anomaly detection on nine sensor channels: autoencoders that have only seen normal readings."""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

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
from cloud.tasks.datasets import SHUTTLE_SELECT, SHUTTLE_TRAIN, shuttle_rows
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb

_CHANNELS = 9
# Three channels have rare normal spikes of 100 deviations; int8 would spend its 256 steps on them.
_MAX_SPAN = 16.0
_MAX_REPEATS = 8
# Wide, so that a model that detects nothing (average precision near .07) fails and one unlucky seed does not.
_LIMITS = GateLimits(min_metric=0.85, max_drop_from_float=0.02, max_drop_from_parent=0.03)


class ShuttleTask:
    model = "shuttle"
    shape: tuple[int, ...] = (_CHANNELS,)
    # 1 is an anomaly.
    classes = 2
    score: pb.ScoreKind = pb.SCORE_KIND_RECONSTRUCTION
    metric_name = "average_precision"
    threshold_rule = RecallRule(device=0.985, cascade=0.98)
    plans: Mapping[pb.Tier, TrainingPlan] = MappingProxyType(
        {
            pb.TIER_DEVICE: TrainingPlan(steps=1300, batch_rows=128, learning_rate=1e-2),
            pb.TIER_GATEWAY: TrainingPlan(steps=1300, batch_rows=128, learning_rate=1e-2),
        }
    )
    limits: Mapping[pb.Tier, GateLimits] = MappingProxyType(
        {
            pb.TIER_DEVICE: _LIMITS,
            pb.TIER_GATEWAY: GateLimits(
                _LIMITS.min_metric, _LIMITS.max_drop_from_float, _LIMITS.max_drop_from_parent, latency_rows=8
            ),
        }
    )

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        rows = shuttle_rows()
        train, holdout = rows.take(SHUTTLE_TRAIN), rows.take(SHUTTLE_SELECT)
        mean, std = _scaling(train.x[train.y == 0])
        train = train.take(train.y == 0)
        if extra is not None and len(extra):
            check_extra(extra, self.shape, self.classes)
            seen, held = split_extra(extra)
            normal = seen.take(seen.y == 0)
            train = join(train, normal, repeats=min(_MAX_REPEATS, len(train) // max(1, len(normal))))
            holdout = join(holdout, held)
        return TrainingData(train, holdout, mean, std)

    def build_model(self, tier: pb.Tier) -> nn.Module:
        widths = (_CHANNELS, 16, 3) if tier == pb.TIER_DEVICE else (_CHANNELS, 64, 32, 4)
        return _autoencoder(widths)

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


def _scaling(normal: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and std such that no normal channel spans more than `_MAX_SPAN` deviations."""
    spread = np.ptp(normal, axis=0) / np.float32(_MAX_SPAN)
    return normal.mean(axis=0), np.maximum(normal.std(axis=0), spread)


def _autoencoder(widths: tuple[int, ...]) -> nn.Sequential:
    """Mirror `widths` around its last; no activation at the bottleneck or the output."""
    sizes = [*widths, *widths[-2::-1]]
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(wide, narrow))
        if index not in (len(widths) - 2, len(sizes) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
