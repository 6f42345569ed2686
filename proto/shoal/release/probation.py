"""Is the model on probation fit for this node? Counts what it does to live readings, and decides. Pure.

Errors are the hard criterion: a model has no business failing on a reading that is finite. Scores are a gross one.
Inputs may differ from those at the gate with nothing wrong, because a release is often made when they have drifted,
and because a gateway is asked the hard ones only. So it is not held against a model that scores are distributed
otherwise, but that most of them lie where its own baseline has next to none, or that they never change.

Invariants:
- every decision to fail has its least count, so that no single reading condemns a model;
- probation ends: after `PATIENCE` times its length on what there is, be it nothing;
- a row counts once among the scores, so that a stuck sensor is no evidence.
"""

import math
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, unique

from shoal.v1 import release_pb2 as pb

# Decades, because a score's scale is its model's own. The first bin is below the first edge, the last one unbounded.
EDGES = tuple(10.0**exponent for exponent in range(-6, 5))
BINS = len(EDGES) + 1

MAX_ERROR_PPM = 50_000
MAX_DIVERGENCE_PPM = 500_000
# An answered reading in twenty, chosen however a layer below likes, is still no divergence.
REWEIGHTING = 20
MIN_ERRORS = 5
MIN_READINGS = 20
MIN_SCORES = 100
# Enough to decide on; bounds what a watch remembers.
MAX_SCORES = 512
PATIENCE = 10.0

_PPM = 1_000_000
_HALF_PPM = 500_000
# Rule of three: with 95 % confidence, what was not seen in n rows has a share below 3/n.
_UNSEEN_PPM = 3 * _PPM
_ERROR_CHARS = 160


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a model is held to.

    Attributes:
        score_ppm: share of each bin at the gate; empty where nothing was measured.
        unseen_ppm: what a bin may hold though the gate saw nothing in it.
    """

    score_ppm: tuple[int, ...] = ()
    unseen_ppm: int = _PPM
    max_error_ppm: int = MAX_ERROR_PPM
    max_divergence_ppm: int = MAX_DIVERGENCE_PPM


@unique
class Outcome(Enum):
    WAIT = "wait"
    CONFIRM = "confirm"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Decision:
    outcome: Outcome
    reason: str = ""


def parse_baseline(message: pb.Baseline) -> Baseline:
    """Read a release's baseline; one with other bins than ours (of another version) has none for scores."""
    measured = len(message.score_ppm) == BINS and message.rows > 0
    return Baseline(
        score_ppm=tuple(message.score_ppm) if measured else (),
        unseen_ppm=_UNSEEN_PPM // message.rows if measured else _PPM,
        max_error_ppm=message.max_error_ppm if message.HasField("max_error_ppm") else MAX_ERROR_PPM,
        max_divergence_ppm=message.max_divergence_ppm if message.HasField("max_divergence_ppm") else MAX_DIVERGENCE_PPM,
    )


def measure_baseline(scores: Iterable[float]) -> pb.Baseline:
    """Describe scores that an artefact gave at the gate, with the default limits; of no scores, the limits alone."""
    counts = [0] * BINS
    for score in scores:
        counts[_bin(score)] += 1
    return pb.Baseline(
        score_ppm=_shares_ppm(counts) if any(counts) else (),
        rows=sum(counts),
        max_error_ppm=MAX_ERROR_PPM,
        max_divergence_ppm=MAX_DIVERGENCE_PPM,
    )


def divergence_ppm(observed_ppm: Sequence[int], baseline: Baseline) -> int:
    """How much of what is observed no reweighting of the baseline up to `REWEIGHTING` explains; 0 to 1,000,000.

    This is the hockey-stick divergence sum(max(0, p - g q)), which is the total variation distance for g = 1. A layer
    that passes on one row in g, however it chooses, leaves it at 0. A bin counts with the larger of its neighbours, so
    that an edge is no cliff.

    Source: Liu, Cuff and Verdu, "E_gamma-Resolvability", IEEE Trans. Information Theory 63(5), 2017, for the
        divergence; Hanley and Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 249, 1983, for
        what an empty bin may hold.
    """
    excess = 0
    for index, share in enumerate(observed_ppm):
        near = max(baseline.score_ppm[max(0, index - 1) : index + 2])
        excess += max(0, share - REWEIGHTING * max(near, baseline.unseen_ppm))
    return excess


class Watch:
    """What one activation of a model has done. Never judges by itself: whoever keeps the slots asks.

    Attributes:
        answers: readings that it answered.
        errors: good readings that it failed on: the runtime failed, or the output was not finite or misshapen.
    """

    def __init__(self, baseline: Baseline) -> None:
        self.answers = 0
        self.errors = 0
        self._baseline = baseline
        self._counts = [0] * BINS
        self._rows: set[int] = set()
        self._lowest = math.inf
        self._highest = -math.inf
        self._last_error = ""

    def answered(self, score: float, row: bytes) -> None:
        """Count an answer; `row` is what was asked."""
        if math.isnan(score):
            self.erred("a score is not a number")
            return
        self.answers += 1
        if len(self._rows) == MAX_SCORES:  # first: of a model that serves, this is asked for every row
            return
        mark = zlib.crc32(row)
        if mark not in self._rows:
            self._rows.add(mark)
            self._counts[_bin(score)] += 1
            self._lowest = min(self._lowest, score)
            self._highest = max(self._highest, score)

    def erred(self, reason: str) -> None:
        """Count a reading that the model should have answered."""
        self.errors += 1
        self._last_error = reason[:_ERROR_CHARS]

    @property
    def divergence_ppm(self) -> int | None:
        """None while there is too little to compare, or nothing to compare with."""
        if len(self._rows) < MIN_SCORES or not self._baseline.score_ppm:
            return None
        return divergence_ppm(_shares_ppm(self._counts), self._baseline)

    def decide(self, waited_s: float, probation_s: float) -> Decision:
        """Decide what becomes of the model.

        Args:
            waited_s: since it was activated.
            probation_s: how long it is watched at least.
        """
        patient = waited_s < PATIENCE * probation_s
        readings = self.answers + self.errors
        reason = self._why_unfit(MIN_ERRORS if patient else 1)
        if reason:
            return Decision(Outcome.FAIL, reason)
        is_over_limit = self.errors * _PPM > self._baseline.max_error_ppm * readings
        if waited_s < probation_s or (patient and (readings < MIN_READINGS or is_over_limit)):
            return Decision(Outcome.WAIT)
        return Decision(Outcome.CONFIRM)

    def _why_unfit(self, min_errors: int) -> str:
        readings = self.answers + self.errors
        if self.errors >= min_errors and self.errors * _PPM > self._baseline.max_error_ppm * readings:
            limit = self._baseline.max_error_ppm / _PPM
            return f"it failed on {self.errors} of {readings} readings, at most {limit:.1%}: {self._last_error}"
        diverged = self.divergence_ppm
        if diverged is None:
            return ""
        if diverged > self._baseline.max_divergence_ppm:
            limit = self._baseline.max_divergence_ppm / _PPM
            return (
                f"{diverged / _PPM:.1%} of {len(self._rows)} scores, from {self._lowest:g} to {self._highest:g}, "
                f"are where its baseline has next to none, at most {limit:.1%}"
            )
        usual = max(self._baseline.score_ppm[_bin(self._lowest)], self._baseline.unseen_ppm)
        if self._lowest == self._highest and usual < _HALF_PPM:
            return f"{len(self._rows)} different readings all score {self._lowest:g}"
        return ""


def _bin(score: float) -> int:
    return bisect_right(EDGES, score)


def _shares_ppm(counts: Sequence[int]) -> list[int]:
    """Shares that add up to one million exactly: what rounding leaves goes to the largest."""
    total = sum(counts)
    shares = [count * _PPM // total for count in counts]
    shares[counts.index(max(counts))] += _PPM - sum(shares)
    return shares
