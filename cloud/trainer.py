"""The trainer service: watches labels, scores and the clock, and starts runs of pipelines, one process each."""

import datetime as dt
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud.pipelines.drift import DriftWatch
from cloud.pipelines.file import Pipeline
from cloud.pipelines.registry import Registry
from cloud.sample_store import TriggerStore
from cloud.settings import CloudSettings
from cloud.triggers import TriggerState, why_run
from shoal.commands import CommandDesk
from shoal.errors import PayloadError
from shoal.link import Link
from shoal.routes import CLOUD_SITE
from shoal.v1.command_pb2 import RunPipeline

log = logging.getLogger(__name__)

SERVICE = "trainer"
# After a run that failed: the same would fail again at once.
_RETRY_S = 30.0
# Of one model in one tick, so that a trainer that was away does not stand still while it catches up.
_SCORES_AT_ONCE = 5000

# Starts a run of a model's pipeline for a reason.
StartRun = Callable[[str, str], "subprocess.Popen[bytes]"]


@dataclass(slots=True)
class _Model:
    pipeline: Pipeline
    drift: DriftWatch | None
    seen_rowid: int = 0
    ran: bool = False
    labelled_at_last: int = 0
    releases: int = 0
    asked: bool = False
    process: "subprocess.Popen[bytes] | None" = None
    not_before: float = 0.0


class Trainer:
    """Call `tick` about once a second. Runs are child processes, at most `parallel_builds` at a time.

    Args:
        pipelines: one for each model that is trained here.
    """

    def __init__(
        self,
        settings: CloudSettings,
        link: Link,
        samples: TriggerStore,
        *,
        pipelines: Sequence[Pipeline],
        start_run: StartRun,
        wall_clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._samples = samples
        self._registry = Registry(settings.registry_path)
        self._start_run = start_run
        self._wall_clock = wall_clock
        self._models = {pipeline.model: self._restore(pipeline) for pipeline in pipelines}
        self._desk = CommandDesk(link, CLOUD_SITE, SERVICE, {"run_pipeline": self._run_pipeline})

    def _restore(self, pipeline: Pipeline) -> _Model:
        trigger = pipeline.triggers.drift
        model = _Model(pipeline, DriftWatch(trigger) if trigger is not None else None)
        self._look_up(model)
        return model

    def tick(self, now: float) -> None:
        self._desk.tick()
        for name, model in self._models.items():
            if model.process is not None:
                self._collect(name, model, now)
        for name, model in self._models.items():
            self.counters[f"labelled.{name}"] = self._samples.count_labelled(name)
            self._watch_scores(name, model)
            running = sum(other.process is not None for other in self._models.values())
            if model.process is None and now >= model.not_before and running < self._settings.parallel_builds:
                self._consider(name, model)

    def close(self) -> None:
        """End runs; they go on from their checkpoints when the trainer comes back."""
        for model in self._models.values():
            if model.process is not None:
                model.process.terminate()
                model.process.wait()
        self._registry.close()

    def _look_up(self, model: _Model) -> None:
        """Read what the registry says of the model's runs."""
        name = model.pipeline.model
        last = self._registry.newest_ended(name)
        model.ran, model.labelled_at_last = last is not None, last.labelled if last is not None else 0
        model.releases = len(self._registry.releases(name))

    def _watch_scores(self, name: str, model: _Model) -> None:
        if model.drift is None:
            return
        for rowid, release, score in self._samples.audit_scores(name, model.seen_rowid, _SCORES_AT_ONCE):
            model.seen_rowid = rowid
            model.drift.update(release, score)
        self.counters[f"drifted.{name}"] = int(model.drift.drifted)

    def _consider(self, name: str, model: _Model) -> None:
        state = TriggerState(
            releases=model.releases,
            ran=model.ran,
            labelled=self.counters[f"labelled.{name}"],
            labelled_at_last=model.labelled_at_last,
            drifted=model.drift is not None and model.drift.drifted,
            asked=model.asked,
        )
        reason = why_run(model.pipeline.triggers, state, self._wall_clock())
        if reason is None:
            return
        log.info("run starts model=%s reason=%s", name, reason)
        model.process = self._start_run(name, reason)
        model.asked = False
        self.counters["builds.started"] += 1

    def _collect(self, name: str, model: _Model, now: float) -> None:
        code = model.process.poll() if model.process is not None else None
        if code is None:
            return
        model.process = None
        self._look_up(model)
        if code == 0:
            self.counters["builds.done"] += 1
            log.info("run done model=%s releases=%d", name, model.releases)
            return
        self.counters["builds.failed"] += 1
        log.error("run failed model=%s code=%d: see `shoal runs`", name, code)
        model.not_before = now + _RETRY_S

    def _run_pipeline(self, action: RunPipeline) -> str:
        model = self._models.get(action.model)
        if model is None:
            raise PayloadError(f"{action.model!r} is not trained here", field="model")
        most = model.pipeline.triggers.max_releases
        if most and model.releases >= most:
            raise PayloadError(f"{action.model!r} has all of its {most} releases", field="model")
        model.asked = True
        return f"a run for {action.model} starts as soon as there is room"


def process_starter(config: Path) -> StartRun:
    """Start `cloud.pipelines` on a configuration file; its log lines go where this process's go."""

    def start(model: str, reason: str) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            "-m",
            "cloud.pipelines",
            "--config",
            str(config),
            "--model",
            model,
            "--reason",
            reason,
        ]
        return subprocess.Popen(command)  # noqa: S603

    return start
