"""What this machine takes for a model and for a request, measured with the gateway's own code."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gateway.cache import CacheConfig
from edge_gateway.engine import Outputs
from edge_gateway.inference import Job, ServedModel
from edge_gateway.lanes import SLOW_S, LaneConfig, warm_up
from edge_gateway.rehearsal import SITE, Rehearsal, packet_of
from edge_gateway.replay import Costs
from edge_gateway.requests import OpenRequest, Row, parse_rows
from shoal.codec import MAX_ROW_BYTES, MAX_ROWS
from shoal.routes import Address, Route
from shoal.tensors import to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import SensorData

LARGEST_BATCH = 64
# Larger batches of a model that is slower would keep a device waiting for longer than it has patience.
_LONGEST_CALL_S = 0.25
_MIN_ROUNDS = 5
_MAX_ROUNDS = 300
_TOGETHER = 16
_SEED = 1
_ELEMENTS: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 4: np.dtype(np.float32), 8: np.dtype(np.float64)}

_Cell = tuple[int, int]


def element_of(row_bytes: float, values: int) -> np.dtype[Any]:
    """Which element type a row of so many bytes has, to judge by its length alone."""
    size = min(_ELEMENTS, key=lambda size: abs(math.log(max(1.0, row_bytes) / (size * values))))
    return _ELEMENTS[size]


def measure(served: ServedModel, cores: int, seconds: float, *, element: np.dtype[Any]) -> Costs:
    """Measure for about so long; each cost is a median over rounds in which all take turns.

    Raises:
        ModelError: the model cannot be run.
    """
    rows = [row for index in range(LARGEST_BATCH) for row in _rows(served, element, index)]
    sizes = _sizes(served, rows)
    is_slow = warm_up(served, sizes[-1]) > SLOW_S
    # A fast model runs in the loop's own thread, however many workers there are.
    cells = [(workers, size) for workers in range(1, cores + 1 if is_slow else 2) for size in sizes]
    took: defaultdict[_Cell, list[float]] = defaultdict(list)
    with ThreadPoolExecutor(cores) as workers:

        def call_all() -> None:
            for cell in cells:
                took[cell] += _call(workers, served, rows, cell)

        _repeat(seconds / 2, call_all)
    return Costs(
        {cell: statistics.median(each) for cell, each in took.items()}, *_overhead(served, element, seconds / 2)
    )


def _sizes(served: ServedModel, rows: list[Row]) -> list[int]:
    sizes = []
    size = 1
    while size <= LARGEST_BATCH:
        sizes.append(size)
        if _timed(Job(served, rows[:size]).run) > _LONGEST_CALL_S:
            break
        size *= 2
    return sizes


def _call(workers: ThreadPoolExecutor, served: ServedModel, rows: list[Row], cell: _Cell) -> list[float]:
    """The seconds of one call on each of so many threads at once."""
    count, size = cell
    jobs = [Job(served, rows[:size]) for _ in range(count)]
    took = [_timed(jobs[0].run)] if count == 1 else list(workers.map(lambda job: _timed(job.run), jobs))
    for outcome in jobs[0].outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return took


def _overhead(served: ServedModel, element: np.dtype[Any], seconds: float) -> tuple[float, float, float]:
    """Of a round, a request and a row: three different asks of a model that takes no time, solved for the three."""
    nothing = ServedModel(served.spec, served.spec.artefacts[0], _Nothing())
    together = max(1, min(_TOGETHER, MAX_ROWS, MAX_ROW_BYTES // (2 * served.values * element.itemsize)))
    asks = {
        "one": [packet_of(_request(served, element, 0))],
        "requests": [packet_of(_request(served, element, index)) for index in range(_TOGETHER)],
        "rows": [packet_of(_request(served, element, 0, together))],
    }
    took: defaultdict[str, list[float]] = defaultdict(list)
    config = LaneConfig(max_batch_size=_TOGETHER, cache=CacheConfig(max_bytes=0))
    with Rehearsal(served.spec.model, nothing, config) as rehearsal:
        inference_s = rehearsal.gateway.lanes.histograms.inference_s

        def ask_all() -> None:
            for name, packets in asks.items():
                before_s = inference_s.sum
                all_s = _timed(lambda: rehearsal.ask(packets))  # noqa: B023  called at once
                took[name].append(all_s - (inference_s.sum - before_s))

        _repeat(seconds, ask_all)
    one, requests, many = (statistics.median(took[name]) for name in asks)
    each_s = max(0.0, (requests - one) / (_TOGETHER - 1))
    row_s = min(each_s, max(0.0, (many - one) / (together - 1))) if together > 1 else 0.0
    return max(0.0, one - each_s), each_s - row_s, row_s


class _Nothing:
    """A model that takes no time."""

    def run_all(self, inputs: NDArray[np.float32]) -> Outputs:
        return [np.zeros((len(inputs), 2), np.float32)]


def _rows(served: ServedModel, element: np.dtype[Any], index: int) -> list[Row]:
    request = _request(served, element, index)
    opened = OpenRequest(request, Address(Route.INFER, site=SITE, node=request.device), 0.0, lambda _: None)
    return parse_rows(opened, request, served.values, size_bytes=0)


def _request(served: ServedModel, element: np.dtype[Any], index: int, rows: int = 1) -> pb.InferenceRequest:
    values = np.random.default_rng(_SEED + index).integers(0, 256, served.shape).astype(element)
    tensor = to_tensor(values)
    return pb.InferenceRequest(
        device=f"d{index}",
        epoch=bytes(16),
        model=served.spec.model,
        rows=[
            pb.InferenceRow(reading=SensorData(seq=seq + 1, tensor=tensor), reason=pb.ASK_REASON_SCORE)
            for seq in range(rows)
        ],
    )


def _repeat(seconds: float, act: Callable[[], object]) -> None:
    act()
    ends_at = time.monotonic() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.monotonic() < ends_at):
        act()
        rounds += 1


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
