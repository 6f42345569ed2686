"""The tool chain in memory, step after step, without registry, keys or broker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud.pipelines import steps
from cloud.pipelines.evaluate import evaluate_model, read_spec
from cloud.pipelines.file import EvaluateParameters, Kind, QuantizeParameters, TrainParameters
from cloud.pipelines.snapshot import PublishedRelease, field_tree
from cloud.pipelines.work import TIERS, TaskOrigin, Work
from cloud.tasks import load_task
from cloud.tasks.base import LabelledSamples, Task
from shoal.v1 import release_pb2 as pb

_TASKS = {"digits": "vision", "shuttle": "sensor"}


@dataclass(frozen=True, slots=True)
class BuiltRelease:
    """What would be deployed.

    Attributes:
        spec: with a number, and each artefact's name as its path.
        files: artefacts by path.
        reports: by tier.
    """

    spec: pb.ReleaseSpec
    files: Mapping[str, bytes]
    reports: Mapping[str, Mapping[str, Any]]


def task_of(model: str) -> Task:
    """Return the task of a data set that ships, as the examples have it."""
    return load_task(_TASKS[model], model, {"data": model}, Path())


def build_release(
    task: Task,
    workdir: Path,
    *,
    parent: BuiltRelease | None = None,
    extra: LabelledSamples | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> BuiltRelease:
    """Train, quantize and evaluate."""
    before = PublishedRelease(parent.spec, parent.files) if parent is not None else None
    data = task.prepare(extra)

    def work(**inputs: Mapping[str, bytes]) -> Work:
        kinds = {Kind(name): files for name, files in inputs.items()}
        origin = TaskOrigin("", {}, workdir)
        return Work(task, origin, data, inputs=kinds, seed=seed, threads=1, folder=workdir, report=report)

    trained = steps.train_model(work(), TrainParameters())
    quantized = steps.quantize_model(work(modules=trained.files), QuantizeParameters())
    made = evaluate_model(work(artefacts=quantized.files, field=field_tree(before)), EvaluateParameters())
    spec = read_spec(made.files)
    spec.release = 1 if parent is None else parent.spec.release + 1
    files = {}
    for tier, artefact in zip(TIERS, spec.artefacts, strict=True):
        artefact.path = f"{tier.name}.{tier.suffix}"
        files[artefact.path] = made.files[artefact.path]
    return BuiltRelease(spec, files, made.figures["tiers"])
