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
    rows: list[T]
    left: Left


class Batcher(Generic[T]):
    """Group rows for one model call. Never reads a clock, never blocks.

    A batch leaves when it holds `max_rows`; when its first row has waited `max_delay_s`; and, where `max_delay_s` is 0,
    as soon as the socket is drained. Replays leave when nothing fresh waits, or to fill a batch that leaves anyway.
    """

    def __init__(self, max_rows: int, max_delay_s: float = 0.0, max_waiting: int = 4096) -> None:
        if max_rows < 1 or max_delay_s < 0 or max_waiting < max_rows:
            raise ValueError(f"max_rows {max_rows}, max_delay_s {max_delay_s}, max_waiting {max_waiting}")
        self.max_rows = max_rows
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._fresh: deque[tuple[float, T]] = deque()
        self._replays: deque[tuple[float, T]] = deque()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._replays)

    def has_room(self, rows: int) -> bool:
        return len(self) + rows <= self._max_waiting

    def add(self, row: T, now: float, *, replay: bool = False) -> None:
        """Let a row wait.

        Raises:
            ValueError: there is no room; ask `has_room` first.
        """
        if not self.has_room(1):
            raise ValueError(f"{len(self)} rows wait already")
        (self._replays if replay else self._fresh).append((now, row))

    def take(self, now: float, *, drained: bool) -> Batch[T] | None:
        """The next batch that may leave; call until None."""
        if not len(self):
            return None
        if len(self) >= self.max_rows:
            left = Left.FULL
        elif drained and self._max_delay_s == 0:
            left = Left.DRAINED
        elif self._max_delay_s and now >= self._first_at() + self._max_delay_s:
            left = Left.WAITED
        else:
            return None
        rows: list[T] = []
        for queue in (self._fresh, self._replays):
            while queue and len(rows) < self.max_rows:
                rows.append(queue.popleft()[1])
        return Batch(rows, left)

    def due_at(self) -> float | None:
        """When a batch will have waited long enough; None when nothing waits."""
        return self._first_at() + self._max_delay_s if len(self) else None

    def _first_at(self) -> float:
        return min(queue[0][0] for queue in (self._fresh, self._replays) if queue)
