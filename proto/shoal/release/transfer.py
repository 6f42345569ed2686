"""Which blobs to ask for, and when. Pure: returns what to subscribe to, never touches a link or a clock.

Invariants:
- at most `window` topics are subscribed at any time, each by its exact name: a wildcard loses retained messages;
- a blob is accepted once, and only when its length and its digest are what was announced;
- a blob that the broker does not have goes to the back of the queue, so that it never blocks the others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from shoal.release.chunks import digest

# MEASURED on Mosquitto: 16 exact topics at a time lose nothing, and are as fast as one wildcard.
WINDOW = 16


class Chance(Protocol):
    """Where jitter comes from; `random.Random` is one."""

    def uniform(self, a: float, b: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Subscribe:
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    sha256: bytes


Action = Subscribe | Unsubscribe


@dataclass(slots=True)
class _Want:
    length_bytes: int
    attempts: int = 0
    due: float = 0.0


class Transfer:
    """See the module.

    Attributes:
        counters: blobs_fetched, blobs_bad (wrong digest or length), blobs_retried.
    """

    def __init__(
        self,
        rng: Chance,
        counters: Counter[str],
        *,
        window: int = WINDOW,
        timeout_s: float = 5.0,
        bad_retry_s: float = 0.2,
        max_retry_s: float = 60.0,
    ) -> None:
        self.counters = counters
        self._rng = rng
        self._window = window
        self._timeout_s = timeout_s
        self._bad_retry_s = bad_retry_s
        self._max_retry_s = max_retry_s
        self._waiting: dict[bytes, _Want] = {}
        self._asked: dict[bytes, _Want] = {}

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._asked

    @property
    def in_flight(self) -> frozenset[bytes]:
        return frozenset(self._asked)

    def want(self, lengths: Mapping[bytes, int], now: float) -> list[Action]:
        """Ask for these blobs, given with the exact length of each; those wanted already stay as they are."""
        for sha256, length_bytes in lengths.items():
            if sha256 not in self._asked:
                self._waiting.setdefault(sha256, _Want(length_bytes))
        return self._fill(now)

    def forget(self, digests: Iterable[bytes], now: float) -> list[Action]:
        """Stop asking for these."""
        actions: list[Action] = []
        for sha256 in digests:
            self._waiting.pop(sha256, None)
            if self._asked.pop(sha256, None) is not None:
                actions.append(Unsubscribe(sha256))
        return actions + self._fill(now)

    def receive(self, sha256: bytes, payload: bytes, now: float) -> tuple[bool, list[Action]]:
        """Judge one arrival: whether it is the blob that was asked for, and what to do next."""
        want = self._asked.get(sha256)
        if want is None or not payload:
            # A duplicate, or the publisher clearing the topic.
            return False, []
        if len(payload) != want.length_bytes or digest(payload) != sha256:
            self.counters["blobs_bad"] += 1
            want.due = min(want.due, now + self._delay_s(self._bad_retry_s, want.attempts))
            return False, []
        del self._asked[sha256]
        self.counters["blobs_fetched"] += 1
        return True, [Unsubscribe(sha256), *self._fill(now)]

    def tick(self, now: float) -> list[Action]:
        """Take back what is overdue and ask again."""
        actions: list[Action] = []
        for sha256 in [item for item, want in self._asked.items() if want.due <= now]:
            want = self._asked.pop(sha256)
            want.attempts += 1
            self.counters["blobs_retried"] += 1
            self._waiting[sha256] = want
            actions.append(Unsubscribe(sha256))
        return actions + self._fill(now)

    def _fill(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and len(self._asked) < self._window:
            sha256 = next(iter(self._waiting))
            want = self._waiting.pop(sha256)
            want.due = now + self._delay_s(self._timeout_s, want.attempts)
            self._asked[sha256] = want
            actions.append(Subscribe(sha256))
        return actions

    def _delay_s(self, base_s: float, attempts: int) -> float:
        """Exponential, with jitter so that a fleet that lost the same chunk does not ask for it at once."""
        return min(self._max_retry_s, base_s * 2.0 ** min(attempts, 16)) * self._rng.uniform(0.75, 1.25)
