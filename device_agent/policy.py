"""Differential upload: which readings are worth a question to the gateway, by score, by lot and by budget."""

from dataclasses import dataclass
from enum import Enum, unique

from device_agent.caps import Cap, Pace
from device_agent.share import ShareKeeper

_MINUTE_S = 60.0
_DAY_S = 86_400.0
_SIZE_DECAY = 0.05


@unique
class Choice(Enum):
    """What happens to a reading; the value is the counter's name."""

    BELOW_THRESHOLD = "kept.below_threshold"
    OVER_BUDGET = "kept.over_budget"
    ASK_SCORE = "asked.score"
    ASK_NO_MODEL = "asked.no_model"
    ASK_AUDIT = "asked.audit"
    ASK_COMMAND = "asked.command"

    @property
    def is_ask(self) -> bool:
        return self in _ASKS


_ASKS = frozenset({Choice.ASK_SCORE, Choice.ASK_NO_MODEL, Choice.ASK_AUDIT, Choice.ASK_COMMAND})


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Budgets of one device.

    Attributes:
        audit_share: part of `max_share` that is drawn at random from all readings, so that recall stays measurable.
        max_share: share of readings that a device with a model asks about; the threshold rises to keep it.
        max_per_minute, max_per_day: questions, whatever their reason, in any such span.
        max_bytes_per_minute, max_bytes_per_day: the same for the questions' bytes.
        score_threshold: in place of the release's. 0 leaves the choice to the budget alone.
    """

    audit_share: float = 0.005
    max_share: float = 0.2
    max_per_minute: int = 600
    max_per_day: int | None = None
    max_bytes_per_minute: int | None = None
    max_bytes_per_day: int | None = None
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.audit_share <= self.max_share <= 1 and self.max_share > 0):
            raise ValueError(
                f"shares must lie in 0..1, audit_share within max_share and max_share above 0: "
                f"audit_share {self.audit_share}, max_share {self.max_share}"
            )
        for name in ("max_per_minute", "max_per_day", "max_bytes_per_minute", "max_bytes_per_day"):
            cap = getattr(self, name)
            if cap is not None and cap <= 0:
                raise ValueError(f"{name} {cap} must be positive")


class UploadPolicy:
    """Decides from score, threshold and budget. Chance and time are passed in.

    For each reading: `take`, then `decide` unless nothing changed, then `spend` if it is to be asked. What a cap
    allows in the long run bounds the share too, so that the highest scores of a day use its budget, not its first.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._of_messages = _caps(config.max_per_minute, config.max_per_day)
        self._of_bytes = _caps(config.max_bytes_per_minute, config.max_bytes_per_day)
        self._pace = Pace()
        self._bytes_each = 0.0
        self._affordable = 1.0
        self._audit_share = config.audit_share
        self._share = ShareKeeper(config.max_share)
        self._chance = 0.0

    def take(self, chance: float, now: float) -> bool:
        """Take note of the next reading; return whether it belongs to the audit share.

        Args:
            chance: from 0..1, 1 excluded. It breaks ties between equal scores too.
            now: seconds, monotonic.
        """
        if self._pace.count(now):
            self._afford()
        self._share.allow()
        self._chance = chance
        return chance < self._audit_share

    def decide(self, score: float | None, threshold: float, *, audit: bool) -> Choice:
        """Choose for the reading that was taken last.

        Args:
            score: the device model's; None when it has no model.
            threshold: the release's.
            audit: what `take` said.
        """
        if score is None:
            return Choice.ASK_NO_MODEL if self._chance < self._affordable else Choice.OVER_BUDGET
        is_high = self._share.is_high(score, self._chance)
        if audit:
            choice = Choice.ASK_AUDIT
        elif is_high and not score <= self._floor(threshold):  # NaN is above every threshold
            choice = Choice.ASK_SCORE
        else:
            return Choice.BELOW_THRESHOLD
        # Also where a cap refuses it then: scores that made up for it would crowd out the audits.
        self._share.charge()
        return choice

    def spend(self, size_bytes: int, now: float) -> bool:
        """Whether the caps leave room for this question; if so, it is booked."""
        costs = [(cap, 1) for cap in self._of_messages] + [(cap, size_bytes) for cap in self._of_bytes]
        self._bytes_each += (_SIZE_DECAY if self._bytes_each else 1.0) * (size_bytes - self._bytes_each)
        if not all(cap.fits(cost, now) for cap, cost in costs):
            return False
        for cap, cost in costs:
            cap.spend(cost)
        self._pace.count_asked()
        return True

    def retune(self, config: PolicyConfig) -> None:
        """Go on with another share and another threshold; caps stay, and what was spent of them."""
        self._config = config
        self._afford()

    def forget_scores(self) -> None:
        """Start again with the released threshold: another model's scores say nothing about this one's."""
        self._share.forget()

    def threshold(self, released: float) -> float:
        """The threshold in force: the release's, or higher where more than the share would exceed it."""
        return max(self._floor(released), self._share.threshold)

    @property
    def budget_share(self) -> float:
        """Of all readings, what `max_share` and the caps allow at the present pace."""
        return min(self._config.max_share, self._affordable)

    @property
    def asked_share(self) -> float:
        """Of the readings of the last hour or so, what was asked for whatever reason."""
        return self._pace.asked_share

    def _floor(self, released: float) -> float:
        own = self._config.score_threshold
        return released if own is None else own

    def _afford(self) -> None:
        """Work out which share of the readings the caps can pay for."""
        messages, size = self._pace.per_second, self._pace.per_second * self._bytes_each
        shares = [cap.lasting / messages for cap in self._of_messages if messages]
        shares += [cap.lasting / size for cap in self._of_bytes if size]
        self._affordable = min(1.0, *shares, 1.0)
        # Audits stay the same part of the questions, so that a tight day is measured all day long.
        self._audit_share = self._config.audit_share * self.budget_share / self._config.max_share
        self._share.set_share(self.budget_share)


def _caps(per_minute: int | None, per_day: int | None) -> list[Cap]:
    return [Cap(limit, period_s) for limit, period_s in ((per_minute, _MINUTE_S), (per_day, _DAY_S)) if limit]
