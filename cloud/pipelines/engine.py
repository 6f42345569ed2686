"""Runs a pipeline: each step once for the same inputs, whoever asks and however often it was killed on the way.

A step's key is the SHA-256 of all that decides its output: what it is told and given, the code and packages that do it,
threads and machine. Where the registry knows the key and the object store holds the output, nothing is done.

    snapshot -> for each step: key -> known? -> run -> objects on disk -> result committed -> checkpoints deleted

Killed before the commit, a step goes on from its checkpoints and ends with the same bytes; killed after it, it is done.
"""

import datetime as dt
import fcntl
import hashlib
import importlib.metadata
import inspect
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from cloud.keys import FileKeyStore, key_password
from cloud.pipelines.deploy import Depot, deploy_to_edge, newest_release, read_deployment
from cloud.pipelines.evaluate import RefusedError, evaluate_model, read_spec
from cloud.pipelines.file import (
    SOURCES,
    DeployToEdge,
    EvaluateModel,
    Kind,
    Pipeline,
    PruneModel,
    QuantizeModel,
    Step,
    TrainModel,
    file_digest,
)
from cloud.pipelines.objects import ObjectStore
from cloud.pipelines.registry import MetricRow, Registry, ReleaseReport, Result, Run, Status, StepRow, StepStatus
from cloud.pipelines.snapshot import FieldSamples, data_digest, field_tree, read_field, read_samples, samples_tree
from cloud.pipelines.work import TIERS, Made, TaskOrigin, Work
from cloud.release_store import ReleaseStore
from cloud.settings import CloudSettings
from cloud.sqlite_store import SqliteSampleStore
from cloud.tasks.base import Task, TrainingData, split_extra
from cloud.usage import find_gpu, measured_usage
from shoal.errors import ConfigError, ShoalError
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER, LABEL_SOURCE_WITH_SAMPLE

log = logging.getLogger(__name__)

# What decides the bytes that a step makes, beside its inputs.
_PACKAGES = (
    "torch",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "numpy",
)
_TRAINING = ("cloud/training.py", "cloud/hardware.py")
_SOURCES: Mapping[type[Step], tuple[str, ...]] = MappingProxyType(
    {
        TrainModel: (*_TRAINING, "cloud/peers.py", "cloud/train_job.py", "cloud/pipelines/steps.py"),
        PruneModel: (*_TRAINING, "cloud/prune.py", "cloud/pipelines/steps.py"),
        QuantizeModel: ("cloud/export.py", "cloud/quantize.py", "cloud/mixed.py", "cloud/pipelines/steps.py"),
        EvaluateModel: ("cloud/gate.py", "cloud/pipelines/evaluate.py"),
        DeployToEdge: ("cloud/pipelines/deploy.py",),
    }
)
_ROOT = Path(__file__).resolve().parents[2]
_KEPT_RUNS = 10
# No step takes so long between putting its output down and saying so.
_YOUNG_S = 3600.0
# A run that was stopped is expected back by then.
_FORGOTTEN_S = 30 * 86_400.0
_TRUSTED = frozenset({LABEL_SOURCE_PERSON, LABEL_SOURCE_WITH_SAMPLE})
_TAUGHT = frozenset({LABEL_SOURCE_TEACHER})
# Of hard samples, the newest: enough to tell two models apart, and scored in a moment.
_MOST_HARD = 1000


class Progress(Protocol):
    """Who is told how a run goes."""

    def step(self, position: int, total: int, name: str, status: StepStatus) -> None: ...
    def line(self, text: str) -> None: ...
    def measure(self, series: str, x: int, last: int, figures: Mapping[str, float]) -> None: ...


@dataclass(slots=True)
class LoggedProgress:
    """For a service: everything goes to the log."""

    model: str

    def step(self, position: int, total: int, name: str, status: StepStatus) -> None:
        log.info("step model=%s step=%s position=%d/%d status=%s", self.model, name, position, total, status)

    def line(self, text: str) -> None:
        log.info("%s: %s", self.model, text)

    def measure(self, series: str, x: int, last: int, figures: Mapping[str, float]) -> None:
        """Lines of training say it already."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A step as it stands before it runs.

    Attributes:
        key: None where an input is not made yet.
        output_digest: None where the step would run.
    """

    step: Step
    key: str | None
    output_digest: str | None


class StoppedError(ShoalError):
    """The process was told to end; the run goes on when it is started again."""


def execute(step: Step, work: Work) -> Made:
    """Run a step that needs nothing but its inputs."""
    if isinstance(step, EvaluateModel):
        return evaluate_model(work, step.parameters)
    # torch takes seconds to import; a run in which nothing is left to train does without.
    from cloud.pipelines import steps  # noqa: PLC0415

    if isinstance(step, TrainModel):
        return steps.train_model(work, step.parameters)
    if isinstance(step, PruneModel):
        return steps.prune_model(work, step.parameters)
    if isinstance(step, QuantizeModel):
        return steps.quantize_model(work, step.parameters)
    raise RuntimeError(f"{step.step_name} needs more than its inputs")


class Engine:
    """One pipeline in one data directory.

    Args:
        settings: the cloud's.
        pipeline: checked.
        task: of the pipeline.
        path: of the pipeline's file.
        progress: who is told how a run goes.
        execute: runs any step but a deployment.
    """

    def __init__(
        self,
        settings: CloudSettings,
        pipeline: Pipeline,
        task: Task,
        path: Path,
        *,
        progress: Progress,
        execute: Callable[[Step, Work], Made] = execute,
    ) -> None:
        self.registry = Registry(settings.registry_path)
        self.objects = ObjectStore(settings.objects_dir)
        self._settings = settings
        self._pipeline = pipeline
        self._task = task
        self._path = path
        self._progress = progress
        self._execute_step = execute
        self._releases = ReleaseStore(settings.releases_dir)

    def close(self) -> None:
        self.registry.close()

    def run(self, reason: str) -> Run:
        """Go on with the newest run of this pipeline if it did not end, or start one. Returns it as it ended.

        Raises:
            ConfigError: another run of the model goes on, or a key or store is missing.
            RefusedError: the gate refused the release.
            StoppedError: the process was told to end.
            ShoalError: a step failed.
        """
        with self._alone():
            run = self._resume() or self._begin(reason)
            try:
                ended = self._run_steps(run)
            except StoppedError as exc:
                self.registry.end(run.id, Status.STOPPED, _now_us(), error=str(exc))
                raise
            except RefusedError as exc:
                self.registry.end(run.id, Status.REFUSED, _now_us(), error=str(exc))
                raise
            except Exception as exc:  # whatever it was, the registry says that it was
                self.registry.end(run.id, Status.FAILED, _now_us(), error=f"{type(exc).__name__}: {exc}")
                raise
            self._tidy(time.time())
            return ended

    def _tidy(self, now: float) -> None:
        """Let go of what no recent run made, and of checkpoints that nobody came back for."""
        self.objects.keep(self.registry.outputs(self.registry.newest_runs(_KEPT_RUNS)), now - _YOUNG_S)
        for folder in (self._settings.builds_dir / "work").glob("*"):
            if folder.stat().st_mtime < now - _FORGOTTEN_S:
                shutil.rmtree(folder)

    def plan(self) -> list[Planned]:
        """Say what a run would do now."""
        return self._plan(self._unfinished() or self._snapshot("look"))

    def _plan(self, run: Run) -> list[Planned]:
        inputs = _Inputs(self._task, self.objects, run)
        planned = []
        for step in self._pipeline.steps:
            if any(name not in inputs.digests for name in step.input_names):
                planned.append(Planned(step, None, None))
                continue
            key = self._key(step, inputs)
            found = self.registry.result(key)
            if found is None or not self.objects.holds(found.output_digest):
                planned.append(Planned(step, key, None))
                continue
            planned.append(Planned(step, key, found.output_digest))
            inputs.add(step, found)
        return planned

    # -- a run ---------------------------------------------------------------------------------------------------------

    def _unfinished(self) -> Run | None:
        run = self.registry.newest(self._pipeline.model)
        if run is None or run.status in {Status.DONE, Status.REFUSED, Status.ABANDONED}:
            return None
        same = run.pipeline_digest == file_digest(self._pipeline) and run.threads == self._settings.train_threads
        whole = all(map(self.objects.holds, (run.samples_digest, run.field_digest)))
        return run if same and whole else None

    def _resume(self) -> Run | None:
        run = self._unfinished()
        if run is not None:
            self.registry.go_on(run.id)
            self._progress.line(f"goes on with run {run.id[:_SHORT]}")
            return run
        newest = self.registry.newest(self._pipeline.model)
        if newest is not None and newest.status in {Status.RUNNING, Status.STOPPED, Status.FAILED}:
            self.registry.end(newest.id, Status.ABANDONED, _now_us(), error=newest.error)
        return None

    def _begin(self, reason: str) -> Run:
        run = self._snapshot(reason)
        self.registry.begin(run)
        return run

    def _snapshot(self, reason: str) -> Run:
        """Freeze what a run begins with."""
        samples = SqliteSampleStore(self._settings.samples_path)
        model, shape, classes = self._pipeline.model, self._task.shape, self._task.classes
        try:
            with samples.snapshot():
                # With those that do not fit: what triggers compare their own count with.
                labelled = samples.count_labelled(model)
                extra = FieldSamples(
                    trusted=samples.labelled(model, shape, classes, sources=_TRUSTED),
                    taught=samples.labelled(model, shape, classes, sources=_TAUGHT),
                    hard=samples.hard(model, shape, classes, _MOST_HARD),
                )
        finally:
            samples.close()
        now = _now_us()
        run = Run(
            id=f"{now:015x}{os.urandom(4).hex()}",
            model=self._pipeline.model,
            pipeline=self._path.name,
            pipeline_digest=file_digest(self._pipeline),
            reason=reason,
            started_at_us=now,
            seed=self._pipeline.seed,
            threads=self._settings.train_threads,
            labelled=labelled,
            samples_digest=self.objects.put(samples_tree(extra)),
            field_digest=self.objects.put(field_tree(newest_release(self._releases, self._pipeline.model))),
            versions=msgspec.json.encode(_versions()).decode(),
            machine=platform.machine(),
        )
        return self._as_before(run) or run

    def _as_before(self, run: Run) -> Run | None:
        """Return a run with the field that the last one had, if that run brought all that is new in the field.

        Otherwise every release would be a reason to look at it again.
        """
        last = self.registry.newest(run.model)
        if last is None or last.status != Status.DONE:
            return None
        published = read_field(self.objects.get(run.field_digest))
        if published is None or published.spec.release != last.release or not self.objects.holds(last.field_digest):
            return None
        same = replace(run, field_digest=last.field_digest)
        evaluated = [planned.output_digest for planned in self._plan(same) if planned.step.makes is Kind.RELEASE]
        return same if all(digest is not None for digest in evaluated) else None

    def _run_steps(self, run: Run) -> Run:
        inputs = _Inputs(self._task, self.objects, run)
        total = len(self._pipeline.steps)
        for position, step in enumerate(self._pipeline.steps, start=1):
            key = self._key(step, inputs)
            row = StepRow(
                run.id, position, step.step_name, StepStatus.UNCHANGED, key, step.output, "", {}, _now_us(), 0.0
            )
            result = self.registry.result(key)
            if result is None or not self.objects.holds(result.output_digest):
                self._progress.step(position, total, step.step_name, StepStatus.RUNNING)
                self.registry.put_step(replace(row, status=StepStatus.RUNNING))
                result, row = self._make(run, step, key, inputs, row)
            row = replace(row, output_digest=result.output_digest, figures=result.figures)
            self.registry.put_step(row)
            self._progress.step(position, total, step.step_name, StepStatus(row.status))
            inputs.add(step, result)
        release = self._report(run, inputs)
        self.registry.end(run.id, Status.DONE, _now_us(), release=release)
        return replace(run, status=Status.DONE.value, release=release)

    def _make(self, run: Run, step: Step, key: str, inputs: "_Inputs", row: StepRow) -> tuple[Result, StepRow]:
        """Run a step, then commit its result."""
        folder = self._settings.builds_dir / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        metrics = _Metrics(run.id, step.step_name, self._progress)
        try:
            with measured_usage(find_gpu()) as usage:
                made = self._execute(run, step, inputs, folder, metrics)
        except ShoalError as exc:
            figures = exc.figures if isinstance(exc, RefusedError) else {}
            self.registry.put_step(replace(row, status=StepStatus.FAILED, figures=figures, seconds=usage.seconds))
            raise
        taken = usage.figures(self._settings.price)
        result = Result(self.objects.put(made.files), {**made.figures, "usage": taken})
        self.registry.add_metrics(metrics.rows)
        self.registry.put_result(key, result, run.id, _now_us())
        shutil.rmtree(folder)
        return result, replace(row, status=StepStatus.DONE, seconds=usage.seconds)

    def _once(
        self, run_id: str, step: Step, inputs: "_Inputs", name: str, measurement: Callable[[], list[float]]
    ) -> list[float]:
        """See `cloud.pipelines.work.Once`."""
        others = [name for name in step.input_names if inputs.kind(name) is not Kind.FIELD]
        key = self._key(step, inputs, others, name)
        known = self.registry.result(key)
        if known is None:
            known = Result("", {"values": measurement()})
            self.registry.put_result(key, known, run_id, _now_us())
        values: list[float] = known.figures["values"]
        return values

    def _execute(self, run: Run, step: Step, inputs: "_Inputs", folder: Path, metrics: "_Metrics") -> Made:
        if isinstance(step, DeployToEdge):
            keys = FileKeyStore(self._settings.keys_dir, key_password)
            depot = Depot(self._releases, keys, self._settings.retained_budget_bytes)
            return deploy_to_edge(step, inputs.files(step), depot, dt.datetime.now(dt.UTC))
        work = Work(
            task=self._task,
            origin=TaskOrigin(self._pipeline.task, self._pipeline.parameters, self._path.parent),
            data=inputs.data,
            inputs=inputs.files(step),
            hard=inputs.hard,
            seed=self._pipeline.seed,
            threads=self._settings.train_threads,
            folder=folder,
            report=self._progress.line,
            measure=metrics,
            once=partial(self._once, run.id, step, inputs),
        )
        return self._execute_step(step, work)

    def _report(self, run: Run, inputs: "_Inputs") -> int:
        """Write down a release that this run made; return the number of what it deployed, 0 for nothing."""
        deployed, evaluated = inputs.results.get(Kind.DEPLOYMENT), inputs.results.get(Kind.RELEASE)
        if deployed is None or evaluated is None:
            return 0
        number = read_deployment(self.objects.get(deployed.output_digest)).release
        if all(report.release != number for report in self.registry.releases(run.model)):
            spec = read_spec(self.objects.get(evaluated.output_digest))
            report = ReleaseReport(
                model=run.model,
                release=number,
                parent=deployed.figures["parent"],
                labelled=run.labelled,
                created_at_us=deployed.figures["created_at_us"],
                tiers=dict(evaluated.figures["tiers"]),
                thresholds={tier.name: item.threshold for tier, item in zip(TIERS, spec.artefacts, strict=True)},
                metrics_ppm=dict(spec.metrics_ppm),
            )
            self.registry.put_release(report, run.id)
        return number

    def _key(self, step: Step, inputs: "_Inputs", names: Sequence[str] | None = None, measurement: str = "") -> str:
        """Name a step, or a measurement on these of its inputs, by all that decides what comes of it."""
        told = {
            "step": msgspec.to_builtins(step),
            "inputs": {name: inputs.digests[name] for name in (step.input_names if names is None else names)},
            "model": self._pipeline.model,
            "measurement": measurement,
        }
        if not isinstance(step, DeployToEdge):
            told |= {
                "seed": self._pipeline.seed,
                "threads": self._settings.train_threads,
                "task": [
                    self._pipeline.task,
                    self._pipeline.parameters,
                    _source_digest(inspect.getfile(type(self._task))),
                ],
                "versions": _versions(),
                "machine": platform.machine(),
            }
        told["code"] = [_source_digest(str(_ROOT / name)) for name in _SOURCES[type(step)]]
        return hashlib.sha256(msgspec.json.encode(told, order="deterministic")).hexdigest()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold a model's runs against each other."""
        self._settings.builds_dir.mkdir(parents=True, exist_ok=True)
        with (self._settings.builds_dir / f"{self._pipeline.model}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise ConfigError(f"another run of {self._pipeline.model} goes on: wait for it, or end it") from exc
            yield


_SHORT = 12


@dataclass(slots=True)
class _Metrics:
    """Collects a step's figures over time, and passes them on as they come."""

    run_id: str
    step: str
    progress: Progress
    rows: list[MetricRow] = field(default_factory=list)

    def __call__(self, series: str, x: int, last: int, figures: Mapping[str, float]) -> None:
        self.rows += [MetricRow(self.run_id, self.step, series, x, name, value) for name, value in figures.items()]
        self.progress.measure(series, x, last, figures)


class _Inputs:
    """What the steps of a run have to work with, as far as it is made. Reads a file when a step asks for it."""

    def __init__(self, task: Task, objects: ObjectStore, run: Run) -> None:
        self._objects = objects
        self._kinds = dict(SOURCES)
        self._trees = {"samples": run.samples_digest, "field": run.field_digest}
        samples = read_samples(objects.get(run.samples_digest))
        self.data: TrainingData = task.prepare(samples.labelled())
        # Of the hard ones, those that training does not see.
        self.hard = split_extra(samples.hard)[1] if samples.hard is not None else None
        # What the task made of the samples and its own data, which may lie in a file of the user's.
        self.digests = {"samples": f"{run.samples_digest}:{data_digest(self.data)}", "field": run.field_digest}
        self.results: dict[Kind, Result] = {}

    def add(self, step: Step, result: Result) -> None:
        self._kinds[step.output] = step.makes
        self._trees[step.output] = self.digests[step.output] = result.output_digest
        self.results[step.makes] = result

    def kind(self, name: str) -> Kind:
        return self._kinds[name]

    def files(self, step: Step) -> dict[Kind, Mapping[str, bytes]]:
        kinds = {self._kinds[name]: self._trees[name] for name in step.input_names}
        return {kind: self._objects.get(digest) for kind, digest in kinds.items() if kind is not Kind.SAMPLES}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in (*_PACKAGES, "shoal")}


def _source_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _now_us() -> int:
    return time.time_ns() // 1000
