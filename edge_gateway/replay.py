"""A recorded trace through the gateway's own batcher, in virtual time. Pure.

Two machines are played. The loop takes what has arrived, then runs what may leave, then replies, and arrivals wait
meanwhile. A slow model's batches run on workers beside it. What each step takes was measured (`costs`). Not played: the
broker, the network, the cache, other models, and workers that take the loop's core.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edge_gateway.batcher import Batcher
from edge_gateway.lanes import SLOW_S, LaneConfig
from edge_gateway.trace import Asked

# Of the trace's length: who needs longer to answer the last request falls behind.
_LAG_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Costs:
    """What a machine takes for a model, in seconds.

    Attributes:
        batch_s: of one call, by (workers that run at once, rows); 1 and each number of workers have the same rows.
        round_s: of the loop, each time that it looks for batches.
        request_s: of one request, from packet to packet, beside its rows and the model.
        row_s: of each of its rows, beside the model.
    """

    batch_s: Mapping[tuple[int, int], float]
    round_s: float = 0.0
    request_s: float = 0.0
    row_s: float = 0.0

    @property
    def sizes(self) -> list[int]:
        return sorted({rows for _, rows in self.batch_s})

    @property
    def workers(self) -> int:
        return max(workers for workers, _ in self.batch_s)

    def is_slow(self, max_batch_size: int) -> bool:
        """Whether the gateway would hand such batches to its workers."""
        return self.call_s(max_batch_size) > SLOW_S

    def call_s(self, rows: int, running: int = 1) -> float:
        """Of a batch of any size up to the largest, on a line between the nearest that were measured."""
        running = min(running, self.workers)
        sizes = self.sizes
        above = next(size for size in sizes if size >= rows)
        high = self.batch_s[running, above]
        if above == rows or above == sizes[0]:
            return high
        below = sizes[sizes.index(above) - 1]
        low = self.batch_s[running, below]
        return low + (high - low) * (rows - below) / (above - below)


@dataclass(frozen=True, slots=True)
class Setting:
    """What can be chosen; `workers` matter to slow models only."""

    max_batch_size: int
    max_delay_s: float = 0.0
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a setting would have done with a trace.

    Attributes:
        latencies_s: of each answered request, from its arrival to its reply.
        utilisation: of the loop or the workers, whichever has more to do.
        refused: requests that found no room.
        keeps_up: nothing was refused, and little was left to do when the trace ended but two more batches.
    """

    setting: Setting
    latencies_s: Sequence[float]
    utilisation: float
    batches: int
    rows: int
    refused: int
    keeps_up: bool

    def quantile_s(self, share: float) -> float:
        """0 where nothing was answered."""
        if not self.latencies_s:
            return 0.0
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Open:
    """A request until its last row is answered."""

    __slots__ = ("at_s", "unanswered")

    def __init__(self, asked: Asked) -> None:
        self.at_s = asked.at_s
        self.unanswered = asked.rows


class _Call(NamedTuple):
    """A batch on a worker; ties end in the order of their start."""

    ends_at: float
    order: int
    rows: list[_Open]


@dataclass(slots=True)
class _Gateway:
    """The state of one replay; `now` is virtual."""

    setting: Setting
    costs: Costs
    batcher: Batcher[_Open]
    is_slow: bool
    now: float = 0.0
    open: int = 0
    refused: int = 0
    batches: int = 0
    rows: int = 0
    loop_s: float = 0.0
    workers_s: float = 0.0
    calls: list[_Call] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    known_s: dict[tuple[int, int], float] = field(default_factory=dict)

    def admit(self, asked: Asked) -> None:
        self._spend(self.costs.request_s + self.costs.row_s * asked.rows)
        if not self.batcher.has_room(asked.device, asked.rows):
            self.refused += 1
            return
        self.open += 1
        request = _Open(asked)
        for _ in range(asked.rows):
            self.batcher.add(asked.device, request, self.now)

    def flush(self) -> None:
        """As `Lanes.run` and the replies after it: all of a round leave together."""
        began = self.now
        self._spend(self.costs.round_s)
        done = self._finished(began)
        while not self.is_slow or len(self.calls) < self.setting.workers:
            batch = self.batcher.take(began, drained=True)
            if batch is None:
                break
            self.batches += 1
            self.rows += len(batch.rows)
            if self.is_slow:
                self._start(batch.rows)
            else:
                self._spend(self._call_s(len(batch.rows), 1))
                done += batch.rows
        for request in done:
            request.unanswered -= 1
            if not request.unanswered:
                self.open -= 1
                self.latencies_s.append(self.now - request.at_s)

    def due_at(self) -> float | None:
        """When there is something to do though nothing arrives."""
        free = not self.is_slow or len(self.calls) < self.setting.workers
        due = self.batcher.due_at() if free else None
        ends = self.calls[0].ends_at if self.calls else None
        return min((at for at in (due, ends) if at is not None), default=None)

    def _start(self, rows: list[_Open]) -> None:
        took = self._call_s(len(rows), len(self.calls) + 1)
        self.workers_s += took
        heapq.heappush(self.calls, _Call(self.now + took, self.batches, rows))

    def _finished(self, now: float) -> list[_Open]:
        done: list[_Open] = []
        while self.calls and self.calls[0].ends_at <= now:
            done += heapq.heappop(self.calls).rows
        return done

    def _call_s(self, rows: int, running: int) -> float:
        if (rows, running) not in self.known_s:
            self.known_s[rows, running] = self.costs.call_s(rows, running)
        return self.known_s[rows, running]

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.loop_s += seconds


def replay(trace: Sequence[Asked], setting: Setting, costs: Costs, *, window: int) -> Replayed:
    """Play a trace of one model.

    At most `window` requests are under way, for the broker keeps to the gateway's receive-maximum; others wait there.
    """
    bounds = LaneConfig()
    batcher: Batcher[_Open] = Batcher(
        setting.max_batch_size, setting.max_delay_s, bounds.max_waiting, bounds.max_waiting_per_device
    )
    gateway = _Gateway(setting, costs, batcher, costs.is_slow(setting.max_batch_size))
    began = trace[0].at_s
    gateway.now = began
    place = 0
    while True:
        arrives = trace[place].at_s if place < len(trace) and gateway.open < window else None
        events = [at for at in (arrives, gateway.due_at()) if at is not None]
        if not events:
            break
        gateway.now = max(gateway.now, min(events))
        while place < len(trace) and trace[place].at_s <= gateway.now and gateway.open < window:
            gateway.admit(trace[place])
            place += 1
        gateway.flush()
    length_s = gateway.now - began
    patience_s = 2 * (setting.max_delay_s + costs.call_s(setting.max_batch_size))
    patience_s += _LAG_SHARE * (trace[-1].at_s - began)
    busy_s = max(gateway.loop_s, gateway.workers_s / setting.workers)
    return Replayed(
        setting,
        gateway.latencies_s,
        busy_s / length_s if length_s else 1.0,
        gateway.batches,
        gateway.rows,
        gateway.refused,
        not gateway.refused and gateway.now - trace[-1].at_s <= patience_s,
    )
