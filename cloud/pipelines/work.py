"""What every step is given, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud.pipelines.file import Kind
from cloud.tasks.base import LabelledSamples, Task, TrainingData
from shoal.errors import ModelError
from shoal.v1 import release_pb2 as pb


@dataclass(frozen=True, slots=True)
class Tier:
    """A layer of the cascade, and what runs there."""

    name: str
    number: pb.Tier
    format: pb.ModelFormat
    suffix: str


TIERS = (
    Tier("device", pb.TIER_DEVICE, pb.MODEL_FORMAT_TFLITE, "tflite"),
    Tier("gateway", pb.TIER_GATEWAY, pb.MODEL_FORMAT_ONNX, "onnx"),
)

# Figures of a series over time: series, moment, the last moment there will be, figures by name.
Measure = Callable[[str, int, int, Mapping[str, float]], None]
# A measurement by its name: made once for the same inputs, the field's release not counted among them, and then kept.
Once = Callable[[str, Callable[[], list[float]]], list[float]]


@dataclass(frozen=True, slots=True)
class TaskOrigin:
    """What `cloud.tasks.load_task` made the task from, for processes that must make it again."""

    name: str
    parameters: Mapping[str, object]
    base: Path


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one run.

    Attributes:
        data: what the task made of its own data and the field's samples.
        inputs: the files of each input, by kind; `SAMPLES` is in `data`.
        hard: field samples that a model in the field got wrong and that training does not see.
        folder: for checkpoints; whoever runs the step deletes it once the result is committed.
        report: takes a line of progress.
        measure: takes figures of a series over time.
        once: makes a measurement, unless it was made before. What varies must not be measured twice, or the same inputs
            would come to another decision.
    """

    task: Task
    origin: TaskOrigin
    data: TrainingData
    inputs: Mapping[Kind, Mapping[str, bytes]]
    seed: int
    threads: int
    folder: Path
    hard: LabelledSamples | None = None
    report: Callable[[str], None] = lambda _: None
    measure: Measure = lambda *_: None
    once: Once = lambda _, measurement: measurement()

    def module(self, tier: Tier) -> bytes:
        """Return a trained module of the input.

        Raises:
            ModelError: it holds none for this tier.
        """
        return self._file(Kind.MODULES, f"{tier.name}.pt")

    def artefact(self, tier: Tier, precision: str) -> bytes:
        """Return an artefact of the input; raises as `module` does."""
        return self._file(Kind.ARTEFACTS, artefact_name(tier, precision))

    def precisions(self, tier: Tier) -> list[str]:
        """Return which precisions of a tier's model the input holds."""
        names = self.inputs[Kind.ARTEFACTS]
        return [precision for precision in PRECISIONS if artefact_name(tier, precision) in names]

    def _file(self, kind: Kind, name: str) -> bytes:
        try:
            return self.inputs[kind][name]
        except KeyError as exc:
            raise ModelError(f"{kind} without {name}") from exc


PRECISIONS = ("float", "int8", "mixed")


def artefact_name(tier: Tier, precision: str) -> str:
    return f"{tier.name}.{precision}.{tier.suffix}"


@dataclass(frozen=True, slots=True)
class Made:
    """What a step made.

    Attributes:
        files: its output; the same inputs make the same bytes.
        figures: what it measured, which may differ from time to time.
    """

    files: Mapping[str, bytes]
    figures: Mapping[str, Any] = field(default_factory=dict)
