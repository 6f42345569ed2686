"""Which blobs to ask for, and when. Pure: returns what to subscribe to, never touches a link or a clock.

Invariants:
- at most `window` topics are subscribed at any time, each by its exact name: a wildcard loses retained messages;
- a blob is accepted once, and only when its length and its digest are what was announced;
- a blob that the broker does not have goes to the back of the queue, so that it never blocks the others;
- patience is for a broker that is silent: while blobs asked for no later than this one still come, it is on its way,
  and a node that was busy for a while has not waited.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from shoal.release.chunks import digest

# MEASURED on Mosquitto: 16 exact topics at a time lose nothing, and are as fast as one wildcard.
WINDOW = 16
# The longest time between two ticks that counts as waiting. A process that comes round later has left unread what the
# broker sent; asking again would bring all of it twice.
_LONGEST_WAIT_S = 1.0


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
    """One blob: `batch` counts up with each asking; `due` is on the transfer's own clock, which counts waiting."""

    length_bytes: int
    attempts: int = 0
    batch: int = 0
    patience_s: float = 0.0
    due: float = 0.0
    is_bad: bool = False


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
        self._batch = 0
        self._waited_s = 0.0
        self._ticked_at: float | None = None
        self._waiting: dict[bytes, _Want] = {}
        self._asked: dict[bytes, _Want] = {}

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._asked

    @property
    def in_flight(self) -> frozenset[bytes]:
        return frozenset(self._asked)

    def want(self, lengths: Mapping[bytes, int]) -> list[Action]:
        """Ask for these blobs, given with the exact length of each; those wanted already stay as they are."""
        for sha256, length_bytes in lengths.items():
            if sha256 not in self._asked:
                self._waiting.setdefault(sha256, _Want(length_bytes))
        return self._fill()

    def forget(self, digests: Iterable[bytes]) -> list[Action]:
        """Stop asking for these."""
        actions: list[Action] = []
        for sha256 in digests:
            self._waiting.pop(sha256, None)
            if self._asked.pop(sha256, None) is not None:
                actions.append(Unsubscribe(sha256))
        return actions + self._fill()

    def receive(self, sha256: bytes, payload: bytes) -> tuple[bool, list[Action]]:
        """Judge one arrival: whether it is the blob that was asked for, and what to do next."""
        want = self._asked.get(sha256)
        if want is None or not payload:
            # A duplicate, or the publisher clearing the topic.
            return False, []
        if len(payload) != want.length_bytes or digest(payload) != sha256:
            self.counters["blobs_bad"] += 1
            want.is_bad = True
            want.due = min(want.due, self._waited_s + self._delay_s(self._bad_retry_s, want.attempts))
            return False, []
        del self._asked[sha256]
        self.counters["blobs_fetched"] += 1
        self._be_patient_after(want)
        # Half a window at a time: one packet to the broker asks for eight blobs as well as for one.
        return True, [Unsubscribe(sha256), *(self._fill() if 2 * len(self._asked) <= self._window else ())]

    def tick(self, now: float) -> list[Action]:
        """Take back what is overdue and ask again."""
        if self._ticked_at is not None:
            self._waited_s += min(now - self._ticked_at, _LONGEST_WAIT_S)
        self._ticked_at = now
        if self.idle:
            return []
        actions: list[Action] = []
        for sha256 in [item for item, want in self._asked.items() if want.due <= self._waited_s]:
            want = self._asked.pop(sha256)
            want.attempts += 1
            self.counters["blobs_retried"] += 1
            self._waiting[sha256] = want
            actions.append(Unsubscribe(sha256))
        return actions + self._fill()

    def _be_patient_after(self, arrived: _Want) -> None:
        """Brokers send in the order of asking: what was asked for no earlier than this may still be under way."""
        for want in self._asked.values():
            if want.batch >= arrived.batch and not want.is_bad:
                want.due = self._waited_s + want.patience_s

    def _fill(self) -> list[Action]:
        actions: list[Action] = []
        self._batch += 1
        while self._waiting and len(self._asked) < self._window:
            sha256 = next(iter(self._waiting))
            want = self._waiting.pop(sha256)
            want.batch = self._batch
            want.patience_s = self._delay_s(self._timeout_s, want.attempts)
            want.due = self._waited_s + want.patience_s
            want.is_bad = False
            self._asked[sha256] = want
            actions.append(Subscribe(sha256))
        return actions

    def _delay_s(self, base_s: float, attempts: int) -> float:
        """Exponential, with jitter so that a fleet that lost the same chunk does not ask for it at once."""
        return min(self._max_retry_s, base_s * 2.0 ** min(attempts, 16)) * self._rng.uniform(0.75, 1.25)
