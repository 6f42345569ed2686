"""The trainer service: watches the labels, starts builds, one process each."""

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloud.build import load_reports
from cloud.sample_store import SampleStore
from cloud.settings import CloudSettings, ModelSettings
from cloud.triggers import TriggerState, why_build
from shoal.commands import CommandDesk
from shoal.errors import PayloadError
from shoal.link import Link
from shoal.routes import CLOUD_SITE
from shoal.v1.command_pb2 import RunPipeline

log = logging.getLogger(__name__)

SERVICE = "trainer"
# After a build that failed: the same data would fail again at once.
_RETRY_S = 30.0

StartBuild = Callable[[str], "subprocess.Popen[bytes]"]


@dataclass(slots=True)
class _Model:
    settings: ModelSettings
    labelled_at_last: int = 0
    releases: int = 0
    asked: bool = False
    process: "subprocess.Popen[bytes] | None" = None
    not_before: float = 0.0


class Trainer:
    """Call `tick` about once a second. Builds run in child processes, at most `parallel_builds` at a time."""

    def __init__(self, settings: CloudSettings, link: Link, samples: SampleStore, start_build: StartBuild) -> None:
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._samples = samples
        self._start_build = start_build
        self._models = {model.name: self._restore(model) for model in settings.models}
        self._desk = CommandDesk(link, CLOUD_SITE, SERVICE, {"run_pipeline": self._run_pipeline})

    def _restore(self, settings: ModelSettings) -> _Model:
        reports = load_reports(self._settings.builds_dir, settings.name)
        if not reports:
            return _Model(settings)
        return _Model(settings, reports[-1].labelled, reports[-1].release)

    def tick(self, now: float) -> None:
        self._desk.tick()
        for name, model in self._models.items():
            if model.process is not None:
                self._collect(name, model, now)
        for name, model in self._models.items():
            self.counters[f"labelled.{name}"] = self._samples.count_labelled(name)
            running = sum(other.process is not None for other in self._models.values())
            if model.process is None and now >= model.not_before and running < self._settings.parallel_builds:
                self._consider(name, model)

    def close(self) -> None:
        """End builds; they resume from their checkpoints when the trainer comes back."""
        for model in self._models.values():
            if model.process is not None:
                model.process.terminate()
                model.process.wait()

    def _consider(self, name: str, model: _Model) -> None:
        labelled = self.counters[f"labelled.{name}"]
        state = TriggerState(model.releases, labelled, model.labelled_at_last, model.asked)
        reason = why_build(
            state, min_new_labels=model.settings.min_new_labels, max_releases=model.settings.max_releases
        )
        if reason is None:
            return
        log.info("build starts model=%s release=%d reason=%s", name, model.releases + 1, reason)
        model.process = self._start_build(name)
        model.asked = False
        self.counters["builds.started"] += 1

    def _collect(self, name: str, model: _Model, now: float) -> None:
        code = model.process.poll() if model.process is not None else None
        if code is None:
            return
        model.process = None
        if code != 0:
            self.counters["builds.failed"] += 1
            log.error("build failed model=%s code=%d", name, code)
            model.not_before = now + _RETRY_S
            return
        self.counters["builds.done"] += 1
        report = load_reports(self._settings.builds_dir, name)[-1]
        model.releases, model.labelled_at_last = report.release, report.labelled
        log.info("build done model=%s release=%d", name, report.release)

    def _run_pipeline(self, action: RunPipeline) -> str:
        model = self._models.get(action.model)
        if model is None:
            raise PayloadError(f"{action.model!r} is not trained here", field="model")
        most = model.settings.max_releases
        if most and model.releases >= most:
            raise PayloadError(f"{action.model!r} has all of its {most} releases", field="model")
        model.asked = True
        return f"a build of {action.model} starts as soon as there is room"


def process_starter(config: Path) -> StartBuild:
    """Start `cloud.build` on a configuration file; its log lines go where this process's go."""

    def start(model: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-m", "cloud.build", "--config", str(config), "--model", model])  # noqa: S603

    return start
