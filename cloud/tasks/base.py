"""What the tool chain must know about one kind of model; everything else in it is the same for all.

A task is a plug-in: constants, and five functions of arrays and torch modules. It holds no state and never does I/O
but reading its initial data.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ModelError
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb

if TYPE_CHECKING:
    import torch

_HOLDOUT_BYTE = 51  # of 256: one field sample in five is kept from training


@dataclass(frozen=True, slots=True)
class LabelledSamples:
    """Readings in the sensor's own units with their labels.

    Attributes:
        x: (n, *shape) float32.
        y: (n,) int64, class or 1 for an anomaly.
        taught: (n,) whether a teacher model gave the label: such a row trains, and never judges. None: no row is.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    taught: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or len(self.x) != len(self.y):
            raise ValueError(f"{self.x.shape} readings with {self.y.shape} labels, expected one label for each")

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64] | slice) -> "LabelledSamples":
        return LabelledSamples(self.x[rows], self.y[rows], None if self.taught is None else self.taught[rows])


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What one release is made from. No row is in both `train` and `holdout`.

    Attributes:
        train: what the training loop sees, repeats included.
        holdout: what chooses thresholds and what the gate scores.
        mean, std: (channel,) or (1,), the scaling that the release will carry.
        window, stride: readings in a row that make one input, and from one start to the next; 1 where each is one.
    """

    train: LabelledSamples
    holdout: LabelledSamples
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    window: int = 1
    stride: int = 1

    def schema(self) -> pb.InputSchema:
        schema = pb.InputSchema(shape=self.train.x.shape[1:], mean=self.mean.tolist(), std=self.std.tolist())
        if self.window > 1:
            schema.window, schema.stride = self.window, self.stride
        return schema


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how hard to train; steps, not epochs, so that more data does not take more time."""

    steps: int
    batch_rows: int
    learning_rate: float
    weight_decay: float = 1e-3


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What an artefact must keep to.

    Attributes:
        min_metric: below this nothing ships.
        max_drop_from_float: how much of the metric int8 may cost.
        max_drop_from_parent: how much worse than the model in the field a release may score on the same rows.
        max_slowdown: int8 latency over float latency, above 1: the room is for what timing varies by on a shared core.
        latency_rows: rows in one timed call: 1 on a device, the batch at the knee on a gateway.
        max_bytes: what the tier has room for.
    """

    min_metric: float
    max_drop_from_float: float
    max_drop_from_parent: float
    max_slowdown: float = 1.25
    latency_rows: int = 1
    max_bytes: int = 16 * 2**20


@dataclass(frozen=True, slots=True)
class RecallRule:
    """Ask upwards for at least this share of the anomalies: of all at the device, of all at the end of the cascade."""

    device: float
    cascade: float


@dataclass(frozen=True, slots=True)
class ShareRule:
    """Ask upwards for at most this share of held-out rows."""

    device: float
    gateway: float


class Task(Protocol):
    """The plug-in. Attributes by tier have `pb.TIER_DEVICE` and `pb.TIER_GATEWAY` as keys."""

    @property
    def model(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def classes(self) -> int: ...
    @property
    def score(self) -> pb.ScoreKind: ...
    @property
    def metric_name(self) -> str: ...
    @property
    def threshold_rule(self) -> RecallRule | ShareRule: ...
    @property
    def plans(self) -> Mapping[pb.Tier, TrainingPlan]: ...
    @property
    def limits(self) -> Mapping[pb.Tier, GateLimits]: ...

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        """Join the initial data with labelled samples from the field.

        Raises:
            ModelError: the extra samples do not fit this task.
        """

    def build_model(self, tier: pb.Tier) -> "torch.nn.Module":
        """Make an untrained module: scaled rows (n, *shape) in, outputs to be scored out."""

    def augment(self, rows: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
        """Vary a training batch of scaled rows; all randomness comes from `generator`, which lives on the CPU."""

    def loss(self, outputs: "torch.Tensor", rows: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Return the scalar to minimise, given scaled rows and labels."""

    def metric(self, scores: Scores, labels: NDArray[np.int64]) -> float:
        """Return how good scored rows are, 0 to 1, higher is better."""


def check_extra(extra: LabelledSamples, shape: tuple[int, ...], classes: int) -> None:
    """Refuse samples from the field that a task cannot learn from.

    Raises:
        ModelError: wrong shape, a value that is not finite, or a label outside [0, classes).
    """
    if extra.x.shape[1:] != shape:
        raise ModelError(f"labelled samples of shape {extra.x.shape[1:]}, expected {shape}")
    if not np.isfinite(extra.x).all():
        raise ModelError("a labelled sample holds a value that is not finite")
    if len(extra) and not (extra.y.min() >= 0 and extra.y.max() < classes):
        raise ModelError(f"labels from {extra.y.min()} to {extra.y.max()}, expected 0 to {classes - 1}")


def split_extra(extra: LabelledSamples) -> tuple[LabelledSamples, LabelledSamples]:
    """Part field samples into training and holdout.

    The bytes of a sample decide its side, so that it stays there in every later release and a holdout never holds what
    the parent was trained on. What a teacher labelled is on neither: it trains, unless its bytes would have it judge.
    """
    held = np.array([hashlib.sha256(row.tobytes()).digest()[0] < _HOLDOUT_BYTE for row in extra.x], dtype=np.bool_)
    if extra.taught is not None:
        return extra.take(~held), extra.take(held & ~extra.taught)
    return extra.take(~held), extra.take(held)


def join(first: LabelledSamples, second: LabelledSamples, repeats: int = 1) -> LabelledSamples:
    """Append `second`, `repeats` times."""
    return LabelledSamples(
        np.concatenate([first.x, *[second.x] * repeats]), np.concatenate([first.y, *[second.y] * repeats])
    )
