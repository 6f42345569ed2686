"""Rows wait here for company; a batch leaves for a reason that is counted."""

from collections import deque
from dataclasses import dataclass
from enum import Enum, unique
from typing import Generic, TypeVar

T = TypeVar("T")


@unique
class Left(Enum):
    """Why a batch left; the value is the counter's name."""

    FULL = "batches.full"
    DRAINED = "batches.drained"
    WAITED = "batches.waited"


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Rows for one model call; the first of them has waited since `since`."""

    rows: list[T]
    left: Left
    since: float


class Turns(Generic[T]):
    """Queues of many owners that give one row each in turn: who sends ten times as much waits ten times as long."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[float, T]]] = {}
        self._turns: deque[str] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def waiting(self, owner: str) -> int:
        queue = self._queues.get(owner)
        return 0 if queue is None else len(queue)

    def add(self, owner: str, row: T, now: float) -> None:
        queue = self._queues.get(owner)
        if queue is None:
            queue = self._queues[owner] = deque()
            self._turns.append(owner)
        queue.append((now, row))
        self._count += 1

    def pop(self) -> tuple[float, T]:
        owner = self._turns.popleft()
        queue = self._queues[owner]
        taken = queue.popleft()
        self._count -= 1
        if queue:
            self._turns.append(owner)
        else:
            del self._queues[owner]
        return taken

    def first_at(self) -> float:
        """When the row came that has waited longest; there is one."""
        return min(queue[0][0] for queue in self._queues.values())


class Batcher(Generic[T]):
    """Group rows for one model call. Never reads a clock, never blocks.

    A batch leaves when it holds `max_rows`; when its first row has waited `max_delay_s`; and, where `max_delay_s` is 0,
    as soon as the socket is drained. Owners take turns, row by row. Replays leave when nothing fresh waits, or to fill
    a batch that leaves anyway.

    Args:
        max_waiting: rows of all owners together.
        max_waiting_per_owner: an owner who has so many waiting gets no more in.
    """

    def __init__(
        self, max_rows: int, max_delay_s: float = 0.0, max_waiting: int = 4096, max_waiting_per_owner: int = 4096
    ) -> None:
        if max_rows < 1 or max_delay_s < 0 or max_waiting < max_rows or max_waiting_per_owner < 1:
            raise ValueError(
                f"max_rows {max_rows}, max_delay_s {max_delay_s}, max_waiting {max_waiting}, "
                f"max_waiting_per_owner {max_waiting_per_owner}"
            )
        self.max_rows = max_rows
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._max_waiting_per_owner = max_waiting_per_owner
        self._fresh: Turns[T] = Turns()
        self._replays: Turns[T] = Turns()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    @property
    def is_full(self) -> bool:
        """Fresh rows fill a batch."""
        return len(self._fresh) >= self.max_rows

    def has_room(self, owner: str, rows: int) -> bool:
        """Whether so many rows of this owner may come in together."""
        if self._waiting + rows > self._max_waiting:
            return False
        return self._fresh.waiting(owner) + self._replays.waiting(owner) < self._max_waiting_per_owner

    def add(self, owner: str, row: T, now: float, *, replay: bool = False) -> None:
        """Let a row wait.

        Raises:
            ValueError: there is no room; ask `has_room` first.
        """
        if self._waiting >= self._max_waiting:
            raise ValueError(f"{self._waiting} rows wait already")
        self._waiting += 1
        (self._replays if replay else self._fresh).add(owner, row, now)

    def take(self, now: float, *, drained: bool) -> Batch[T] | None:
        """The next batch that may leave; call until None."""
        if not self._waiting:
            return None
        if self._waiting >= self.max_rows:
            left = Left.FULL
        elif drained and self._max_delay_s == 0:
            left = Left.DRAINED
        elif self._max_delay_s and now >= self._first_at() + self._max_delay_s:
            left = Left.WAITED
        else:
            return None
        taken: list[tuple[float, T]] = []
        for queue in (self._fresh, self._replays):
            while queue and len(taken) < self.max_rows:
                taken.append(queue.pop())
        self._waiting -= len(taken)
        return Batch([row for _, row in taken], left, min(at for at, _ in taken))

    def due_at(self) -> float | None:
        """When a batch will have waited long enough; None when nothing waits."""
        return self._first_at() + self._max_delay_s if self._waiting else None

    def _first_at(self) -> float:
        return min(queue.first_at() for queue in (self._fresh, self._replays) if queue)
