"""How much faster, how much worse, and how sure one can be of it.

Needs numpy alone, for the environment of tflite-runtime holds little more. Calls take turns within a round, so that a
slow moment of the machine hits all of them, and what is compared is compared within its round.
"""

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_COVERAGE = 95.0
_RESAMPLES = 1000
_MAX_REPEATS = 2000
_ZSTD_LEVEL = "-19"


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the 95 % percentile bootstrap interval round it."""

    value: float
    low: float
    high: float


def interleave(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    repeats: Sequence[int],
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> NDArray[np.float64]:
    """Time calls in turns, after one of each to warm up: nanoseconds of one call, (rounds, calls).

    Another one begins each round.

    Args:
        calls: what to time.
        rounds: how often each gets its turn.
        repeats: calls of one turn, for each.
        clock_ns: any clock.
    """
    for call in calls:
        call()
    taken = np.zeros((rounds, len(calls)))
    for number in range(rounds):
        for place in range(len(calls)):
            index = (number + place) % len(calls)
            started = clock_ns()
            for _ in range(repeats[index]):
                calls[index]()
            taken[number, index] = (clock_ns() - started) / repeats[index]
    return taken


def repeats_for(
    calls: Sequence[Callable[[], object]], turn_s: float, clock_ns: Callable[[], int] = time.perf_counter_ns
) -> list[int]:
    """Return for each call how many fill a turn; at least 1."""
    repeats = []
    for call in calls:
        call()
        started = clock_ns()
        call()
        repeats.append(min(_MAX_REPEATS, math.ceil(turn_s * 1e9 / max(1, clock_ns() - started))))
    return repeats


def speed_ratio(base_ns: NDArray[np.float64], other_ns: NDArray[np.float64], seed: int) -> Interval:
    """Return how many times faster the other call is: the median of the rounds' ratios; both are (rounds,)."""
    ratios = base_ns / other_ns
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    return _interval(float(np.median(ratios)), np.median(ratios[drawn], axis=1))


def metric_interval(
    metric: Callable[[NDArray[np.int64]], float], rows: int, seed: int, resamples: int = _RESAMPLES
) -> Interval:
    """Return a metric and its interval over rows.

    Args:
        metric: of the rows with these numbers, which may repeat. A difference of two models on the same rows is one
            too, and its interval is narrower than theirs.
        rows: how many there are.
        seed: of the draw.
        resamples: how many draws.
    """
    rng = np.random.default_rng(seed)
    return _interval(
        metric(np.arange(rows)), np.array([metric(rng.integers(rows, size=rows)) for _ in range(resamples)])
    )


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    outside = (100 - _COVERAGE) / 2
    low, high = np.percentile(resampled, [outside, 100 - outside])
    return Interval(value, float(low), float(high))


def zstd_bytes(content: bytes) -> int | None:
    """Return how many bytes zstd makes of it at its level 19; None where the program `zstd` is not installed."""
    program = shutil.which("zstd")
    if program is None:
        return None
    command = [program, _ZSTD_LEVEL, "--stdout"]
    packed = subprocess.run(command, input=content, capture_output=True, check=True)  # noqa: S603 - no shell, our words
    return len(packed.stdout)
