"""The scorer of the Numenta Anomaly Benchmark (NAB), standard profile, in numpy. Pure.

Labels are windows of rows; alarms are rows. Each window counts once, at its best alarm: 1 at its first row, falling along a
sigmoid to about 0 at its last; a window without an alarm costs 1. An alarm outside of all windows costs up to 0.11: next to
nothing just behind a window, all of it from about a window's length on. The first rows of a series are its probation, for
learning: what is alarmed there counts neither way. The sum over all series is scaled so that silence is 0 and an alarm at
the first row of every window, and nowhere else, is 100.

Source: Lavin and Ahmad, "Evaluating real-time anomaly detection algorithms - the Numenta Anomaly Benchmark", 2015,
section II; the details that the paper leaves open (which rows are the edges, the length of probation) are those that
reproduce the scores published for NAB's own detectors, see tests/benchmarks/test_nab_score.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALSE_ALARM = 0.11
_STEEPNESS = 5.0
_FAR = 3.0  # window lengths behind a window, from where on an alarm has nothing to do with it
_PROBATION_SHARE = 0.15
_PROBATION_OF_ROWS = 5000


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of one series.

    Attributes:
        rows: in the series, probation included.
        windows: (first row, last row) of each, both inside, in order and apart.
    """

    rows: int
    windows: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        edges = [row for window in self.windows for row in window]
        if edges != sorted(edges) or (edges and not 0 <= edges[0] <= edges[-1] < self.rows):
            raise ValueError(f"windows {self.windows} of {self.rows} rows must be in order and inside")

    @property
    def probation(self) -> int:
        """How many rows are for learning: 15 % of the series, at most 15 % of 5000."""
        return math.floor(min(_PROBATION_SHARE * self.rows, _PROBATION_SHARE * _PROBATION_OF_ROWS))


def row_scores(labels: Labels) -> NDArray[np.float64]:
    """Return what an alarm at each row earns, (rows,): above 0 inside windows, at most 0 outside."""
    at = np.arange(labels.rows, dtype=np.float64)
    scores = np.full(labels.rows, -FALSE_ALARM)
    ends = [first for first, _ in labels.windows[1:]] + [labels.rows]
    for (first, last), end in zip(labels.windows, ends, strict=False):
        length = last - first + 1
        inside, behind = slice(first, last + 1), slice(last + 1, end)
        scores[inside] = _sigmoid((at[inside] - last - 1) / length) / _sigmoid(np.array(-1.0))
        if length > 1:  # a window of one row has no length to be behind by
            scores[behind] = FALSE_ALARM * _sigmoid((at[behind] - last) / (length - 1))
    return scores


def _sigmoid(position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearly 1 at a window's first row (-1), 0 at its right edge, -1 far behind it."""
    return np.where(position >= _FAR, -1.0, 2.0 / (1.0 + np.exp(_STEEPNESS * np.minimum(position, _FAR))) - 1.0)


class Judge:
    """Scores alarms on one series. Never sees a reading."""

    def __init__(self, labels: Labels) -> None:
        self._earned = row_scores(labels)
        self._probation = labels.probation
        # NAB knows no window that lies in probation as a whole.
        self._windows = [window for window in labels.windows if window[1] >= labels.probation]

    @property
    def windows(self) -> int:
        """How many windows count."""
        return len(self._windows)

    def raw(self, alarms: NDArray[np.int64]) -> float:
        """Return the raw score of alarms, given as rows in order: +1 at most for each window, -1 for each missed."""
        found, false_alarms = self.tell(alarms)
        return sum(self._earned[row] if row is not None else -1.0 for row in found) + float(
            self._earned[false_alarms].sum()
        )

    def tell(self, alarms: NDArray[np.int64]) -> tuple[list[int | None], NDArray[np.int64]]:
        """Return the alarm that counts in each window, None where there is none, and the rows of false alarms."""
        alarms = alarms[alarms >= self._probation]
        found: list[int | None] = []
        outside = np.ones(len(alarms), dtype=np.bool_)
        for first, last in self._windows:
            begin, end = np.searchsorted(alarms, (first, last + 1))
            outside[begin:end] = False
            # What an alarm earns falls along a window: the best is the first.
            found.append(int(alarms[begin]) if begin < end else None)
        return found, alarms[outside]


def scaled(raw: float, windows: int) -> float:
    """Scale a raw score of several series: silence earns -1 a window and is 0, perfection earns +1 and is 100.

    Raises:
        ValueError: there is no window, and nothing to scale by.
    """
    if not windows:
        raise ValueError("a score is scaled by the windows, and there are none")
    return 100.0 * (raw + windows) / (2.0 * windows)


def alarm_rows(scores: NDArray[np.float64], threshold: float, start: int = 0, dead_time: int = 0) -> NDArray[np.int64]:
    """Return the rows from `start` on whose score is at least the threshold, none within `dead_time` rows of the one before."""
    above = start + np.flatnonzero(scores[start:] >= threshold)
    if not dead_time:
        return above
    rows, place = [], 0
    while place < len(above):
        rows.append(above[place])
        place = int(np.searchsorted(above, above[place] + dead_time, side="right"))
    return np.array(rows, dtype=np.int64)


def leave_one_out(raw: NDArray[np.float64]) -> NDArray[np.int64]:
    """Choose each series' threshold by the other series.

    Args:
        raw: (series, threshold), raw scores.

    Returns:
        (series,), the place of the threshold at which the others together score highest.
    """
    return np.asarray(np.argmax(raw.sum(0) - raw, axis=1), dtype=np.int64)


def bootstrap(
    raw: Sequence[float], windows: Sequence[int], rng: np.random.Generator, draws: int = 4000
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the scaled score over series drawn with replacement."""
    earned, counts = np.asarray(raw, dtype=np.float64), np.asarray(windows, dtype=np.float64)
    picks = rng.integers(len(earned), size=(draws, len(earned)))
    total, held = earned[picks].sum(1), counts[picks].sum(1)
    scores = 100.0 * (total + held)[held > 0] / (2.0 * held[held > 0])
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
