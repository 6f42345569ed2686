"""How unlike its own past a stream of readings is. Pure: a score depends on the readings so far and on nothing else."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CHANNELS = 64
MAX_MEMORY = 65_536

# Readings in a pattern. Each length is four of the one before: its squares are four sums, and no error adds up.
_LENGTHS = (1, 4, 16)
_GROWTH = 4
_LONGEST = _LENGTHS[-1]
# A spread below this part of a channel's own is not believed: a signal that repeats itself exactly would else make its
# first rounding error the greatest anomaly of all.
_LEAST_SPREAD = 0.02
# So many spreads away a reading is an anomaly whatever the number, and its square loses no digit of the others.
_FARTHEST = 1e6
# What is learnt of one value, in deviations: a single wild one must not blind the detector for the rest of its memory.
_MOST_LEARNT = 100.0
# Until so many patterns are remembered, the nearest is far for want of others.
_SETTLE = 40


@dataclass(frozen=True, slots=True)
class NoveltyConfig:
    """What a detector is told of its stream.

    Attributes:
        channels: values in a reading, 1 to 64.
        warm_up: readings that are only learnt, and scored 0. They should show the stream's ordinary life: a period of
            it, if it has one.
        memory: readings that are remembered, and the horizon of all running statistics. More finds rarer repetitions
            and costs time in proportion; 4000 readings are two weeks at 5 minutes.
        learns: False compares all that follows with the warm-up alone, of which the last `memory` readings are
            remembered. For machines whose good state is known and in which a fault lasts: it stays a fault.
    """

    channels: int = 1
    warm_up: int = 300
    memory: int = 4000
    learns: bool = True

    def __post_init__(self) -> None:
        least = _SETTLE + 2 * _LONGEST
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"channels {self.channels} must lie in 1..{MAX_CHANNELS}")
        if self.warm_up < least:
            raise ValueError(f"warm_up {self.warm_up} must be at least {least}")
        if not least <= self.memory <= MAX_MEMORY:
            raise ValueError(f"memory {self.memory} must lie in {least}..{MAX_MEMORY}")


class NoveltyDetector:
    """Scores each reading by how unlike the past the newest 1, 4 and 16 readings are. Never reads a clock or a label.

    Two distances are taken at each length: of the newest readings' mean from its own running mean, and of the newest
    pattern from the most similar one in memory. The first sees what is too high or too low, the second what has never
    been, as a quiet night at noon. Each distance is measured in deviations of its own past, and the score is the mean
    of the six: they err for different reasons, and what most of them see is seldom noise.

    By default all is learnt all the time, anomalies too: a state that stays becomes usual, and what comes again is
    less of an anomaly.

    Source: the second distance is the left discord of Lu et al., "Matrix Profile XXIV: DAMP" (2022), without their
    normalisation of each pattern, which hides a change of level, and without their pruning, which so short a memory
    does not need; a score's running distribution in place of its value is of Lavin and Ahmad, "Evaluating real-time
    anomaly detection algorithms" (2015); the mean of standardised detectors of Aggarwal and Sathe, "Theoretical
    foundations and algorithms for outlier ensembles" (2015).
    """

    def __init__(self, config: NoveltyConfig) -> None:
        self._config = config
        self._first: list[NDArray[np.float64]] = []
        self._centre = np.zeros(config.channels)
        self._spread = np.ones(config.channels)
        self._levels = _Levels(config.channels, config.memory)
        self._patterns: _Patterns | _KnownPatterns = _Patterns(config.channels, config.memory)
        self._usual = _Moments((2 * len(_LENGTHS),), config.memory)
        self._steps = 0

    def update(self, reading: NDArray[np.float64]) -> float:
        """Score a reading, (channel,), then learn it. 0 is as ever; what deserves an alarm lies at 2 to 4 and above.

        Raises:
            ValueError: the shape is not the configuration's, or a value is not finite.
        """
        values = np.array(reading, dtype=np.float64)
        if values.shape != self._centre.shape:
            raise ValueError(f"reading of shape {values.shape}, expected {self._centre.shape}")
        if not np.isfinite(values).all():
            raise ValueError("a reading must be finite")
        if self._steps:
            return self._step(values)
        self._first.append(values)
        if len(self._first) == self._config.warm_up:
            self._begin()
        return 0.0

    def _begin(self) -> None:
        """Fix each channel's unit by the warm-up, then learn the warm-up in that unit."""
        first = np.array(self._first)
        self._first.clear()
        self._centre, spread = first.mean(0), first.std(0)
        # A channel that never moved has no unit of its own: a thousandth of where it stands, or 1 at 0.
        still = np.where(self._centre != 0.0, np.abs(self._centre) * 1e-3, 1.0)
        self._spread = np.where(spread > 1e-9 * np.abs(self._centre), spread, still)
        for values in first:
            self._step(values)
        if not self._config.learns:
            self._patterns = _KnownPatterns(self._scale(first[-self._config.memory :]))
            self._levels.usual.learns = self._usual.learns = False

    def _step(self, values: NDArray[np.float64]) -> float:
        self._steps += 1
        scaled = self._scale(values)
        distances = np.concatenate((self._levels.distances(scaled), self._patterns.distances(scaled)))
        if self._steps < _SETTLE + _LONGEST:
            return 0.0
        return float(np.maximum(self._usual.deviations(distances), 0.0).sum()) / len(distances)

    def _scale(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip((values - self._centre) / self._spread, -_FARTHEST, _FARTHEST)


class _Moments:
    """Running mean and deviation: of all there was, then with a horizon."""

    def __init__(self, shape: tuple[int, ...], horizon: int) -> None:
        self._mean = np.zeros(shape)
        self._variance = np.zeros(shape)
        self._horizon = horizon
        self._seen = 0
        self.learns = True

    def deviations(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """Say how far above the mean of those before a value lies, in deviations; then learn it, if it is to."""
        if not self._seen:
            self._seen, self._mean = 1, value
            return np.zeros_like(value)
        offset = value - self._mean
        spread = np.maximum(np.sqrt(self._variance), _LEAST_SPREAD)
        result = offset / spread
        if not self.learns:
            return result
        most = _MOST_LEARNT * spread
        learnt = np.minimum(np.maximum(offset, -most), most)  # a third of np.clip's price
        self._seen += 1
        weight = 1.0 / min(self._seen, self._horizon)
        self._mean = self._mean + weight * learnt
        self._variance = (1.0 - weight) * (self._variance + weight * learnt * learnt)
        return result


class _Levels:
    """The mean of the newest readings, at each length, against its running mean."""

    def __init__(self, channels: int, horizon: int) -> None:
        self._newest = np.zeros((_LONGEST, channels))
        # Row by row, the share of each of the newest readings in the mean at that length.
        self._shares = np.array(
            [[(back < length) / length for back in reversed(range(_LONGEST))] for length in _LENGTHS]
        )
        self.usual = _Moments((len(_LENGTHS), channels), horizon)

    def distances(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the root mean square over channels, in deviations, (length,); then learn the reading."""
        self._newest[:-1] = self._newest[1:]
        self._newest[-1] = scaled
        away = self.usual.deviations(self._shares @ self._newest)
        return np.asarray(np.sqrt(np.einsum("ij,ij->i", away, away) / away.shape[1]))


class _Patterns:
    """The newest pattern, at each length, against all in memory that do not overlap it.

    Two patterns that end `lag` readings apart differ by the sum of the squared differences of readings `lag` apart. So
    one row of differences by lag is kept for each of the newest readings, and longer patterns are sums of these rows.
    """

    def __init__(self, channels: int, memory: int) -> None:
        self._channels = channels
        self._memory = memory
        # Readings in order, the newest before `_end`.
        self._readings = np.zeros((2 * memory, channels))
        self._end = memory
        # For each length but the last: rows by lag, enough of the newest to sum the next length. Column k is lag
        # `memory - k`; infinity stands where no reading has been, and is near to nothing.
        self._rows = [np.full((length * (_GROWTH - 1) + 1, memory), np.inf) for length in _LENGTHS[:-1]]
        self._count = 0

    def distances(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distance to the nearest, by reading and channel, (length,), infinite at first; then learn."""
        if self._end == len(self._readings):
            self._readings[: self._memory] = self._readings[self._memory :]
            self._end = self._memory
        known = max(self._memory - self._count, 0)
        difference = self._readings[self._end - self._memory + known : self._end] - scaled
        squares = np.einsum("ij,ij->i", difference, difference)
        self._readings[self._end] = scaled
        self._end += 1
        nearest = [squares.min(initial=np.inf)]
        for length, rows in zip(_LENGTHS[:-1], self._rows, strict=True):
            place = self._count % len(rows)
            rows[place, known:] = squares
            squares = squares + rows[place - length, known:]  # a negative place is the ring's own way round
            for back in range(2, _GROWTH):
                squares += rows[place - back * length, known:]
            overlapping = _GROWTH * length - 1
            nearest.append(squares[: max(len(squares) - overlapping, 0)].min(initial=np.inf))
        self._count += 1
        return np.asarray(np.sqrt(np.array(nearest) / (np.array(_LENGTHS) * self._channels)))


class _KnownPatterns:
    """The newest pattern, at each length, against all in a recording that never changes.

    As in `_Patterns`, but a row holds differences by place in the recording, so the rows before are read as many places
    earlier.
    """

    def __init__(self, known: NDArray[np.float64]) -> None:
        self._known = known
        self._rows = [np.full((length * (_GROWTH - 1) + 1, len(known)), np.inf) for length in _LENGTHS[:-1]]
        self._count = 0
        for scaled in known[-_LONGEST:]:
            self.distances(scaled)

    def distances(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distance to the nearest, by reading and channel, (length,)."""
        difference = self._known - scaled
        squares = np.einsum("ij,ij->i", difference, difference)
        nearest = [squares.min()]
        for length, rows in zip(_LENGTHS[:-1], self._rows, strict=True):
            place = self._count % len(rows)
            rows[place] = squares
            squares = squares.copy()
            for back in range(length, _GROWTH * length, length):
                squares[back:] += rows[place - back, :-back]
                squares[:back] = np.inf  # patterns that begin before the recording does
            nearest.append(squares.min())
        self._count += 1
        return np.asarray(np.sqrt(np.array(nearest) / (np.array(_LENGTHS) * self._known.shape[1])))
