"""A bounded, durable queue of what is owed: a reading until it is answered, a sample until the cloud has stored it.

Invariants:
- an item is accepted when the transaction that holds it has been committed with `synchronous=FULL`, not before;
- the counters move in the same transaction as the items: accepted = settled + dropped + waiting, at every commit;
- the same key is accepted once while it waits; what was settled is remembered by whoever settled it;
- rows and bytes are bounded; what does not fit is refused, the oldest stays.

When to send again is decided in memory: after a restart everything that waits is due, and is a replay.
"""

import heapq
import secrets
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shoal.codec import EPOCH_BYTES

# Entries of a heap for each item that waits; a peer that asks for patience again and again leaves old ones behind.
_LARGEST_HEAP = 8

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, epoch BLOB NOT NULL, seq INTEGER NOT NULL,
  model TEXT NOT NULL, payload BLOB NOT NULL, UNIQUE (device, epoch, seq)
);
CREATE TABLE IF NOT EXISTS counters (device TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY (device, name));
CREATE TABLE IF NOT EXISTS epochs (device TEXT PRIMARY KEY, epoch BLOB NOT NULL, next_seq INTEGER NOT NULL);
"""

_MAX_SEQ = (1 << 63) - 1


class Key(NamedTuple):
    """What identifies a reading for ever."""

    device: str
    epoch: bytes
    seq: int


@dataclass(frozen=True, slots=True)
class Item:
    """What waits: `payload` is opaque to the outbox; `model` says which queue of the peer it is for."""

    key: Key
    model: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the whole store; at 100 bytes a reading the defaults hold a fortnight of one a minute."""

    max_items: int = 20_000
    max_bytes: int = 64 << 20


@dataclass(slots=True)
class _Waiting:
    size_bytes: int
    model: str
    attempts: int = 0
    # The one entry of its lane's heap that still counts; older ones are skipped.
    ticket: int = 0


def one_lane(_key: Key) -> str:
    """Everything goes out over one link."""
    return ""


def lane_by_device(key: Key) -> str:
    """Each device has a link of its own."""
    return key.device


class Outbox:
    """One store for one or many devices. Not thread-safe; the loop that owns it calls it.

    `put` and `settle` collect; `commit` makes them durable in one transaction and one fsync. What is due is kept by
    lane, one for each link that items leave through, so that a link which is down holds up nobody else.
    """

    def __init__(self, path: Path, limits: Limits | None = None, lane_of: Callable[[Key], str] = one_lane) -> None:
        self._limits = limits or Limits()
        self._lane_of = lane_of
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._new: dict[Key, Item] = {}
        self._settled: list[tuple[Key, str]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._waiting: dict[Key, _Waiting] = {}
        self._due: dict[str, list[tuple[float, int, Key]]] = {}
        self._tickets = 0
        self._bytes = 0
        self._load()

    def close(self) -> None:
        self.commit()
        self._db.close()

    # -- identity --------------------------------------------------------------------------------------------------

    def epoch(self, device: str) -> bytes:
        """The random id born with this store for `device`; a wiped or cloned store gets another."""
        row = self._db.execute("SELECT epoch FROM epochs WHERE device = ?", (device,)).fetchone()
        if row is None:
            self._db.execute("INSERT INTO epochs VALUES (?, ?, 0)", (device, secrets.token_bytes(EPOCH_BYTES)))
            return self.epoch(device)
        return bytes(row[0])

    def reserve_seqs(self, device: str, count: int) -> range:
        """Reserve sequence numbers durably, so that a crash skips some and never uses one twice."""
        self.epoch(device)
        row = self._db.execute(
            "UPDATE epochs SET next_seq = next_seq + ? WHERE device = ? RETURNING next_seq", (count, device)
        ).fetchone()
        return range(int(row[0]) - count, int(row[0]))

    # -- in ----------------------------------------------------------------------------------------------------------

    def put(self, item: Item) -> bool:
        """Take an item for the next commit. False when there is no room; the same key twice is taken once.

        Raises:
            ValueError: SQLite has no integer for the sequence number; it would fail every commit from now on.
        """
        if not 0 <= item.key.seq <= _MAX_SEQ:
            raise ValueError(f"sequence number {item.key.seq}, expected 0 to {_MAX_SEQ}")
        if item.key in self._waiting or item.key in self._new:
            return True
        if self.room() <= 0 or self._bytes + len(item.payload) > self._limits.max_bytes:
            return False
        self._new[item.key] = item
        self._bytes += len(item.payload)
        return True

    def room(self) -> int:
        """How many more items fit, if their bytes do."""
        return self._limits.max_items - len(self._waiting) - len(self._new)

    def settle(self, key: Key, outcome: str) -> bool:
        """Let an item go with the next commit; `outcome` is the counter that it moves to. False when it is not here."""
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return False
        self._bytes -= waiting.size_bytes
        self._settled.append((key, outcome))
        return True

    def count(self, device: str, name: str, by: int = 1) -> None:
        """Move a counter with the next commit."""
        self._counts[device, name] += by

    @property
    def is_dirty(self) -> bool:
        """Something waits for `commit`."""
        return bool(self._new or self._settled or self._counts)

    def commit(self) -> list[Key]:
        """Make all of it durable in one transaction; return the keys that are accepted now."""
        if not self.is_dirty:
            return []
        # A copy: a commit that fails is tried again and must not count twice.
        counts = self._counts.copy()
        for key in self._new:
            counts[key.device, "accepted"] += 1
        for key, outcome in self._settled:
            counts[key.device, outcome] += 1
        with self._transaction():
            # First what goes: the same key may have been settled and taken again since the last commit.
            self._db.executemany(
                "DELETE FROM items WHERE device = ? AND epoch = ? AND seq = ?", [key for key, _ in self._settled]
            )
            self._db.executemany(
                "INSERT INTO items (device, epoch, seq, model, payload) VALUES (?, ?, ?, ?, ?)",
                [(*item.key, item.model, item.payload) for item in self._new.values()],
            )
            self._db.executemany(
                "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
                [(device, name, by) for (device, name), by in counts.items()],
            )
        accepted = list(self._new)
        for key, item in self._new.items():
            self._waiting[key] = _Waiting(len(item.payload), item.model)
            self._schedule(key, 0.0)
        self._new, self._settled = {}, []
        self._counts.clear()
        return accepted

    # -- out ---------------------------------------------------------------------------------------------------------

    def take(self, now: float, limit: int, retry_after_s: float, lane: str = "") -> list[tuple[Item, int]]:
        """Up to `limit` due items of a lane with the number of earlier attempts, oldest first.

        Each is due again after `retry_after_s`, unless it is settled before.
        """
        taken: list[tuple[Item, int]] = []
        while len(taken) < limit:
            due = self.next_due(lane)
            if due is None or due > now:
                break
            _, _, key = heapq.heappop(self._due[lane])
            waiting = self._waiting[key]
            taken.append((Item(key, waiting.model, self._payload(key)), waiting.attempts))
            waiting.attempts += 1
            self._schedule(key, now + retry_after_s)
        return taken

    def next_due(self, lane: str = "") -> float | None:
        """When `take` has something next; None when nothing waits."""
        heap = self._due.get(lane, [])
        while heap:
            if self._counts_still(heap[0]):
                return heap[0][0]
            heapq.heappop(heap)
        return None

    def make_due(self, keys: Iterable[Key], when: float) -> None:
        """Have these again at `when`: they were not sent after all, or the peer asked for patience."""
        for key in keys:
            if key in self._waiting:
                self._schedule(key, when)

    # -- numbers -------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Accepted and not yet settled, of all devices."""
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def counters(self, device: str | None = None) -> Counter[str]:
        """Counters as committed: of one device, or the sum of all."""
        query = "SELECT name, SUM(value) FROM counters WHERE ? IS NULL OR device = ? GROUP BY name"
        return Counter(dict(self._db.execute(query, (device, device)).fetchall()))

    def waiting_keys(self, device: str | None = None) -> list[Key]:
        return [key for key in self._waiting if device is None or key.device == device]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        rows = self._db.execute("SELECT device, epoch, seq, model, LENGTH(payload) FROM items ORDER BY id")
        for device, epoch, seq, model, size in rows:
            key = Key(device, bytes(epoch), seq)
            # One attempt is assumed: what waits in a store just opened may have been sent before the crash.
            self._waiting[key] = _Waiting(size, model, attempts=1)
            self._bytes += size
            self._schedule(key, 0.0)

    def _schedule(self, key: Key, when: float) -> None:
        self._tickets += 1
        self._waiting[key].ticket = self._tickets
        heap = self._due.setdefault(self._lane_of(key), [])
        if len(heap) > _LARGEST_HEAP * (len(self._waiting) + 1):
            heap[:] = [entry for entry in heap if self._counts_still(entry)]
            heapq.heapify(heap)
        heapq.heappush(heap, (when, self._tickets, key))

    def _counts_still(self, entry: tuple[float, int, Key]) -> bool:
        _, ticket, key = entry
        return key in self._waiting and self._waiting[key].ticket == ticket

    def _payload(self, key: Key) -> bytes:
        query = "SELECT payload FROM items WHERE device = ? AND epoch = ? AND seq = ?"
        return bytes(self._db.execute(query, key).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has rolled back already
                self._db.execute("ROLLBACK")
            raise


def group_by_model(taken: Sequence[tuple[Item, int]]) -> dict[tuple[str, bytes, str, bool], list[Item]]:
    """Group taken items into what fits one request: one device, epoch and model, fresh apart from replayed."""
    groups: dict[tuple[str, bytes, str, bool], list[Item]] = {}
    for item, attempts in taken:
        groups.setdefault((item.key.device, item.key.epoch, item.model, attempts > 0), []).append(item)
    return groups
