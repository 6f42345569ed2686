"""Retention on SQLite: a few rows, one transaction and a few milliseconds at a time.

A dropped sample loses its reading and keeps its row: sent again, it is a duplicate still.
"""
# ruff: noqa: S608  built from our own names

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from sqlite_utils import Database

from cloud.retention import Limits, Row, Sweep, choose_to_drop, is_young, next_pass
from cloud.store_schema import IS_HARD, SAMPLE_COLUMNS, immediate
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON

log = logging.getLogger(__name__)

# Of one step. A row that was dropped before costs a tenth of one that is looked at.
STEP_ROWS = 500
# And of readings: to free a large one, every page of it is read.
_STEP_BYTES = 4 << 20
_PASSED_OVER = 10
# Given back to the file system in one step: more than a step of readings of this size frees.
_STEP_PAGES = 2048
_INCREMENTAL = 2
# Between two steps of a sweep, so that ingest has three quarters of its time to itself; and between two sweeps.
_STEP_S = 0.02
_PAUSE_S = 60.0
_ROWS = f"""
SELECT number, received_at_us, bytes, source IS NOT NULL, COALESCE(source = {LABEL_SOURCE_PERSON}, 0), {IS_HARD},
  COALESCE(device_label <> gateway_label, 0)
FROM (
  SELECT rowid AS number, device, epoch, seq, received_at_us, LENGTH(reading) AS bytes, reason, device_score,
    device_label, gateway_label
  FROM samples WHERE rowid > ? AND rowid <= ? AND reading IS NOT NULL ORDER BY rowid LIMIT ?)
LEFT JOIN effective_labels USING (device, epoch, seq)
"""
_LEFT = ", ".join(column for column in SAMPLE_COLUMNS if column != "reading")
_WITHOUT_READING = f"SELECT rowid, {_LEFT} FROM samples WHERE rowid = ?"
_TOMBSTONE = (
    f"INSERT INTO samples (dropped_at_us, rowid, {_LEFT}) VALUES (?, ?, {', '.join('?' * (len(SAMPLE_COLUMNS) - 1))})"
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one step did.

    Attributes:
        freed_bytes: that the dropped readings took.
        excess_bytes: what the store held above its limit before.
        next: where the next step goes on; None where the sweep is over.
    """

    too_old: int
    too_much: int
    freed_bytes: int
    excess_bytes: int
    next: Sweep | None


@dataclass(frozen=True, slots=True)
class Room:
    """What the file takes.

    Attributes:
        used_bytes, free_bytes: together the file, but for its write-ahead log.
        is_shrinking: free pages go back to the file system; in a store of an earlier version only `compact` does that.
    """

    used_bytes: int
    free_bytes: int
    is_shrinking: bool


def room(db: Database) -> Room:
    page, pages, free, vacuum = (
        db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_size", "page_count", "freelist_count", "auto_vacuum")
    )
    return Room(page * (pages - free), page * free, vacuum == _INCREMENTAL)


def compact(db: Database) -> None:
    """Write the file anew, without free pages; needs as much room again, and that nobody else has it open to write."""
    db.execute(f"PRAGMA auto_vacuum={_INCREMENTAL}")
    db.execute("VACUUM")


def prune(
    db: Database, sweep: Sweep, limits: Limits, now_us: int, *, step_rows: int = STEP_ROWS, dry_run: bool = False
) -> Pruned:
    """Look at the next rows and drop what may go; with `dry_run` only say what would."""
    with immediate(db) as connection:
        excess = room(db).used_bytes - limits.max_bytes - sweep.freed_bytes if limits.max_bytes else 0
        (last,) = connection.execute("SELECT COALESCE(MAX(rowid), 0) FROM samples").fetchone()
        if excess <= 0 and not limits.max_age_us:
            return Pruned(0, 0, 0, excess, None)
        upto = sweep.after + step_rows * _PASSED_OVER
        rows = _read(connection, sweep.after, upto, step_rows)
        drops = choose_to_drop(rows, now_us, limits, sweep.worth, excess)
        if not dry_run:
            _bury(connection, drops.too_old + drops.too_much, now_us)
    if not dry_run:
        # As a script, or sqlite3 stops at the first page: each is a row of an answer without columns.
        db.executescript(f"PRAGMA incremental_vacuum({_STEP_PAGES})")
    is_cut = len(rows) == step_rows or sum(row.size_bytes for row in rows) >= _STEP_BYTES
    after = rows[-1].number if is_cut else upto
    # What came later is younger still.
    is_over = after >= last or (bool(rows) and all(is_young(row, now_us, limits) for row in rows))
    here = Sweep(sweep.worth, after, sweep.freed_bytes + (drops.freed_bytes if dry_run else 0))
    following = next_pass(here, excess - drops.freed_bytes) if is_over else here
    return Pruned(len(drops.too_old), len(drops.too_much), drops.freed_bytes, excess, following)


def _read(connection: sqlite3.Connection, after: int, upto: int, most: int) -> list[Row]:
    """The next rows that are still whole, in the order in which they came."""
    rows: list[Row] = []
    size = 0
    with closing(connection.execute(_ROWS, (after, upto, most))) as found:
        for row in found:
            rows.append(Row(*row[:3], *map(bool, row[3:])))
            size += rows[-1].size_bytes
            if size >= _STEP_BYTES:
                break
    return rows


def _bury(connection: sqlite3.Connection, numbers: list[int], now_us: int) -> None:
    """Put rows without their readings in the place of rows.

    Deleted and inserted: an update that makes a row smaller leaves its page as it is, and the file as large.
    """
    ordered = sorted(numbers)
    without = [(now_us, *connection.execute(_WITHOUT_READING, (number,)).fetchone()) for number in ordered]
    connection.executemany("DELETE FROM samples WHERE rowid = ?", [(number,) for number in ordered])
    connection.executemany(_TOMBSTONE, without)


class PrunedStore(Protocol):
    """What retention works on."""

    def prune_samples(self, sweep: Sweep, limits: Limits, now_us: int, *, dry_run: bool = False) -> Pruned: ...


class Retention:
    """Call `step` when it says. One sweep follows the other, and what is left above the limit is told once in each."""

    def __init__(self, store: PrunedStore, limits: Limits, wall_clock: Callable[[], float] = time.time) -> None:
        self.counters: Counter[str] = Counter()
        self._store = store
        self._limits = limits
        self._wall_clock = wall_clock
        self._sweep = Sweep()

    def step(self) -> float:
        """Do a little; return the seconds until the next step."""
        done = self._store.prune_samples(self._sweep, self._limits, int(self._wall_clock() * 1e6))
        if done.too_old or done.too_much:
            self.counters["samples.dropped_too_old"] += done.too_old
            self.counters["samples.dropped_too_much"] += done.too_much
        if done.next is not None:
            self._sweep = done.next
            return _STEP_S
        left = done.excess_bytes - done.freed_bytes
        if left > 0:
            log.warning("store above its limit, what is left is kept bytes=%d limit=%d", left, self._limits.max_bytes)
        self._sweep = Sweep()
        return _PAUSE_S
