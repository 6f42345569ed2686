"""Classification of pictures: a small CNN, ResNet-8 or ResNet-18 for each tier."""

import math
from collections.abc import Callable, Mapping
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
from torch.nn import functional

from cloud.models.cnn import Cnn
from cloud.models.resnet import resnet8, resnet18
from cloud.tasks import parse_parameters
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
from cloud.tasks.datasets import DIGITS_HOLDOUT, digits_images, digits_initial, load_samples
from cloud.tasks.training_options import TrainingOptions
from shoal.errors import ConfigError, ModelError
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb

# Field samples outnumber the initial ones this many times, because they are what the fleet sees now.
_FIELD_WEIGHT = 4
_MAX_REPEATS = 16
_LABEL_SMOOTHING = 0.05

_MAX_ROTATION_RAD = math.radians(12)
# Of half the picture's width or height.
_MAX_SHIFT = 0.2
_MAX_ZOOM = 0.08
_PICTURE_DIMENSIONS = 3

_Share = Annotated[float, Meta(gt=0, lt=1)]


@unique
class Network(StrEnum):
    """What a tier may run; at 8x8 pixels `small_cnn` has 10 thousand weights, `cnn` 70 thousand."""

    SMALL_CNN = "small_cnn"
    CNN = "cnn"
    RESNET8 = "resnet8"
    RESNET18 = "resnet18"


class VisionTier(TrainingOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tier's network and training.

    Attributes:
        asks: share of held-out pictures that may be asked upwards.
    """

    network: Network
    asks: _Share


class VisionParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pipeline file says under `parameters`.

    Attributes:
        data: `digits`, or an NPZ file with `x` (n, height, width, channel) and `y` (n,) classes.
        augment: turn, shift and zoom training pictures a little.
    """

    data: str = "digits"
    device: VisionTier = VisionTier(network=Network.SMALL_CNN, asks=0.15)
    gateway: VisionTier = VisionTier(network=Network.CNN, asks=0.10)
    augment: bool = True


_PLANS: Mapping[pb.Tier, TrainingPlan] = MappingProxyType(
    {
        pb.TIER_DEVICE: TrainingPlan(steps=1200, batch_rows=64, learning_rate=4e-3),
        pb.TIER_GATEWAY: TrainingPlan(steps=500, batch_rows=64, learning_rate=4e-3),
    }
)
_NETWORKS: Mapping[Network, Callable[[tuple[int, ...], int], nn.Module]] = MappingProxyType(
    {
        Network.SMALL_CNN: lambda shape, classes: Cnn(shape, classes, (16, 32)),
        Network.CNN: lambda shape, classes: Cnn(shape, classes, (32, 64, 64), hidden=64),
        Network.RESNET8: lambda shape, classes: resnet8(shape[-1], classes),
        Network.RESNET18: lambda shape, classes: resnet18(shape[-1], classes),
    }
)


class VisionTask:
    """See the module.

    Raises:
        ConfigError: a parameter is wrong, or the data cannot be read.
    """

    score: pb.ScoreKind = pb.SCORE_KIND_UNCERTAINTY
    metric_name = "accuracy"
    # One held-out digit in 140 is 0.7 %; the drops allow two.
    limits: Mapping[pb.Tier, GateLimits] = MappingProxyType(
        {
            pb.TIER_DEVICE: GateLimits(min_metric=0.90, max_drop_from_float=0.015, max_drop_from_parent=0.015),
            pb.TIER_GATEWAY: GateLimits(
                min_metric=0.92, max_drop_from_float=0.015, max_drop_from_parent=0.015, latency_rows=8
            ),
        }
    )

    def __init__(self, model: str, parameters: Mapping[str, object], base: Path) -> None:
        options = parse_parameters(parameters, VisionParameters)
        self.model = model
        self._augments = options.augment
        self._tiers = {pb.TIER_DEVICE: options.device, pb.TIER_GATEWAY: options.gateway}
        self._train, self._holdout = _load(options.data, base)
        self.shape: tuple[int, ...] = self._train.x.shape[1:]
        if len(self.shape) != _PICTURE_DIMENSIONS:
            raise ConfigError(f"{options.data}: pictures of shape {self.shape}, expected height, width, channel")
        self.classes = int(max(self._train.y.max(), self._holdout.y.max())) + 1
        self.threshold_rule = ShareRule(device=options.device.asks, gateway=options.gateway.asks)

    @property
    def plans(self) -> Mapping[pb.Tier, TrainingPlan]:
        return {tier: options.over(_PLANS[tier]) for tier, options in self._tiers.items()}

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        train, holdout = self._train, self._holdout
        mean, std = train.x.mean(), train.x.std()
        if extra is not None and len(extra):
            check_extra(extra, self.shape, self.classes)
            seen, held = split_extra(extra)
            train = join(train, _balanced(seen, _FIELD_WEIGHT * len(train), self.classes), repeats=1)
            holdout = join(holdout, held)
        return TrainingData(train, holdout, np.array([mean]), np.array([std]))

    def build_model(self, tier: pb.Tier) -> nn.Module:
        return _NETWORKS[self._tiers[tier].network](self.shape, self.classes)

    def augment(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Turn, shift and zoom each picture a little: (n, height, width, channel) to the same."""
        return _moved(rows, generator) if self._augments else rows

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


def _load(data: str, base: Path) -> tuple[LabelledSamples, LabelledSamples]:
    """Return training and held-out pictures."""
    if data != "digits":
        return split_extra(load_samples(base / data))
    initial = digits_images().take(digits_initial())
    return initial.take(slice(None, -DIGITS_HOLDOUT)), initial.take(slice(-DIGITS_HOLDOUT, None))


def _moved(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count, height, width, _ = rows.shape
    turn, zoom, right, down = (torch.rand((4, count), generator=generator) * 2 - 1).to(rows.device)
    angle, size = turn * _MAX_ROTATION_RAD, 1 + zoom * _MAX_ZOOM
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    # Coordinates run from -1 to 1 in both directions, whatever the picture's sides are.
    wide, high = width / height, height / width
    theta = torch.stack([cos, -sin * high, right * _MAX_SHIFT, sin * wide, cos, down * _MAX_SHIFT], dim=1)
    pictures = rows.permute(0, 3, 1, 2)
    grid = functional.affine_grid(theta.reshape(count, 2, 3), list(pictures.shape), align_corners=False)
    moved = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return moved.permute(0, 2, 3, 1)


def _balanced(samples: LabelledSamples, rows: int, classes: int) -> LabelledSamples:
    """Repeat samples to about `rows`, every class as often.

    Devices send up what they doubt, so that what they are wrong about with confidence comes in small numbers.
    """
    counts = np.bincount(samples.y, minlength=classes)
    repeats = np.ceil(rows / classes / np.maximum(counts, 1)).astype(np.int64)
    return samples.take(np.repeat(np.arange(len(samples)), np.minimum(repeats, _MAX_REPEATS)[samples.y]))
