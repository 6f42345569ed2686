"""A bounded, durable queue of what is owed: a reading until it is answered, a sample until the cloud has stored it.

Invariants:
- an item is accepted when the transaction that holds it has been committed with `synchronous=FULL`, not before;
- the counters move in the same transaction as the items: accepted = settled + dropped + quarantined + waiting, at every
  commit;
- the same key is accepted once while it waits; what was settled is remembered by whoever settled it;
- rows and bytes are bounded. In a full outbox the oldest of a lower priority makes way, else what comes is refused;
- what is refused for ever moves to the quarantine with its reason, in the transaction that takes it off the queue.

With a `Hold`, items may be sent, and settled, before they are on disk: a kill takes no more of them than it says, and
what a kill took was never accepted.

When to send again is decided in memory: after a restart everything that waits is due, and is a replay.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.delivery.items import Hold, Item, Key, Limits, Priority, Refusal
from shoal.delivery.schedule import Ranks, Schedule
from shoal.delivery.store import Change, Store

__all__ = ["Hold", "Item", "Key", "Limits", "Outbox", "Priority", "Refusal", "group_by_model", "lane_by_device"]

_MAX_SEQ = (1 << 63) - 1


@dataclass(slots=True)
class _Waiting:
    size_bytes: int
    model: str
    priority: Priority
    put_at: float | None
    attempts: int = 0


def one_lane(_key: Key) -> str:
    """Everything goes out over one link."""
    return ""


def lane_by_device(key: Key) -> str:
    """Each device has a link of its own."""
    return key.device


class Outbox:
    """One store for one or many devices. Not thread-safe; the loop that owns it calls it.

    `put` and `settle` collect; `commit` makes them durable in one transaction and one fsync.

    Args:
        path: its file.
        limits: its bounds.
        lane_of: which link an item leaves through.
        hold: how much may wait for `commit_due` in memory; nothing, where there is none.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits | None = None,
        lane_of: Callable[[Key], str] = one_lane,
        *,
        hold: Hold | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._lane_of = lane_of
        self._hold = hold
        self._store = Store(path, self._limits)
        self._waiting: dict[Key, _Waiting] = {}
        self._bytes = 0
        self._schedule = Schedule()
        self._ranks = Ranks()
        # Of what waits, what the file does not hold yet.
        self._new: dict[Key, Item] = {}
        self._new_bytes = 0
        self._leaving: list[Key] = []
        self._refused: list[tuple[Key, Refusal]] = []
        self._set_aside: list[tuple[Item, Refusal]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._dirty_at: float | None = None
        self._load()

    def close(self) -> None:
        self.commit()
        self._store.close()

    # -- identity --------------------------------------------------------------------------------------------------

    def epoch(self, device: str) -> bytes:
        """The random id born with this store for `device`; a wiped or copied store gets another."""
        return self._store.epoch(device)

    def reserve_seqs(self, device: str, count: int) -> range:
        """Reserve sequence numbers durably, so that a crash skips some and never uses one twice."""
        return self._store.reserve_seqs(device, count)

    # -- in ----------------------------------------------------------------------------------------------------------

    def put(self, item: Item, now: float | None = None) -> bool:
        """Take an item for the next commit. False when there is no room; the same key twice is taken once.

        Raises:
            ValueError: SQLite has no integer for the sequence number; it would fail every commit from now on.
        """
        if not 0 <= item.key.seq <= _MAX_SEQ:
            raise ValueError(f"sequence number {item.key.seq}, expected 0 to {_MAX_SEQ}")
        if item.key in self._waiting:
            return True
        size = len(item.payload)
        if not self._make_room(item.priority, size):
            return False
        self._wait(item.key, _Waiting(size, item.model, item.priority, now))
        self._new[item.key] = item
        self._new_bytes += size
        if self._hold is not None:
            self._plan(item.key, 0.0)
            if len(self._new) >= self._hold.max_items or self._new_bytes >= self._hold.max_bytes:
                self.commit()
        return True

    def room(self) -> int:
        """How many more items fit, if their bytes do and nothing makes way."""
        return self._limits.max_items - len(self._waiting)

    def settle(self, key: Key, outcome: str) -> bool:
        """Let an item go with the next commit; `outcome` is the counter that it moves to. False when it is not here."""
        if not self._may_be_known(key):
            return False
        self._leave(key, outcome)
        return True

    def quarantine(self, key: Key, refusal: Refusal) -> bool:
        """Set an item aside with the next commit: nobody will ever take it. False when it is not here."""
        if not self._may_be_known(key):
            return False
        if key in self._new:
            self._set_aside.append((self._new[key], refusal))
        else:
            self._refused.append((key, refusal))
        self._leave(key, "quarantined")
        return True

    def refuse(self, item: Item, refusal: Refusal) -> None:
        """Account for an item that cannot even wait: accepted and quarantined with the next commit."""
        self._set_aside.append((item, refusal))
        self.count(item.key.device, "accepted")
        self.count(item.key.device, "quarantined")

    def count(self, device: str, name: str, by: int = 1) -> None:
        """Move a counter with the next commit."""
        self._counts[device, name] += by

    @property
    def is_dirty(self) -> bool:
        """Something waits for `commit`."""
        return bool(self._new or self._leaving or self._counts)

    def commit_due(self, now: float, *, is_connected: bool) -> None:
        """Commit, unless what changed may still be held."""
        if self._hold is None or not is_connected:
            self.commit()
        elif self.is_dirty:
            self._dirty_at = now if self._dirty_at is None else self._dirty_at
            if now - self._dirty_at >= self._hold.max_s:
                self.commit()

    def commit(self) -> list[Key]:
        """Make all of it durable in one transaction; return the keys that are accepted now."""
        if not self.is_dirty:
            return []
        # A copy: a commit that fails is tried again and must not count twice.
        counts = self._counts.copy()
        for key in self._new:
            counts[key.device, "accepted"] += 1
        self._store.apply(Change(self._leaving, self._refused, self._set_aside, self._new.values(), counts))
        accepted = list(self._new)
        if self._hold is None:
            for key in accepted:
                self._plan(key, 0.0)
        self._new, self._new_bytes = {}, 0
        self._leaving, self._refused, self._set_aside = [], [], []
        self._counts.clear()
        self._dirty_at = None
        return accepted

    # -- out ---------------------------------------------------------------------------------------------------------

    def take(self, now: float, limit: int, retry_after_s: float, lane: str = "") -> list[tuple[Item, int]]:
        """Up to `limit` due items of a lane with the number of earlier attempts, oldest first.

        Each is due again after `retry_after_s`, unless it is settled before.
        """
        taken: list[tuple[Item, int]] = []
        while len(taken) < limit:
            due = self._schedule.next_due(lane)
            if due is None or due > now:
                break
            key = self._schedule.pop(lane)
            waiting = self._waiting[key]
            taken.append((Item(key, waiting.model, self._payload(key), waiting.priority), waiting.attempts))
            waiting.attempts += 1
            self._plan(key, now + retry_after_s)
        return taken

    def next_due(self, lane: str = "") -> float | None:
        """When `take` has something next; None when nothing waits."""
        return self._schedule.next_due(lane)

    def make_due(self, keys: Iterable[Key], when: float) -> None:
        """Have these again at `when`: they were not sent after all, or the peer asked for patience."""
        for key in keys:
            if self._may_be_known(key):
                self._plan(key, when)

    def put_at(self, key: Key) -> float | None:
        """The `now` of its `put`; None for what is not here, or was put by a process before this one."""
        waiting = self._waiting.get(key)
        return None if waiting is None else waiting.put_at

    # -- numbers -------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Accepted and not yet settled, of all devices."""
        return len(self._waiting) - len(self._new)

    @property
    def owed(self) -> int:
        """The same, with what is not accepted yet."""
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def counters(self, device: str | None = None) -> Counter[str]:
        """Counters as committed: of one device, or the sum of all."""
        return self._store.counters(device)

    def waiting_keys(self, device: str | None = None) -> list[Key]:
        """Accepted and not yet settled."""
        return [key for key in self._waiting if key not in self._new and (device is None or key.device == device)]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        for key, model, size, priority in self._store.items():
            # One attempt is assumed: what waits in a store just opened may have been sent before the crash.
            self._wait(key, _Waiting(size, model, priority, put_at=None, attempts=1))
            self._plan(key, 0.0)

    def _wait(self, key: Key, waiting: _Waiting) -> None:
        self._waiting[key] = waiting
        self._bytes += waiting.size_bytes
        self._ranks.add(key, waiting.priority, waiting.size_bytes)

    def _leave(self, key: Key, outcome: str) -> None:
        waiting = self._waiting.pop(key)
        self._bytes -= waiting.size_bytes
        self._ranks.remove(key, waiting.priority)
        self._schedule.cancel(key)
        if self._new.pop(key, None) is None:
            self._leaving.append(key)
        else:
            self._new_bytes -= waiting.size_bytes
            self.count(key.device, "accepted")
        self.count(key.device, outcome)

    def _make_room(self, priority: Priority, size_bytes: int) -> bool:
        items = 1 - self.room()
        excess = self._bytes + size_bytes - self._limits.max_bytes
        if items <= 0 and excess <= 0:
            return True
        victims = self._ranks.victims(priority, items, excess)
        for key in victims:
            self._leave(key, "dropped.displaced")
        return bool(victims)

    def _may_be_known(self, key: Key) -> bool:
        """Whether the peer can have heard of it."""
        return key in self._waiting and (self._hold is not None or key not in self._new)

    def _plan(self, key: Key, when: float) -> None:
        self._schedule.plan(key, self._lane_of(key), when)

    def _payload(self, key: Key) -> bytes:
        item = self._new.get(key)
        return self._store.payload(key) if item is None else item.payload


def group_by_model(taken: Sequence[tuple[Item, int]]) -> dict[tuple[str, bytes, str, bool], list[Item]]:
    """Group taken items into what fits one request: one device, epoch and model, fresh apart from replayed."""
    groups: dict[tuple[str, bytes, str, bool], list[Item]] = {}
    for item, attempts in taken:
        groups.setdefault((item.key.device, item.key.epoch, item.model, attempts > 0), []).append(item)
    return groups
