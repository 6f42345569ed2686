"""What the fleet sent up: samples exactly once, labels beside them, and what was refused.

Invariants:
- a sample is identified by (device, epoch, seq); the same key with the same bytes is a duplicate, with other bytes it
  is quarantined, and neither changes what is stored;
- an insert is one transaction with `synchronous=FULL`: what `add` returned is safe to acknowledge.
"""

import hashlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, unique
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

from cloud.boots import Boots
from cloud.tasks.base import LabelledSamples
from shoal.errors import PayloadError
from shoal.tensors import reading_values
from shoal.v1.inference_pb2 import ASK_REASON_AUDIT
from shoal.v1.sensor_pb2 import SensorData

log = logging.getLogger(__name__)

# What an integer of SQLite holds; the wire's numbers are unsigned.
MAX_SEQ = (1 << 63) - 1
_BUSY_TIMEOUT_S = 30.0


@unique
class Fate(Enum):
    """What became of one received sample."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class StoredSample(NamedTuple):
    """One row of the store, in the order of its columns. Scores and labels are None where there was no answer.

    Attributes:
        reading: a serialised `shoal.v1.SensorData`.
        reason: why the device asked, as the enum's number.
        boot_id, since_boot_us: where the device doubted its clock: which boot of its machine, and how long after that.
    """

    device: str
    epoch: bytes
    seq: int
    model: str
    gateway: str
    reason: int
    reference: str
    captured_at_us: int
    received_at_us: int
    reading: bytes
    device_release: int | None
    device_score: float | None
    device_label: int | None
    gateway_release: int | None
    gateway_score: float | None
    gateway_label: int | None
    boot_id: bytes | None = None
    since_boot_us: int | None = None

    @property
    def digest(self) -> bytes:
        """Of what identifies the content: the reading, not when or through whom it came."""
        return hashlib.sha256(self.model.encode() + b"\0" + self.reading).digest()


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """One person's or teacher's word on one sample; the sample may come later than its label."""

    device: str
    epoch: bytes
    seq: int
    label: int
    source: int
    author: str
    labelled_at_us: int


_SAMPLE_COLUMNS = {
    "device": str,
    "epoch": bytes,
    "seq": int,
    "model": str,
    "gateway": str,
    "reason": int,
    "reference": str,
    "captured_at_us": int,
    "received_at_us": int,
    "reading": bytes,
    "device_release": int,
    "device_score": float,
    "device_label": int,
    "gateway_release": int,
    "gateway_score": float,
    "gateway_label": int,
    "boot_id": bytes,
    "since_boot_us": int,
    "digest": bytes,
}
_KEY = ("device", "epoch", "seq")
INSERT_SAMPLE = (
    f"INSERT INTO samples ({', '.join(_SAMPLE_COLUMNS)})"  # noqa: S608  our own names
    f" VALUES ({', '.join('?' * len(_SAMPLE_COLUMNS))})"
)


class SampleStore:
    """SQLite behind a small interface. One process writes samples, others may read and label.

    Attributes:
        boots: what dates the samples of devices that doubted their clocks.
    """

    def __init__(self, path: Path) -> None:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        self._db = Database(connection)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        samples = self._db.table("samples")
        samples.create(_SAMPLE_COLUMNS, pk=_KEY, if_not_exists=True)
        for name in ("boot_id", "since_boot_us"):
            if name not in samples.columns_dict:  # a store of an earlier version
                samples.add_column(name, _SAMPLE_COLUMNS[name])
        self._db["labels"].create(  # type: ignore[union-attr]
            {
                "device": str,
                "epoch": bytes,
                "seq": int,
                "label": int,
                "source": int,
                "author": str,
                "labelled_at_us": int,
            },
            pk=_KEY,
            if_not_exists=True,
        )
        self._db["quarantine"].create(  # type: ignore[union-attr]
            {"id": int, "gateway": str, "reason": str, "received_at_us": int, "payload": bytes},
            pk="id",
            if_not_exists=True,
        )

        self.boots = Boots(self._db.conn)

    def close(self) -> None:
        self._db.conn.close()

    # -- writing -------------------------------------------------------------------------------------------------------

    def add(self, samples: Iterable[StoredSample]) -> list[Fate]:
        """Store what is new, in one transaction; say what became of each."""
        rows = [(*sample, sample.digest) for sample in samples]
        with self._transaction() as connection:
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
        """Set labels in one transaction; the last word counts. Returns how many there were."""
        rows = [
            (item.device, item.epoch, item.seq, item.label, item.source, item.author, item.labelled_at_us)
            for item in labels
        ]
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        return len(rows)

    # -- reading -------------------------------------------------------------------------------------------------------

    def count(self, model: str | None = None) -> int:
        return self._number("SELECT COUNT(*) FROM samples WHERE ? IS NULL OR model = ?", model, model)

    def count_quarantined(self) -> int:
        return self._number("SELECT COUNT(*) FROM quarantine")

    def count_labelled(self, model: str) -> int:
        """Samples of a model that are here and have a label."""
        return self._number(
            "SELECT COUNT(*) FROM samples JOIN labels USING (device, epoch, seq) WHERE model = ?", model
        )

    def references(self) -> Iterator[tuple[str, bytes, int, str]]:
        """(device, epoch, seq, reference) of every sample, for reconciling."""
        for device, epoch, seq, reference in self._db.execute("SELECT device, epoch, seq, reference FROM samples"):
            yield device, bytes(epoch), seq, reference

    def audit_scores(self, model: str, after: int, limit: int) -> list[tuple[int, int, float]]:
        """Devices' scores of audited readings in the order in which they came: row number, release, score.

        Args:
            model: whose.
            after: the last row number seen; 0 at first.
            limit: return no more at once.
        """
        query = (
            "SELECT rowid, device_release, device_score FROM samples WHERE rowid > ? AND model = ? AND reason = ?"
            " AND device_release IS NOT NULL AND device_score IS NOT NULL ORDER BY rowid LIMIT ?"
        )
        return list(self._db.execute(query, (after, model, ASK_REASON_AUDIT, limit)))

    def labelled(self, model: str, shape: tuple[int, ...], classes: int) -> LabelledSamples | None:
        """All labelled samples of a model, oldest first; None when there are none.

        Readings that do not fit the shape (an older schema) and labels outside [0, classes) (a slip of the hand) are
        left out: one of them must not stop every build to come.
        """
        values: list[NDArray[np.float32]] = []
        labels: list[int] = []
        query = (
            "SELECT reading, label FROM samples JOIN labels USING (device, epoch, seq) WHERE model = ?"
            " ORDER BY received_at_us, device, seq"
        )
        left_out = 0
        for reading, label in self._db.execute(query, (model,)):
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

    def _number(self, query: str, *arguments: str | None) -> int:
        return int(self._db.execute(query, arguments).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db.conn
            self._db.execute("COMMIT")
        except BaseException:
            # Where the disk is full, SQLite may have rolled back by itself.
            if self._db.conn.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _add_one(connection: sqlite3.Connection, row: tuple[object, ...]) -> Fate:
    query = "SELECT digest FROM samples WHERE device = ? AND epoch = ? AND seq = ?"
    found = connection.execute(query, row[: len(_KEY)]).fetchone()
    if found is None:
        connection.execute(INSERT_SAMPLE, row)
        return Fate.STORED
    return Fate.DUPLICATE if bytes(found[0]) == row[-1] else Fate.CONFLICT
