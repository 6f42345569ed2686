"""The models of a gateway: rows wait in a lane for each, leave in batches, and come back with their outcome.

A fast model runs in the caller's thread, because handing over costs more than it takes. A slow one (`SLOW_S`) runs on
worker threads that share its session, so that the loop keeps draining its sockets; rows gather in the lane until a
worker is free. A swap of models happens between batches: rows under way finish on the release they started with.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from edge_gateway.batcher import Batcher
from edge_gateway.cache import AnswerCache, CacheConfig
from edge_gateway.histogram import ROWS, SECONDS, Histogram
from edge_gateway.inference import BeyondScaleError, Job, Outcome, Scored, ServedModel
from edge_gateway.requests import OpenRequest, Row, parse_rows
from shoal.errors import ModelError
from shoal.v1 import inference_pb2 as pb

# As many rows as all queues of a model hold.
MAX_BATCH_SIZE = 4096
# Longer calls would keep the sockets waiting for more than a round trip takes.
SLOW_S = 0.003
# What a swap may cost the requests that wait meanwhile.
_WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class LaneConfig:
    """Bounds of each model's lane.

    Attributes:
        max_batch_size: rows of one model call.
        max_delay_s: how long a first row may wait for company; 0 runs whatever the socket has drained.
        max_waiting: rows that wait, of all devices.
        max_waiting_per_device: a device that has so many waiting gets no more in.
        workers: threads for slow models.
    """

    max_batch_size: int = 32
    max_delay_s: float = 0.0
    max_waiting: int = MAX_BATCH_SIZE
    max_waiting_per_device: int = 64
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    cache: CacheConfig = field(default_factory=CacheConfig)


# A row, the release that had it, and what came of it.
Settled = tuple[Row, ServedModel, Outcome]


@dataclass(slots=True)
class _Lane:
    batcher: Batcher[Row]
    served: ServedModel | None = None
    is_slow: bool = False
    running: int = 0


@dataclass(frozen=True, slots=True)
class Histograms:
    """Where the time goes: rows of a batch; seconds in the lane, in the model, and from question to answer."""

    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    queue_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inference_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))


class Lanes:
    """All models of one gateway.

    Args:
        wake: makes the loop call `finished` soon; called by worker threads.
    """

    def __init__(
        self,
        models: Sequence[str],
        config: LaneConfig,
        counters: Counter[str],
        *,
        wake: Callable[[], None],
    ) -> None:
        self.histograms = Histograms()
        self._config = config
        self._counters = counters
        self._wake = wake
        self._cache = AnswerCache(config.cache, counters)
        self._known: list[Settled] = []
        self._lanes = {
            model: _Lane(
                Batcher(config.max_batch_size, config.max_delay_s, config.max_waiting, config.max_waiting_per_device)
            )
            for model in models
        }
        # Threads start when a slow model has its first batch.
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="inference")
        self._done: SimpleQueue[tuple[_Lane, Job, Future[float]]] = SimpleQueue()

    def serve(self, model: str, served: ServedModel) -> None:
        """Answer with this release from the next batch on.

        Raises:
            ModelError: it fails on zeros.
        """
        took_s = warm_up(served, self._config.max_batch_size)
        lane = self._lanes[model]
        lane.served, lane.is_slow = served, took_s > SLOW_S

    def end(self, model: str) -> None:
        """Serve this model no more; what waits for it is answered NOT_FOUND."""
        self._lanes[model].served = None

    def served(self, model: str) -> ServedModel | None:
        """The release that answers, if one does."""
        return self._lanes[model].served

    def admit(self, opened: OpenRequest, request: pb.InferenceRequest, size_bytes: int) -> None:
        """Let a request's rows wait, or refuse them."""
        lane = self._lanes.get(opened.model)
        if lane is None or lane.served is None:
            opened.refuse_all(pb.STATUS_NOT_FOUND, _not_served(opened.model), "model")
        elif not lane.batcher.has_room(opened.device, opened.unanswered):
            opened.refuse_all(pb.STATUS_RESOURCE_EXHAUSTED, f"{len(lane.batcher)} rows wait already", "rows")
        else:
            served = lane.served
            # Before they wait, so that what is known needs no place in a batch.
            hits, misses = self._cache.split(
                served.digest, parse_rows(opened, request, served.values, size_bytes=size_bytes)
            )
            self._known += [(row, served, scored._replace(from_cache=True)) for row, scored in hits]
            for row in misses:
                lane.batcher.add(opened.device, row, opened.arrived, replay=request.replay)

    def run(self, now: float, *, is_behind: bool = False) -> Iterator[list[Settled]]:
        """Run every batch that may leave now; yields what is answered: first from the cache and by workers since.

        With `is_behind` each lane runs one: among the questions that are still packed may be some that go first.
        """
        known, self._known = self._known, []
        yield known + self._finished()
        for lane in self._lanes.values():
            while self._is_free(lane):
                batch = lane.batcher.take(now, drained=True)
                if batch is None:
                    break
                self._counters[batch.left.value] += 1
                self.histograms.queue_s.observe(now - batch.since)
                yield self._start(lane, batch.rows, now)
                if is_behind:
                    break

    @property
    def is_full(self) -> bool:
        """Fresh rows fill a batch that may leave now: more need not be unpacked before it has."""
        return any(lane.batcher.is_full and self._is_free(lane) for lane in self._lanes.values())

    def due_at(self) -> float | None:
        """When `run` has something to do though no socket says so."""
        dues = [lane.batcher.due_at() for lane in self._lanes.values() if self._is_free(lane)]
        return min((due for due in dues if due is not None), default=None)

    def unserved(self) -> list[str]:
        """The models whose first release has not come yet."""
        return [model for model, lane in self._lanes.items() if lane.served is None]

    def close(self) -> None:
        """End the workers; what they have not finished is asked again."""
        self._workers.shutdown(cancel_futures=True)

    def _is_free(self, lane: _Lane) -> bool:
        return not lane.is_slow or lane.running < self._config.workers

    def _start(self, lane: _Lane, rows: list[Row], now: float) -> list[Settled]:
        served = lane.served
        if served is None:
            for row in rows:
                row.request.refuse(row.place, pb.STATUS_NOT_FOUND, _not_served(row.request.model), "model")
            return []
        rows = [row for row in rows if not self._is_settled(row, served, now)]
        if not rows:
            return []
        self.histograms.batch_rows.observe(len(rows))
        job = Job(served, rows)
        if lane.is_slow:
            lane.running += 1
            self._workers.submit(_timed, job).add_done_callback(lambda future: self._hand_back(lane, job, future))
            return []
        return self._finish(job, _timed(job))

    def _hand_back(self, lane: _Lane, job: Job, future: "Future[float]") -> None:
        if not future.cancelled():
            self._done.put((lane, job, future))
            self._wake()

    def _finished(self) -> list[Settled]:
        settled: list[Settled] = []
        while True:
            try:
                lane, job, future = self._done.get_nowait()
            except Empty:
                return settled
            lane.running -= 1
            settled += self._finish(job, future.result())

    def _finish(self, job: Job, took_s: float) -> list[Settled]:
        self.histograms.inference_s.observe(took_s)
        model, watch = job.model, job.model.watch
        keeps = not self._cache.is_bypassed
        settled: list[Settled] = []
        for row, outcome in zip(job.rows, job.outcomes, strict=True):
            if isinstance(outcome, Scored):
                self._counters["rows.inferred"] += 1
                watch.answered(outcome.score, row.data)
                if keeps:
                    self._cache.put(model.digest, row, outcome)
            elif isinstance(outcome, ModelError | BeyondScaleError):
                self._counters["model_errors"] += 1
                watch.erred(str(outcome))
            settled.append((row, model, outcome))
        return settled

    def _is_settled(self, row: Row, served: ServedModel, now: float) -> bool:
        """Nobody waits for it, or it was unpacked for a release of another shape: answered without the model."""
        if row.request.is_late(now):
            row.request.refuse(row.place, pb.STATUS_DEADLINE_EXCEEDED, "too late to be run", "answer_within_ms")
        elif len(row.data) != served.values * row.dtype.itemsize:
            row.request.refuse(row.place, pb.STATUS_INTERNAL, "the model was replaced while this waited: ask again")
        else:
            return False
        return True


def warm_up(served: ServedModel, max_rows: int) -> float:
    """Run zeros in the batch sizes that will come, as many as time allows; return the seconds of a full batch.

    The smallest and the largest come first; sizes that are left out pay for their first call themselves.

    Raises:
        ModelError: it fails on zeros.
    """
    began = time.monotonic()
    full_s = float("inf")
    for count in (1, max_rows, max_rows, *range(2, max_rows)):
        before = time.monotonic()
        if before - began > _WARM_UP_S and full_s < float("inf"):
            break
        served.runtime.run_all(np.zeros((count, *served.shape), np.float32))
        if count == max_rows:
            full_s = min(full_s, time.monotonic() - before)
    return full_s


def _timed(job: Job) -> float:
    began = time.monotonic()
    job.run()
    return time.monotonic() - began


def _not_served(model: str) -> str:
    return f"model {model!r} is not served here"
