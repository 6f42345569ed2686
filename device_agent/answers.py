"""What applications on the device hear: one final result for each reading that has a new answer, in time.

Invariants:
- a reading's final result is told once: at once where the device's own answer stands, otherwise when the gateway's
  comes or when nobody waits for it any more;
- what comes after it is told once more, marked late, and changes nothing.
"""

import json
import logging
import os
import select
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import msgspec

from device_agent.readings import AnsweredBy, Outcome

log = logging.getLogger(__name__)

# Readings that wait for the gateway, and as many that no longer do and may yet be answered.
_MAX_WAITING = 1024
_STDOUT = 1


class StdoutAnswers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="stdout"):
    """`kind = "stdout"`: one JSON object a line."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a reading came to.

    Attributes:
        by: `nobody` where neither the device has a model nor the gateway answered in time.
        is_late: another result of this reading was final before.
        latency_s: from the question to the gateway's answer.
    """

    seq: int
    reference: str
    by: AnsweredBy
    release: int
    score: float
    label: int | None
    latency_s: float
    is_late: bool


class Answers:
    """Makes results of outcomes. Time is passed in.

    Args:
        within_s: how long the gateway's answer is waited for; 0 is no hurry.
        tell: the application.
    """

    def __init__(self, within_s: float, tell: Callable[[Result], None]) -> None:
        self._within_s = within_s
        self._tell = tell
        self._waiting: OrderedDict[int, tuple[Outcome, float]] = OrderedDict()
        # Of those that nobody waits for any more, what the source calls them.
        self._given_up: OrderedDict[int, str] = OrderedDict()

    def hear(self, outcome: Outcome, now: float) -> None:
        """Take an outcome, as the device tells them."""
        if outcome.by.is_gateways:
            waited, _ = self._waiting.pop(outcome.seq, (None, 0.0))
            reference = self._given_up.pop(outcome.seq, "") if waited is None else waited.reference
            self._say(outcome, reference, is_late=waited is None)
        elif outcome.reason.startswith("asked."):
            self._waiting[outcome.seq] = (outcome, now + self._within_s)
            if len(self._waiting) > _MAX_WAITING:
                self._give_up()
        elif outcome.by is AnsweredBy.DEVICE:
            self._say(outcome, outcome.reference, is_late=False)

    def tick(self, now: float) -> None:
        """Let the device's own answers stand where the gateway was silent for too long."""
        while self._within_s and self._waiting and next(iter(self._waiting.values()))[1] <= now:
            self._give_up()

    def _give_up(self) -> None:
        seq, (outcome, _) = self._waiting.popitem(last=False)
        self._given_up[seq] = outcome.reference
        if len(self._given_up) > _MAX_WAITING:
            self._given_up.popitem(last=False)
        self._say(outcome, outcome.reference, is_late=False)

    def _say(self, outcome: Outcome, reference: str, *, is_late: bool) -> None:
        self._tell(
            Result(
                outcome.seq,
                reference,
                outcome.by,
                outcome.release,
                outcome.score,
                outcome.label,
                outcome.latency_s,
                is_late,
            )
        )


class LineWriter:
    """Results as JSON lines for another program. Never blocks: what that program does not read in time is dropped.

    A line is shorter than PIPE_BUF, so a pipe takes it whole or not at all.
    """

    def __init__(self, descriptor: int = _STDOUT) -> None:
        self.dropped = 0
        self._descriptor = descriptor

    def __call__(self, result: Result) -> None:
        line = json.dumps(asdict(result) | {"by": result.by.value}) + "\n"
        try:
            _, ready, _ = select.select([], [self._descriptor], [], 0)
            if ready:
                os.write(self._descriptor, line.encode())
                return
        except OSError as exc:  # the reader has gone
            log.debug("result not written error=%s", exc)
        self.dropped += 1
        if not self.dropped & (self.dropped - 1):  # a reader that is gone for good must not fill the disk
            log.warning("results dropped, nobody reads them count=%d", self.dropped)
