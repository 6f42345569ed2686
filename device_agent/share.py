"""Differential upload, the second part: the threshold that keeps a share, whatever the scores are."""

import math
from bisect import bisect_left, bisect_right, insort

# As many recent scores as tell a share of a thousandth, 8 KiB of numbers, and half a microsecond to keep in order.
_SCORES = 512
# Before so many scores a rank says little: the released threshold decides, on the credit that a device starts with.
_FIRST_SCORES = 32
# How far the questions may run ahead of the share or lag behind: what it allows in so many readings, and at least
# a handful. More follows bursts, less keeps the share more tightly.
_CREDIT_READINGS = 250
_LEAST_CREDIT = 5.0
_SCORED_DECAY = 0.002


class ShareKeeper:
    """Asks about the highest scores, as many as a share of all readings allows. Chance is passed in.

    A score's place among the recent ones, ties broken by lot, is uniform on 0..1 whatever the distribution, as long
    as scores come in no particular order: constant, heavy-tailed or infinite ones included. A reading is asked when
    its place is below the share. Where scores do have an order (a drift, an incident), an account of what the share
    allowed and what was asked moves the mark between nothing and four times the share. So for any scores at all, n
    readings bring at most share * n + 2 * credit questions for their scores.

    Source: smoothed conformal p-values, Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World (2005), 2.2.
    """

    def __init__(self, share: float) -> None:
        self._recent: list[float] = []
        self._sorted: list[float] = []
        self._oldest = 0
        self._credit = 0.0
        self._is_scored = True
        self._scored_share = 1.0
        self.set_share(share)
        self.forget()

    def set_share(self, share: float) -> None:
        """Allow this share of all readings from now on."""
        self._share = share
        self._most = max(_LEAST_CREDIT, _CREDIT_READINGS * share)
        self._credit = min(self._credit, self._most)

    def forget(self) -> None:
        """Start again: another model's scores say nothing about this one's."""
        self._recent.clear()
        self._sorted.clear()
        self._oldest = 0
        self._credit = self._most
        self._is_scored = True
        self._scored_share = 1.0

    def allow(self) -> None:
        """Take note of a reading, before it has a score or is kept without one."""
        self._scored_share += _SCORED_DECAY * (self._is_scored - self._scored_share)
        self._is_scored = False
        self._credit = min(self._most, self._credit + self._share)

    def charge(self) -> None:
        """Take note that the reading is asked, for whatever reason: audits leave that much less for scores."""
        self._credit -= 1.0

    def is_high(self, score: float, chance: float) -> bool:
        """Whether the reading's score is worth one of the questions that the share allows.

        Args:
            score: any number; NaN counts as infinite.
            chance: from 0..1, 1 excluded, independent of the score.
        """
        if score != score:  # noqa: PLR0124 - NaN, at a tenth of the call's price
            score = math.inf
        self._is_scored = True
        ordered = self._sorted
        count = len(ordered)
        after = bisect_right(ordered, score)
        equal = after - bisect_left(ordered, score, 0, after)
        place = (count - after + chance * (equal + 1)) / (count + 1)
        self._remember(score)
        if count < _FIRST_SCORES:
            return self._credit > 0.0
        lead = 1.0 + self._credit / self._most
        return lead > 0.0 and place < self._mark() * lead * lead

    @property
    def threshold(self) -> float:
        """The score above which readings are asked while the account is even; minus infinity where all are."""
        ordered = self._sorted
        place = len(ordered) - 1 - math.floor(self._mark() * (len(ordered) + 1))
        return ordered[place] if len(ordered) >= _FIRST_SCORES and place >= 0 else -math.inf

    def _mark(self) -> float:
        """Of the readings that have a score, the share to ask about."""
        return min(1.0, self._share / max(self._scored_share, _SCORED_DECAY))

    def _remember(self, score: float) -> None:
        ordered, recent = self._sorted, self._recent
        if len(recent) < _SCORES:
            recent.append(score)
        else:
            del ordered[bisect_left(ordered, recent[self._oldest])]
            recent[self._oldest] = score
            self._oldest = (self._oldest + 1) % _SCORES
        insort(ordered, score)
