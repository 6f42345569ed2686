"""What was run, from what, and what came of it: one SQLite file that `sqlite-utils` and Datasette read as it is.

Tables: `runs`, one row each, with its inputs by digest; `steps`, what each run did; `results`, what a step with this
key made, so that nothing is done twice; `metrics`, figures over time; `releases`, the report of each release.

A step counts as done once its result is committed here, after its objects are safe on disk.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum, unique
from pathlib import Path
from typing import Any

import msgspec
from sqlite_utils import Database

_BUSY_TIMEOUT_S = 30.0
_RUNS: dict[str, Any] = {
    "id": str,
    "model": str,
    "pipeline": str,
    "pipeline_digest": str,
    "reason": str,
    "status": str,
    "error": str,
    "started_at_us": int,
    "ended_at_us": int,
    "seed": int,
    "threads": int,
    "labelled": int,
    "samples_digest": str,
    "field_digest": str,
    "versions": str,
    "machine": str,
    "release": int,
}
_STEPS: dict[str, Any] = {
    "run_id": str,
    "position": int,
    "name": str,
    "status": str,
    "key": str,
    "output_name": str,
    "output_digest": str,
    "figures": str,
    "started_at_us": int,
    "seconds": float,
}
_RESULTS: dict[str, Any] = {"key": str, "output_digest": str, "figures": str, "run_id": str, "made_at_us": int}
_METRICS: dict[str, Any] = {"run_id": str, "step": str, "series": str, "x": int, "name": str, "value": float}
_RELEASES: dict[str, Any] = {"model": str, "release": int, "run_id": str, "report": str}


@unique
class Status(StrEnum):
    """Of a run. Whatever is not DONE or REFUSED goes on when it is run again.

    A run is REFUSED where the gate says no: with the same samples it would again.
    """

    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    STOPPED = "stopped"
    ABANDONED = "abandoned"


@unique
class StepStatus(StrEnum):
    """Of a step: UNCHANGED is what an earlier run did."""

    RUNNING = "running"
    DONE = "done"
    UNCHANGED = "unchanged"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Run:
    """One row of `runs`.

    Attributes:
        pipeline: the file's name; `pipeline_digest` says what was in it.
        reason: why it was started.
        labelled: samples that had a label when it began, with those that do not fit.
        samples_digest, field_digest: trees of what it began with.
        versions: of what decides the artefacts, as JSON.
        release: what it deployed; 0 for nothing.
    """

    id: str
    model: str
    pipeline: str
    pipeline_digest: str
    reason: str
    started_at_us: int
    seed: int
    threads: int
    labelled: int
    samples_digest: str
    field_digest: str
    versions: str
    machine: str
    status: str = Status.RUNNING.value
    error: str = ""
    ended_at_us: int = 0
    release: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a step made.

    Attributes:
        figures: what it measured; not part of what the digest names, because times vary.
    """

    output_digest: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of `steps`."""

    run_id: str
    position: int
    name: str
    status: str
    key: str
    output_name: str
    output_digest: str
    figures: Mapping[str, Any]
    started_at_us: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One figure at one moment.

    Attributes:
        series: what it is of, such as "device".
        x: the moment: an epoch's number.
    """

    run_id: str
    step: str
    series: str
    x: int
    name: str
    value: float


class ReleaseReport(msgspec.Struct, frozen=True):
    """What is known of one release.

    Attributes:
        labelled: samples that had a label when it was begun.
        tiers: by tier, see `cloud.pipelines.evaluate.TierReport`.
    """

    model: str
    release: int
    parent: int
    labelled: int
    created_at_us: int
    tiers: dict[str, dict[str, int | float | str | None]]
    thresholds: dict[str, float]
    metrics_ppm: dict[str, int]


class Registry:
    """See the module. Several processes may read; the runs of one model write one at a time."""

    def __init__(self, path: Path) -> None:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        self._db = Database(connection)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        for name, columns, key in (
            ("runs", _RUNS, "id"),
            ("steps", _STEPS, ("run_id", "position")),
            ("results", _RESULTS, "key"),
            ("metrics", _METRICS, ("run_id", "step", "series", "x", "name")),
            ("releases", _RELEASES, ("model", "release")),
        ):
            self._db.table(name).create(columns, pk=key, if_not_exists=True)

    def close(self) -> None:
        self._db.conn.close()

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        self._db.table("runs").insert(asdict(run))

    def end(self, run_id: str, status: Status, ended_at_us: int, *, error: str = "", release: int = 0) -> None:
        self._db.table("runs").update(
            run_id, {"status": status.value, "ended_at_us": ended_at_us, "error": error, "release": release}
        )

    def go_on(self, run_id: str) -> None:
        self._db.table("runs").update(run_id, {"status": Status.RUNNING.value, "error": ""})

    def put_step(self, row: StepRow) -> None:
        self._db.table("steps").upsert(_flat(row), pk=("run_id", "position"))

    def put_result(self, key: str, result: Result, run_id: str, made_at_us: int) -> None:
        """Commit what a step made; from now on it is not made again."""
        self._db.table("results").upsert(
            {
                "key": key,
                "output_digest": result.output_digest,
                "figures": _json(result.figures),
                "run_id": run_id,
                "made_at_us": made_at_us,
            },
            pk="key",
        )

    def add_metrics(self, rows: Iterable[MetricRow]) -> None:
        self._db.table("metrics").upsert_all(map(asdict, rows), pk=("run_id", "step", "series", "x", "name"))

    def put_release(self, report: ReleaseReport, run_id: str) -> None:
        self._db.table("releases").upsert(
            {"model": report.model, "release": report.release, "run_id": run_id, "report": _json(report)},
            pk=("model", "release"),
        )

    # -- reading -------------------------------------------------------------------------------------------------------

    def result(self, key: str) -> Result | None:
        row = self._db.execute("SELECT output_digest, figures FROM results WHERE key = ?", (key,)).fetchone()
        return Result(row[0], msgspec.json.decode(row[1])) if row is not None else None

    def origin(self, key: str) -> str | None:
        """Return the id of the run that made what a step with this key makes."""
        row = self._db.execute("SELECT run_id FROM results WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def newest(self, model: str) -> Run | None:
        """The model's newest run, whatever became of it."""
        return next(iter(self.runs(model, limit=1)), None)

    def newest_ended(self, model: str) -> Run | None:
        """The newest run that said yes or no."""
        return next(
            iter(self._runs("WHERE model = ? AND status IN (?, ?)", [model, Status.DONE, Status.REFUSED], 1)), None
        )

    def runs(self, model: str | None = None, *, limit: int = 20) -> list[Run]:
        """Runs, the newest first."""
        return self._runs("WHERE ? IS NULL OR model = ?", [model, model], limit)

    def newest_runs(self, count: int) -> list[Run]:
        """Return the newest runs of every model, so many of each."""
        models = self._db.execute("SELECT DISTINCT model FROM runs").fetchall()
        return [run for (model,) in models for run in self.runs(model, limit=count)]

    def run(self, prefix: str) -> list[Run]:
        """The runs whose id begins like this: one, unless the prefix is too short or wrong."""
        return self._runs("WHERE substr(id, 1, ?) = ?", [len(prefix), prefix], 10)

    def steps(self, run_id: str) -> list[StepRow]:
        rows = self._db.execute(f"SELECT {', '.join(_STEPS)} FROM steps WHERE run_id = ? ORDER BY position", (run_id,))  # noqa: S608  our own names
        return [StepRow(*(*row[:7], msgspec.json.decode(row[7]), *row[8:])) for row in rows]

    def metrics(self, run_id: str) -> list[MetricRow]:
        query = f"SELECT {', '.join(_METRICS)} FROM metrics WHERE run_id = ? ORDER BY step, series, name, x"  # noqa: S608  our own names
        return [MetricRow(*row) for row in self._db.execute(query, (run_id,))]

    def releases(self, model: str) -> list[ReleaseReport]:
        """The reports of all releases of a model, oldest first."""
        rows = self._db.execute("SELECT report FROM releases WHERE model = ? ORDER BY release", (model,))
        return [msgspec.json.decode(row[0], type=ReleaseReport) for row in rows]

    def outputs(self, runs: Sequence[Run]) -> set[str]:
        """Digests of everything that these runs began with and made."""
        found = {digest for run in runs for digest in (run.samples_digest, run.field_digest)}
        for run in runs:
            found |= {step.output_digest for step in self.steps(run.id) if step.output_digest}
        return found

    def _runs(self, where: str, values: Sequence[object], limit: int) -> list[Run]:
        names = ", ".join(Run.__slots__)
        query = f"SELECT {names} FROM runs {where} ORDER BY id DESC LIMIT ?"  # noqa: S608  our own words
        return [Run(*row) for row in self._db.execute(query, [*values, limit])]


def _flat(row: StepRow) -> dict[str, object]:
    return asdict(row) | {"figures": _json(row.figures)}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
