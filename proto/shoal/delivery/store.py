"""The file of an outbox: SQLite, WAL, `synchronous=FULL`. Decides nothing but what the quarantine forgets."""

import logging
import secrets
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shoal.codec import EPOCH_BYTES
from shoal.delivery.items import Item, Key, Limits, Priority, Refusal
from shoal.delivery.place import place_of

log = logging.getLogger(__name__)

_SCHEMA = """
BEGIN;
CREATE TABLE IF NOT EXISTS items (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, epoch BLOB NOT NULL, seq INTEGER NOT NULL,
  model TEXT NOT NULL, payload BLOB NOT NULL, priority INTEGER NOT NULL DEFAULT 0, UNIQUE (device, epoch, seq)
);
CREATE TABLE IF NOT EXISTS counters (device TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY (device, name));
CREATE TABLE IF NOT EXISTS epochs (device TEXT PRIMARY KEY, epoch BLOB NOT NULL, next_seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS places (place TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, epoch BLOB NOT NULL, seq INTEGER NOT NULL, model TEXT NOT NULL,
  payload BLOB NOT NULL, size_bytes INTEGER NOT NULL, priority INTEGER NOT NULL,
  status TEXT NOT NULL, field TEXT NOT NULL, message TEXT NOT NULL,
  refused_at INTEGER NOT NULL DEFAULT (strftime('%s', 'now'))
);
COMMIT;
"""

_MOVE = """
INSERT INTO quarantine (device, epoch, seq, model, payload, size_bytes, priority, status, field, message)
SELECT device, epoch, seq, model, CASE WHEN LENGTH(payload) <= ? THEN payload ELSE x'' END, LENGTH(payload), priority,
  ?, ?, ? FROM items WHERE device = ? AND epoch = ? AND seq = ?
"""
_SET_ASIDE = """
INSERT INTO quarantine (device, epoch, seq, model, payload, size_bytes, priority, status, field, message)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# The newest stay as long as both bounds hold.
_FORGET = """
DELETE FROM quarantine WHERE id IN (
  SELECT id FROM (
    SELECT id, ROW_NUMBER() OVER newest AS items, SUM(LENGTH(payload)) OVER newest AS bytes
    FROM quarantine WINDOW newest AS (ORDER BY id DESC)
  ) WHERE items > ? OR bytes > ?
) RETURNING device
"""


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction holds.

    Attributes:
        leaving: keys in the file that go.
        refused: of these, those whose payload the quarantine takes over.
        set_aside: what the quarantine takes and the file never held.
        new: what comes.
        counts: by how much which counter of which device moves.
    """

    leaving: Sequence[Key] = ()
    refused: Sequence[tuple[Key, Refusal]] = ()
    set_aside: Sequence[tuple[Item, Refusal]] = ()
    new: Iterable[Item] = ()
    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)


class Store:
    """One file. `apply` returns once the disk has it."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.executescript(_SCHEMA)
        if "priority" not in {name for _, name, *_ in self.db.execute("PRAGMA table_info(items)")}:
            self.db.execute("ALTER TABLE items ADD COLUMN priority INTEGER NOT NULL DEFAULT 0")
        self._settle_in(place_of(path))

    def close(self) -> None:
        self.db.close()

    def epoch(self, device: str) -> bytes:
        row = self.db.execute("SELECT epoch FROM epochs WHERE device = ?", (device,)).fetchone()
        if row is None:
            self.db.execute("INSERT INTO epochs VALUES (?, ?, 0)", (device, secrets.token_bytes(EPOCH_BYTES)))
            return self.epoch(device)
        return bytes(row[0])

    def reserve_seqs(self, device: str, count: int) -> range:
        self.epoch(device)
        row = self.db.execute(
            "UPDATE epochs SET next_seq = next_seq + ? WHERE device = ? RETURNING next_seq", (count, device)
        ).fetchone()
        return range(int(row[0]) - count, int(row[0]))

    def items(self) -> Iterator[tuple[Key, str, int, Priority]]:
        """What the file holds, oldest first: key, model, size of the payload, priority."""
        rows = self.db.execute("SELECT device, epoch, seq, model, LENGTH(payload), priority FROM items ORDER BY id")
        for device, epoch, seq, model, size, priority in rows:
            yield Key(device, bytes(epoch), seq), model, size, Priority(priority)

    def payload(self, key: Key) -> bytes:
        query = "SELECT payload FROM items WHERE device = ? AND epoch = ? AND seq = ?"
        return bytes(self.db.execute(query, key).fetchone()[0])

    def counters(self, device: str | None) -> Counter[str]:
        query = "SELECT name, SUM(value) FROM counters WHERE ? IS NULL OR device = ? GROUP BY name"
        return Counter(dict(self.db.execute(query, (device, device)).fetchall()))

    def apply(self, change: Change) -> None:
        """Make a change durable, all of it or nothing."""
        with self._transaction():
            counts = Counter(change.counts)
            if change.refused or change.set_aside:
                self._quarantine(change)
                counts.update(self._forget())
            # First what goes: the same key may have been settled and taken again since the last commit.
            self.db.executemany("DELETE FROM items WHERE device = ? AND epoch = ? AND seq = ?", change.leaving)
            self.db.executemany(
                "INSERT INTO items (device, epoch, seq, model, payload, priority) VALUES (?, ?, ?, ?, ?, ?)",
                [(*item.key, item.model, item.payload, item.priority) for item in change.new],
            )
            self.db.executemany(
                "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
                [(device, name, by) for (device, name), by in counts.items()],
            )

    def _quarantine(self, change: Change) -> None:
        # What is larger than the whole quarantine is there without its payload.
        most = self._limits.quarantine_bytes
        moved = [(most, why.status, why.field, why.message, *key) for key, why in change.refused]
        self.db.executemany(_MOVE, moved)
        for item, why in change.set_aside:
            size = len(item.payload)
            payload = item.payload if size <= most else b""
            row = (*item.key, item.model, payload, size, item.priority, why.status, why.field, why.message)
            self.db.execute(_SET_ASIDE, row)

    def _forget(self) -> Counter[tuple[str, str]]:
        limits = self._limits
        gone = self.db.execute(_FORGET, (limits.quarantine_items, limits.quarantine_bytes)).fetchall()
        return Counter((device, "quarantine.forgotten") for (device,) in gone)

    def _settle_in(self, place: str) -> None:
        """Begin new epochs in a file that was copied: the one that it was copied from may go on with the old ones."""
        row = self.db.execute("SELECT place FROM places").fetchone()
        if row is not None and row[0] == place:
            return
        with self._transaction():
            if row is not None:
                log.warning("the outbox is a copy, or was moved: its numbers go on in a new epoch")
                devices = self.db.execute("SELECT device FROM epochs").fetchall()
                self.db.executemany(
                    "UPDATE epochs SET epoch = ? WHERE device = ?",
                    [(secrets.token_bytes(EPOCH_BYTES), device) for (device,) in devices],
                )
            self.db.execute("DELETE FROM places")
            self.db.execute("INSERT INTO places VALUES (?)", (place,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # a full disk has rolled back already
                self.db.execute("ROLLBACK")
            raise
