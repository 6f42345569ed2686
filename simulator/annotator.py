"""A person who labels samples, simulated: the labels come from the data set and arrive after a delay."""

import enum
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Labels(Protocol):
    """Where the truth about a reference is looked up."""

    def label_of(self, reference: str) -> int: ...
    def is_held_out(self, reference: str) -> bool: ...


class Seen(enum.Enum):
    """What becomes of a sample that was shown to the annotator."""

    QUEUED = "queued"
    HELD_OUT = "held out"
    KNOWN = "known"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Labelled(Generic[K]):
    """The label of one sample: the class, or 1 for an anomaly."""

    key: K
    label: int


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[K]):
    key: K
    label: int
    due_at_s: float


class Annotator(Generic[K]):
    """Labels each key once, `delay_s` after seeing it. Never reads a clock, never labels what is held out.

    Keys are remembered after they were labelled, the newest `max_known` of them; one that is shown again after more
    than that is labelled again.
    """

    def __init__(
        self, delay_s: float, labels: Labels, *, max_per_call: int = 32, max_queued: int = 4096, max_known: int = 65536
    ) -> None:
        """Store the limits.

        Args:
            delay_s: between seeing a sample and its label, as a person needs it.
            labels: the truth.
            max_per_call: labels that one call of `due` returns at most, which bounds the pace.
            max_queued: samples that wait at most; more are turned away.
            max_known: keys remembered at most, no fewer than `max_queued`.
        """
        if delay_s < 0 or min(max_per_call, max_queued) < 1 or max_known < max_queued:
            raise ValueError(
                f"{delay_s=} {max_per_call=} {max_queued=} {max_known=}, expected 0, 1, 1, the same or more"
            )
        self._delay_s = delay_s
        self._labels = labels
        self._max_per_call = max_per_call
        self._max_queued = max_queued
        self._max_known = max_known
        self._queue: deque[_Waiting[K]] = deque()
        self._known: dict[K, None] = {}

    @property
    def queued(self) -> int:
        return len(self._queue)

    def see(self, key: K, reference: str, now: float) -> Seen:
        """Look at a sample. One that was turned away as FULL may be shown again later.

        Raises:
            PayloadError: the reference names nothing that can be looked up.
        """
        if self._labels.is_held_out(reference):
            return Seen.HELD_OUT
        if key in self._known:
            return Seen.KNOWN
        if len(self._queue) >= self._max_queued:
            return Seen.FULL
        self._queue.append(_Waiting(key, self._labels.label_of(reference), now + self._delay_s))
        self._remember(key)
        return Seen.QUEUED

    def due(self, now: float) -> list[Labelled[K]]:
        """Return labels whose delay has passed, oldest first."""
        ready: list[Labelled[K]] = []
        while self._queue and self._queue[0].due_at_s <= now and len(ready) < self._max_per_call:
            waiting = self._queue.popleft()
            ready.append(Labelled(waiting.key, waiting.label))
        return ready

    def _remember(self, key: K) -> None:
        self._known[key] = None
        if len(self._known) > self._max_known:
            del self._known[next(iter(self._known))]
