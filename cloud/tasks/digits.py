"""Classification of 8x8 images: a CNN of 4 thousand weights for the device, one of 70 thousand for the gateway."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cloud.models.layers import LinearOfMaps
from cloud.tasks.base import (
    GateLimits,
    LabelledSamples,
    ShareRule,
    TrainingData,
    TrainingPlan,
    check_extra,
    join,
    split_extra,
)
from cloud.tasks.datasets import DIGITS_HOLDOUT, digits_images, digits_initial
from shoal.errors import ModelError
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb

_CLASSES = 10
# Field samples outnumber the initial ones this many times, because they are what the fleet sees now.
_FIELD_WEIGHT = 4
_MAX_REPEATS = 16
_LABEL_SMOOTHING = 0.05

_MAX_ROTATION_RAD = math.radians(12)
_MAX_SHIFT_PIXELS = 0.8
_MAX_ZOOM = 0.08
_HALF_WIDTH_PIXELS = 4


class DigitsTask:
    model = "digits"
    shape: tuple[int, ...] = (8, 8, 1)
    classes = _CLASSES
    score: pb.ScoreKind = pb.SCORE_KIND_UNCERTAINTY
    metric_name = "accuracy"
    threshold_rule = ShareRule(device=0.15, gateway=0.10)
    plans: Mapping[pb.Tier, TrainingPlan] = MappingProxyType(
        {
            pb.TIER_DEVICE: TrainingPlan(steps=1200, batch_rows=64, learning_rate=4e-3),
            pb.TIER_GATEWAY: TrainingPlan(steps=500, batch_rows=64, learning_rate=4e-3),
        }
    )
    # One held-out image in 140 is 0.7 %; the drops allow two.
    limits: Mapping[pb.Tier, GateLimits] = MappingProxyType(
        {
            pb.TIER_DEVICE: GateLimits(min_metric=0.90, max_drop_from_float=0.015, max_drop_from_parent=0.015),
            pb.TIER_GATEWAY: GateLimits(
                min_metric=0.92, max_drop_from_float=0.015, max_drop_from_parent=0.015, latency_rows=8
            ),
        }
    )

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        initial = digits_images().take(digits_initial())
        train, holdout = initial.take(slice(None, -DIGITS_HOLDOUT)), initial.take(slice(-DIGITS_HOLDOUT, None))
        mean, std = train.x.mean(), train.x.std()
        if extra is not None and len(extra):
            check_extra(extra, self.shape, self.classes)
            seen, held = split_extra(extra)
            train = join(train, _balanced(seen, _FIELD_WEIGHT * len(train)), repeats=1)
            holdout = join(holdout, held)
        return TrainingData(train, holdout, np.array([mean]), np.array([std]))

    def build_model(self, tier: pb.Tier) -> nn.Module:
        return _Cnn((16, 32), 0) if tier == pb.TIER_DEVICE else _Cnn((32, 64, 64), 64)

    def augment(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Turn, shift and zoom each image a little: (n, 8, 8, 1) to the same."""
        count = len(rows)
        turn, zoom, right, down = (torch.rand((4, count), generator=generator) * 2 - 1).to(rows.device)
        angle, size = turn * _MAX_ROTATION_RAD, 1 + zoom * _MAX_ZOOM
        cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
        step = _MAX_SHIFT_PIXELS / _HALF_WIDTH_PIXELS
        theta = torch.stack([cos, -sin, right * step, sin, cos, down * step], dim=1).reshape(count, 2, 3)
        images = rows.permute(0, 3, 1, 2)
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return moved.permute(0, 2, 3, 1)

    def loss(self, outputs: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy; smoothed, or every certainty would be 1 and the threshold 0."""
        del rows
        return functional.cross_entropy(outputs, labels, label_smoothing=_LABEL_SMOOTHING)

    def metric(self, scores: Scores, labels: NDArray[np.int64]) -> float:
        """Share of labels that are right.

        Raises:
            ModelError: the scores carry no labels.
        """
        if scores.labels is None:
            raise ModelError("accuracy needs labels, the scores carry none")
        return float((scores.labels == labels).mean())


def _balanced(samples: LabelledSamples, rows: int) -> LabelledSamples:
    """Repeat samples to about `rows`, every class as often.

    Devices send up what they doubt, so that what they are wrong about with confidence comes in small numbers.
    """
    counts = np.bincount(samples.y, minlength=_CLASSES)
    repeats = np.ceil(rows / _CLASSES / np.maximum(counts, 1)).astype(np.int64)
    return samples.take(np.repeat(np.arange(len(samples)), np.minimum(repeats, _MAX_REPEATS)[samples.y]))


class _Cnn(nn.Module):
    """3x3 convolutions, each but the first halving the image, then one or two linear layers.

    Never transposes between layers but at both ends, where the converters can fold it.
    """

    def __init__(self, widths: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        inputs = (1, *widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs[index], width, 3, stride=1 if index == 0 else 2, padding=1)
            for index, width in enumerate(widths)
        )
        pixels = (8 // 2 ** (len(widths) - 1)) ** 2
        self.hidden = LinearOfMaps(widths[-1], pixels, hidden) if hidden else None
        self.head = nn.Linear(hidden, _CLASSES) if hidden else LinearOfMaps(widths[-1], pixels, _CLASSES)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map (n, 8, 8, 1) to logits (n, 10)."""
        maps = rows.permute(0, 3, 1, 2)
        for convolution in self.convolutions:
            maps = functional.relu(convolution(maps))
        features = maps if self.hidden is None else functional.relu(self.hidden(maps))
        logits: torch.Tensor = self.head(features)
        return logits
