"""Differential upload, the second half: which readings are worth a question to the gateway."""

import math
from dataclasses import dataclass
from enum import Enum, unique

# How fast the share-keeping threshold moves, in running mean scores per reading: a few hundred readings to settle.
_STEP = 0.02
_MEAN_DECAY = 0.01
# In mean scores: one absurd reading at most doubles the mean, and so does not blind the device to what follows.
_LARGEST_WEIGHT = 1.0 / _MEAN_DECAY
_MINUTE_S = 60.0


@unique
class Choice(Enum):
    """What happens to a reading; the value is the counter's name."""

    BELOW_THRESHOLD = "kept.below_threshold"
    OVER_BUDGET = "kept.over_budget"
    ASK_SCORE = "asked.score"
    ASK_NO_MODEL = "asked.no_model"
    ASK_AUDIT = "asked.audit"

    @property
    def is_ask(self) -> bool:
        return self in (Choice.ASK_SCORE, Choice.ASK_NO_MODEL, Choice.ASK_AUDIT)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Budgets of one device.

    Attributes:
        audit_share: share of all readings that is asked at random, so that recall stays measurable.
        max_share: share of readings that may ask because of their score; the threshold rises to keep it.
        max_per_minute: questions a minute, whatever their reason.
    """

    audit_share: float = 0.005
    max_share: float = 0.2
    max_per_minute: int = 600

    def __post_init__(self) -> None:
        if not (0 <= self.audit_share <= 1 and 0 < self.max_share <= 1 and self.max_per_minute > 0):
            raise ValueError(f"shares must lie in 0..1 and max_per_minute be positive: {self}")


class UploadPolicy:
    """Decides from score, threshold and budget. Chance and time are passed in."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._quantile = 0.0
        self._mean_score = 0.0
        self._tokens = float(config.max_per_minute)
        self._refilled_at: float | None = None

    def is_audit(self, chance: float) -> bool:
        """Whether a reading with this draw from 0..1 belongs to the audit share."""
        return chance < self._config.audit_share

    def decide(self, score: float | None, threshold: float, *, audit: bool, now: float) -> Choice:
        """Choose for one reading.

        Args:
            score: the device model's; None when it has no model.
            threshold: the release's.
            audit: `is_audit` said so.
            now: seconds, monotonic.
        """
        choice = self._wish(score, threshold, audit=audit)
        if choice.is_ask and not self._spend(now):
            return Choice.OVER_BUDGET
        return choice

    def threshold(self, released: float) -> float:
        """The threshold in force: the release's, or higher where more than `max_share` would exceed it."""
        return max(released, self._quantile)

    def forget_scores(self) -> None:
        """Start again with the released threshold: another model's scores say nothing about this one's."""
        self._quantile = 0.0
        self._mean_score = 0.0

    def _wish(self, score: float | None, threshold: float, *, audit: bool) -> Choice:
        if score is None:
            return Choice.ASK_NO_MODEL
        exceeds = math.isnan(score) or score > self.threshold(threshold)
        self._follow(score)
        if audit:
            return Choice.ASK_AUDIT
        return Choice.ASK_SCORE if exceeds else Choice.BELOW_THRESHOLD

    def _follow(self, score: float) -> None:
        """Track the (1 - max_share) quantile of the scores by stochastic approximation (Robbins and Monro, 1951)."""
        if not math.isfinite(score):
            return
        size = min(abs(score), _LARGEST_WEIGHT * self._mean_score) if self._mean_score else abs(score)
        self._mean_score += _MEAN_DECAY * (size - self._mean_score)
        error = (score > self._quantile) - self._config.max_share
        # Where scores have fallen, steps of the new mean would take for ever to come down.
        step = _STEP * max(self._mean_score, self._quantile)
        self._quantile = max(0.0, self._quantile + step * error)

    def _spend(self, now: float) -> bool:
        rate = self._config.max_per_minute / _MINUTE_S
        elapsed_s = 0.0 if self._refilled_at is None else max(0.0, now - self._refilled_at)
        self._refilled_at = now
        self._tokens = min(float(self._config.max_per_minute), self._tokens + elapsed_s * rate)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
