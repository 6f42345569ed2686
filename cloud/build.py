"""One build, as a process of its own: labelled samples in, a signed release and its plan out.

    python -m cloud.build --config cloud.toml --model digits

The trainer starts it; killed, it is started again and resumes from its checkpoints.
"""

import argparse
import datetime as dt
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec

from cloud.keys import FileKeyStore, key_password
from cloud.pipeline import TIERS, BuiltRelease, build_release
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import parse_role
from cloud.sample_store import SampleStore
from cloud.settings import CloudSettings, ModelSettings
from cloud.tasks import load_task
from shoal.codec import decode
from shoal.config import load_config
from shoal.errors import ConfigError, ShoalError
from shoal.release.durable import write_atomic
from shoal.release.plan import PERMILLE
from shoal.release.trust import model_role, spec_path
from shoal.v1.release_pb2 import ReleaseSpec, RolloutPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedRelease:
    """A release read back from the store: the parent of the next."""

    spec: ReleaseSpec
    files: Mapping[str, bytes]


class BuildReport(msgspec.Struct, frozen=True):
    """What a build leaves in `builds/MODEL/RELEASE.json`.

    Attributes:
        labelled: samples that had a label when it began.
    """

    model: str
    release: int
    parent: int
    labelled: int
    created_at_us: int
    tiers: dict[str, dict[str, int | float | str | None]]
    thresholds: dict[str, float]
    metrics_ppm: dict[str, int]


def report_path(builds_dir: Path, model: str, release: int) -> Path:
    return builds_dir / model / f"{release}.json"


def load_reports(builds_dir: Path, model: str) -> list[BuildReport]:
    """The reports of all releases of a model, oldest first."""
    paths = sorted((builds_dir / model).glob("*.json"), key=lambda path: int(path.stem))
    return [msgspec.json.decode(path.read_bytes(), type=BuildReport) for path in paths]


def newest_release(store: ReleaseStore, model: str, release: int) -> PublishedRelease | None:
    """Read a release and its artefacts; None when the store has not published it (any more)."""
    newest = store.newest()
    targets = parse_role(newest.roles[model_role(model)]).targets
    info = targets.get(spec_path(model, release))
    data = newest.file(bytes.fromhex(info.hashes["sha256"])) if info is not None else None
    if data is None:
        return None
    spec = decode(ReleaseSpec, data)
    files = {item.path: newest.file(item.sha256) for item in spec.artefacts}
    present = {path: content for path, content in files.items() if content is not None}
    return PublishedRelease(spec, MappingProxyType(present)) if len(present) == len(files) else None


def build(settings: CloudSettings, model: ModelSettings) -> BuildReport:
    """Make, sign and queue the next release of a model and the plan that brings it to its targets.

    Raises:
        ShoalError: the gate refused it, or a key or store is missing.
    """
    task = load_task(model.name)
    keys = FileKeyStore(settings.keys_dir, key_password)
    releases = ReleaseStore(settings.releases_dir)
    samples = SampleStore(settings.samples_path)
    # Before they are read, and with those that do not fit: what the trainer compares its own count with.
    labelled = samples.count_labelled(model.name)
    extra = samples.labelled(model.name, task.shape, task.classes)
    samples.close()
    last = max((report.release for report in load_reports(settings.builds_dir, model.name)), default=0)
    number = last + 1
    built = build_release(
        task,
        release=number,
        parent=newest_release(releases, model.name, last) if last else None,
        extra=extra,
        workdir=settings.builds_dir / model.name / f"{number}.work",
        seed=settings.seed,
        threads=settings.train_threads,
        report=lambda line: log.info("%s %d: %s", model.name, number, line),
    )
    now = dt.datetime.now(dt.UTC)
    files = [built.files[artefact.path] for artefact in built.spec.artefacts]
    released = submit_release(releases, built.spec, files, keys, now, budget_bytes=settings.retained_budget_bytes)
    plan = RolloutPlan(
        rollout_id=f"{model.name}-{released.release}",
        model=model.name,
        release=released.release,
        targets=model.targets,
        share_permille=PERMILLE,
    )
    submit_plan(releases, plan, keys, now)
    report = _report(released, built, labelled=labelled)
    write_atomic(report_path(settings.builds_dir, model.name, released.release), msgspec.json.encode(report))
    return report


def _report(released: ReleaseSpec, built: BuiltRelease, *, labelled: int) -> BuildReport:
    return BuildReport(
        model=released.model,
        release=released.release,
        parent=released.parent,
        labelled=labelled,
        created_at_us=released.created_at_us,
        tiers={tier: asdict(report) for tier, report in built.reports.items()},
        thresholds={TIERS[item.tier][0]: item.threshold for item in released.artefacts},
        metrics_ppm=dict(released.metrics_ppm),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloud.build", description="Build and queue one release.")
    parser.add_argument("--config", type=Path, required=True, help="the cloud's TOML file, see docs/cloud.md")
    parser.add_argument("--model", required=True, help="the model's name in that file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = load_config(arguments.config, CloudSettings)
        model = settings.model(arguments.model)
        if model is None:
            raise ConfigError(f"{arguments.config} has no model {arguments.model!r}")
        build(settings, model)
    except ShoalError as exc:
        log.error("build refused model=%s reason=%s", arguments.model, exc)  # noqa: TRY400  the reason says it all
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
