"""SQLite as the store of samples.

An insert is one transaction with `synchronous=FULL`: what `add` returned is on disk.
"""

import hashlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

from cloud.boots import Boots
from cloud.label_book import LabelBook, put_words
from cloud.pruning import Pruned, Room, compact, prune, room
from cloud.retention import Limits, Sweep
from cloud.sample_store import Fate, StoredLabel, StoredSample
from cloud.store_schema import IS_HARD, KEY, SAMPLE_COLUMNS, bring_up_to_date, immediate
from cloud.tasks.base import LabelledSamples
from shoal.errors import PayloadError
from shoal.tensors import reading_values
from shoal.v1.inference_pb2 import ASK_REASON_AUDIT
from shoal.v1.sensor_pb2 import SensorData

log = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 30.0
INSERT_SAMPLE = (
    f"INSERT INTO samples ({', '.join(SAMPLE_COLUMNS)})"  # noqa: S608  our own names
    f" VALUES ({', '.join('?' * len(SAMPLE_COLUMNS))})"
)
_LABELLED = (
    "FROM effective_labels JOIN samples USING (device, epoch, seq)"
    " WHERE model = ? AND label IS NOT NULL AND reading IS NOT NULL"
)


class SqliteSampleStore:
    """One file. One process writes samples, others may read and label.

    Attributes:
        boots: what dates the samples of devices that doubted their clocks.
        labels: what people and programs that label ask.
    """

    def __init__(self, path: Path) -> None:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        self._db = Database(connection)
        # Of a new file only, and first: what retention frees goes back to the file system.
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        bring_up_to_date(self._db)
        self.boots = Boots(self._db.conn)
        self.labels = LabelBook(self._db)

    def close(self) -> None:
        self._db.conn.close()

    # -- writing -------------------------------------------------------------------------------------------------------

    def add(self, samples: Iterable[StoredSample]) -> list[Fate]:
        """Store what is new, in one transaction; say what became of each."""
        rows = [(*sample, sample.digest) for sample in samples]
        with immediate(self._db) as connection:
            try:
                connection.executemany(INSERT_SAMPLE, rows)
            except sqlite3.IntegrityError:
                # Rare, and a statement for each row: something of it was here before.
                connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                return [_add_one(connection, row) for row in rows]
        return [Fate.STORED] * len(rows)

    def set_aside(self, gateway: str, reason: str, payload: bytes, received_at_us: int) -> None:
        """Keep what was refused, for people."""
        self._db.execute(
            "INSERT INTO quarantine (gateway, reason, received_at_us, payload) VALUES (?, ?, ?, ?)",
            (gateway, reason, received_at_us, payload),
        )

    def add_labels(self, labels: Iterable[StoredLabel]) -> int:
        """Keep words in one transaction, each author's newest on each sample. Returns how many were given."""
        with immediate(self._db) as connection:
            return put_words(connection, labels)

    def unlabelled(self, model: str, after: int, limit: int) -> list[tuple[int, StoredSample]]:
        """Samples of which nobody said anything, by the number of their row, above `after`."""
        return self.labels.unlabelled(model, after, limit)

    def prune_samples(self, sweep: Sweep, limits: Limits, now_us: int, *, dry_run: bool = False) -> Pruned:
        """Look at the next rows of a sweep and drop what may go; with `dry_run` only say what would."""
        return prune(self._db, sweep, limits, now_us, dry_run=dry_run)

    def compact(self) -> None:
        """Write the file anew, without free pages; needs as much room again, and that nobody else writes."""
        compact(self._db)

    # -- reading -------------------------------------------------------------------------------------------------------

    def room(self) -> Room:
        return room(self._db)

    def count(self, model: str | None = None) -> int:
        """Samples that came, of one model or of all, those dropped since included."""
        return self._number("SELECT COUNT(*) FROM samples WHERE ? IS NULL OR model = ?", model, model)

    def count_quarantined(self) -> int:
        return self._number("SELECT COUNT(*) FROM quarantine")

    def count_labelled(self, model: str) -> int:
        """Samples of a model that came and have a label that counts, those dropped since included."""
        return self._number(
            "SELECT COUNT(*) FROM effective_labels JOIN samples USING (device, epoch, seq)"
            " WHERE model = ? AND label IS NOT NULL",
            model,
        )

    def references(self) -> Iterator[tuple[str, bytes, int, str]]:
        """(device, epoch, seq, reference) of every sample that came, for reconciling."""
        for device, epoch, seq, reference in self._db.execute("SELECT device, epoch, seq, reference FROM samples"):
            yield device, bytes(epoch), seq, reference

    def audit_scores(self, model: str, after: int, limit: int) -> list[tuple[int, int, float]]:
        """See `TriggerStore`."""
        query = (
            "SELECT rowid, device_release, device_score FROM samples WHERE rowid > ? AND model = ? AND reason = ?"
            " AND device_release IS NOT NULL AND device_score IS NOT NULL ORDER BY rowid LIMIT ?"
        )
        return list(self._db.execute(query, (after, model, ASK_REASON_AUDIT, limit)))

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See `TrainingStore`."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def labelled(
        self, model: str, shape: tuple[int, ...], classes: int, *, sources: frozenset[int] | None = None
    ) -> LabelledSamples | None:
        """See `TrainingStore`."""
        rows = self._db.execute(f"SELECT reading, label, source {_LABELLED} ORDER BY device, epoch, seq", (model,))
        return _arrays(
            ((reading, label) for reading, label, source in rows if sources is None or source in sources),
            model,
            shape,
            classes,
        )

    def hard(self, model: str, shape: tuple[int, ...], classes: int, limit: int) -> LabelledSamples | None:
        """See `TrainingStore`."""
        rows = self._db.execute(
            f"SELECT reading, label {_LABELLED} AND ({IS_HARD})"
            " ORDER BY received_at_us DESC, device, epoch, seq LIMIT ?",
            (model, limit),
        )
        return _arrays(rows, model, shape, classes)

    def snapshot_digest(self, model: str) -> bytes:
        """See `TrainingStore`."""
        digest = hashlib.sha256()
        query = f"SELECT device, epoch, seq, digest, label {_LABELLED} ORDER BY device, epoch, seq"
        for device, epoch, seq, content, label in self._db.execute(query, (model,)):
            digest.update(b"%s\0%s%d %s%d\n" % (device.encode(), epoch, seq, content, label))
        return digest.digest()

    def _number(self, query: str, *arguments: str | None) -> int:
        return int(self._db.execute(query, arguments).fetchone()[0])


def _arrays(
    rows: Iterable[tuple[bytes, int]], model: str, shape: tuple[int, ...], classes: int
) -> LabelledSamples | None:
    values: list[NDArray[np.float32]] = []
    labels: list[int] = []
    left_out = 0
    for reading, label in rows:
        try:
            row = reading_values(SensorData.FromString(reading), shape)
        except PayloadError:
            left_out += 1
            continue
        if not 0 <= label < classes:
            left_out += 1
            continue
        values.append(row)
        labels.append(label)
    if left_out:
        log.warning("labelled samples left out model=%s count=%d", model, left_out)
    return LabelledSamples(np.stack(values), np.array(labels, dtype=np.int64)) if values else None


def _add_one(connection: sqlite3.Connection, row: tuple[object, ...]) -> Fate:
    query = "SELECT digest FROM samples WHERE device = ? AND epoch = ? AND seq = ?"
    found = connection.execute(query, row[: len(KEY)]).fetchone()
    if found is None:
        connection.execute(INSERT_SAMPLE, row)
        return Fate.STORED
    return Fate.DUPLICATE if bytes(found[0]) == row[-1] else Fate.CONFLICT
