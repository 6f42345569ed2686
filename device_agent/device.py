"""One device: readings in, the easy ones answered here, the hard ones asked, none lost on the way.

Invariants:
- produced = kept + accepted and accepted = answered + dropped + quarantined + in flight, at each commit of the outbox;
- a question leaves the outbox only when the gateway's reply settles it, or a refusal that would be repeated does;
- the application hears the device's own answer at once and the gateway's when it comes.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_agent.change import ChangeDetector
from device_agent.inputs import InputMaker
from device_agent.policy import Choice, PolicyConfig, UploadPolicy
from device_agent.readings import AnsweredBy, Outcome, Reading
from device_agent.runtime import load
from shoal.codec import EPOCH_BYTES, MAX_ROW_BYTES
from shoal.commands import CommandDesk
from shoal.delivery.outbox import Item, Key, Outbox, group_by_model
from shoal.errors import LinkError, ModelError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.release.probation import Watch, parse_baseline
from shoal.release.selftest import Runtime
from shoal.routes import Route
from shoal.scoring import Scaler, score_rows
from shoal.state import Report, StateReporter
from shoal.v1 import inference_pb2 as pb
from shoal.v1.node_pb2 import ModelState
from shoal.v1.release_pb2 import Artefact, ReleaseSpec, Tier
from shoal.v1.sensor_pb2 import Scalars, SensorData, TimeQuality

log = logging.getLogger(__name__)

_SEQ_BLOCK = 256
# Of the retry interval: a gateway that answers "not yet" is there, and will be ready soon.
_PATIENCE = 0.2
# What a message holds for each row besides the row's own bytes.
_ROW_HEAD_BYTES = 8
_REASONS = {
    Choice.ASK_SCORE: pb.ASK_REASON_SCORE,
    Choice.ASK_NO_MODEL: pb.ASK_REASON_NO_MODEL,
    Choice.ASK_AUDIT: pb.ASK_REASON_AUDIT,
}
# Never to be answered: asking again would bring the same reply.
_SETTLED = {pb.STATUS_OK: "answered", pb.STATUS_INVALID_ARGUMENT: "quarantined"}


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device's settings; see docs/devices.md.

    Attributes:
        answer_within_ms: how long the application waits for the gateway's answer; 0 is no hurry.
        retry_after_s: a question without a reply is asked again after this; also its message expiry.
        linger_s: questions wait this long for company in one message.
        max_rows: of one message.
    """

    site: str
    node: str
    model: str
    change_threshold: float = 0.0
    change_adapt: float = 0.0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    answer_within_ms: int = 0
    retry_after_s: float = 10.0
    linger_s: float = 0.0
    max_rows: int = 32
    state_interval_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _ActiveModel:
    spec: ReleaseSpec
    artefact: Artefact
    runtime: Runtime
    inputs: InputMaker
    scaler: Scaler
    watch: Watch


class Device:
    """Everything of a device but its process: the agent drives one, the simulator thousands, on one loop.

    Args:
        lane: the outbox's lane for this device's link.
        on_outcome: the application.

    Attributes:
        model_states: what the update client says of the slots, for NodeState.
        clock_suspect: what it says of the system's clock, for NodeState.
    """

    def __init__(
        self,
        config: DeviceConfig,
        link: Link,
        outbox: Outbox,
        *,
        rng: random.Random,
        clock: Callable[[], float],
        lane: str = "",
        on_outcome: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.link = link
        self.model_states: Callable[[], list[ModelState]] = list
        self.clock_suspect: Callable[[], bool] = bool
        self._outbox = outbox
        self._lane = lane
        self._rng = rng
        self._clock = clock
        self._on_outcome = on_outcome
        self._change = ChangeDetector(config.change_threshold, config.change_adapt)
        self._policy = UploadPolicy(config.policy)
        self._active: _ActiveModel | None = None
        self._epoch = outbox.epoch(config.node)
        self._seqs = iter(range(0))
        self._asked_at: dict[int, float] = {}
        self._send_at: float | None = 0.0
        self._reporter = StateReporter(link, self._report, interval_s=config.state_interval_s, rng=rng)
        CommandDesk(link, config.site, config.node, {"report_state": lambda _: self._report_now()})
        link.subscribe(Route.REPLY, self._on_reply, site=config.site, node=config.node)
        link.on_connect(self._on_connect)

    # -- the model ---------------------------------------------------------------------------------------------------

    def activate(self, model: str, spec: ReleaseSpec, path: Path) -> None:
        """Answer with this release from now on.

        Raises:
            ModelError: it has no artefact for devices, or the runtime refuses it.
        """
        artefact = next((item for item in spec.artefacts if item.tier == Tier.TIER_DEVICE), None)
        if artefact is None:
            raise ModelError(f"release {spec.release} of {model} has nothing for devices")
        watch = Watch(parse_baseline(artefact.baseline))
        self._active = _ActiveModel(spec, artefact, load(path), InputMaker(spec.input), Scaler(spec.input), watch)
        self._policy.forget_scores()
        self._reporter.soon()

    def deactivate(self, _model: str) -> None:
        """Ask about everything from now on."""
        self._active = None
        self._reporter.soon()

    def watch(self, _model: str) -> Watch | None:
        """What the active release has done here; None before the first."""
        return self._active.watch if self._active else None

    @property
    def release(self) -> int:
        """The active release; 0 before the first."""
        return self._active.spec.release if self._active else 0

    # -- a reading ---------------------------------------------------------------------------------------------------

    def read(self, reading: Reading, now: float) -> Outcome:
        """Take one reading; what it leads to is durable after the outbox's next commit.

        Where the release asks for windows, the reading that completes one stands for it.
        """
        seq = self._next_seq()
        self._count("produced")
        values = reading.values if self._active is None else self._active.inputs.add(reading.values)
        if values is None:
            self._count("kept.gathered")
            return self._tell(seq, reading, None, "kept.gathered")
        if values is not reading.values:
            reading = replace(reading, values=values)
        audit = self._policy.is_audit(self._rng.random())
        if not self._change.update(reading.values) and not audit:
            self._count("kept.unchanged")
            return self._tell(seq, reading, None, "kept.unchanged")
        answer = self._answer(reading.values)
        threshold = self._active.artefact.threshold if self._active else 0.0
        choice = self._policy.decide(None if answer is None else answer.score, threshold, audit=audit, now=now)
        if choice.is_ask:
            self._ask(seq, reading, answer, choice, now)
        else:
            self._count(choice.value)
        return self._tell(seq, reading, answer, choice.value)

    def gap(self) -> None:
        """What is read next does not follow what was read before: no window spans both."""
        if self._active is not None:
            self._active.inputs.reset()

    def refuse(self) -> None:
        """Account for what its source could not make a reading of."""
        self._count("bad_readings")
        self.gap()

    def _answer(self, values: NDArray[np.float32]) -> pb.Answer | None:
        if self._active is None:
            return None
        spec, watch = self._active.spec, self._active.watch
        try:
            with np.errstate(over="ignore"):  # infinite is refused here, and as a score means "ask"
                scaled = self._active.scaler(values.reshape((1, *spec.input.shape)))
                if not np.isfinite(scaled).all():
                    raise ModelError("a value is not finite")  # noqa: TRY301  an int8 model would answer it all the same
                scores = score_rows(spec.score, scaled, self._active.runtime.run(scaled))
        except (ModelError, ValueError) as exc:
            # A reading that the model cannot take is the gateway's to judge; it answers with the field at fault.
            self._count("model_errors")
            if np.isfinite(values).all():  # else the sensor is at fault, whatever the model
                watch.erred(str(exc))
            log.debug("no answer node=%s error=%s", self.config.node, exc)
            return None
        answer = pb.Answer(release=spec.release, score=float(scores.scores[0]))
        watch.answered(answer.score, scaled.tobytes())
        if scores.labels is not None:
            answer.label = int(scores.labels[0])
        return answer

    def _ask(self, seq: int, reading: Reading, answer: pb.Answer | None, choice: Choice, now: float) -> None:
        data = SensorData(
            seq=seq,
            captured_at_us=reading.captured_at_us,
            time_quality=TimeQuality.TIME_QUALITY_SYNCED,
            scalars=Scalars(values=reading.values.ravel().tolist()),
            reference=reading.reference,
        )
        row = pb.InferenceRow(reading=data, reason=_REASONS[choice], device_answer=answer)
        key = Key(self.config.node, self._epoch, seq)
        item = Item(key, self.config.model, row.SerializeToString())
        if _size(item) > MAX_ROW_BYTES:
            log.error("reading too large to ask node=%s seq=%d bytes=%d", self.config.node, seq, len(item.payload))
            self._turn_away("quarantined")
        elif self._outbox.put(item):
            self._count(choice.value)
            self._asked_at[seq] = now
        else:
            self._turn_away("dropped.full")
        if self._send_at is None:
            self._send_at = now + self.config.linger_s

    # -- questions and replies -----------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Send what is due; call it after each commit of the outbox and a few times a second."""
        self._reporter.tick(now)
        if not self.link.connected or (self._send_at is not None and now < self._send_at):
            return
        self._send_at = None
        while self.link.room() > 0:
            taken = self._outbox.take(now, self.config.max_rows, self.config.retry_after_s, self._lane)
            if not self._send_all(taken, now) or len(taken) < self.config.max_rows:
                return

    def _send_all(self, taken: Sequence[tuple[Item, int]], now: float) -> bool:
        """Send in as few messages as may be. False when the link did not take them all; the others are due again."""
        sent = [
            self._send(model, items, replay=replay, now=now)
            for (_, _, model, replay), group in group_by_model(taken).items()
            for items in _split(group)
        ]
        return all(sent)

    def _send(self, model: str, items: list[Item], *, replay: bool, now: float) -> bool:
        keys = [item.key for item in items]
        request = pb.InferenceRequest(
            device=self.config.node,
            epoch=keys[0].epoch,
            model=model,
            rows=[pb.InferenceRow.FromString(item.payload) for item in items],
            answer_within_ms=0 if replay else self.config.answer_within_ms,
            replay=replay,
        )

        def done(error: LinkError | None) -> None:
            if error is None:
                return
            if error.permanent:
                log.error("question refused for ever node=%s rows=%d error=%s", self.config.node, len(keys), error)
                for key in keys:
                    self._settle(key, "quarantined")
            else:
                self._outbox.make_due(keys, now)

        sent = self.link.publish(
            Route.INFER,
            request,
            correlation=keys[0].seq.to_bytes(8, "big"),
            # Where the broker still holds it by then, the retry has taken its place.
            expiry_s=max(1, round(self.config.retry_after_s)),
            on_done=done,
            site=self.config.site,
            node=self.config.node,
        )
        if not sent:
            self._outbox.make_due(keys, now)
        return sent

    def _on_reply(self, delivery: Delivery) -> None:
        reply = delivery.message
        if not isinstance(reply, pb.InferenceReply) or len(reply.epoch) != EPOCH_BYTES:
            return
        for row in reply.rows:
            key = Key(self.config.node, reply.epoch, row.seq)
            if row.status in _SETTLED:
                if self._settle(key, _SETTLED[row.status]):
                    self._hear(row)
            else:
                # Not now: again sooner than after silence, and not at once.
                self._count(f"replies.{_status_name(row.status)}")
                self._outbox.make_due([key], self._clock() + _PATIENCE * self.config.retry_after_s)

    def _hear(self, row: pb.RowReply) -> None:
        asked_at = self._asked_at.pop(row.seq, None)
        if row.status != pb.STATUS_OK:
            log.warning(
                "reading refused node=%s seq=%d field=%s: %s", self.config.node, row.seq, row.field, row.message
            )
            return
        if asked_at is not None:
            self._on_outcome(
                Outcome(
                    row.seq,
                    "",
                    AnsweredBy.GATEWAY,
                    row.answer.release,
                    row.answer.score,
                    row.answer.label if row.answer.HasField("label") else None,
                    "answered",
                    self._clock() - asked_at,
                )
            )

    def _settle(self, key: Key, outcome: str) -> bool:
        if outcome != "answered":
            self._asked_at.pop(key.seq, None)
        return self._outbox.settle(key, outcome)

    def report_soon(self) -> None:
        """Publish this device's state at the next tick."""
        self._reporter.soon()

    @property
    def is_settled(self) -> bool:
        """The broker has everything that this device had to say, its state included."""
        return self.link.connected and self.link.is_idle and not self._reporter.is_due

    # -- small parts -----------------------------------------------------------------------------------------------

    def _next_seq(self) -> int:
        seq = next(self._seqs, None)
        if seq is None:
            self._seqs = iter(self._outbox.reserve_seqs(self.config.node, _SEQ_BLOCK))
            seq = next(self._seqs)
        return seq

    def _tell(self, seq: int, reading: Reading, answer: pb.Answer | None, reason: str) -> Outcome:
        label = answer.label if answer is not None and answer.HasField("label") else None
        outcome = Outcome(
            seq,
            reading.reference,
            AnsweredBy.NOBODY if answer is None else AnsweredBy.DEVICE,
            0 if answer is None else answer.release,
            0.0 if answer is None else answer.score,
            label,
            reason,
        )
        self._on_outcome(outcome)
        return outcome

    def _turn_away(self, outcome: str) -> None:
        """Account for a question that never was in the outbox, which counts `accepted` for those that are."""
        self._count("accepted")
        self._count(outcome)

    def _count(self, name: str) -> None:
        self._outbox.count(self.config.node, name)

    def _report(self) -> Report:
        counters: Counter[str] = self._outbox.counters(self.config.node)
        counters.update(self.link.counters)
        return Report(counters, self.model_states(), self.clock_suspect())

    def _report_now(self) -> str:
        self._reporter.soon()
        return "state follows"

    def _on_connect(self) -> None:
        self._send_at = 0.0


def _status_name(status: int) -> str:
    # A newer gateway may know more of them; the schema's enums are open.
    known = pb.Status.DESCRIPTOR.values_by_number.get(status)
    return "unknown" if known is None else known.name.removeprefix("STATUS_").lower()


def _size(item: Item) -> int:
    return len(item.payload) + _ROW_HEAD_BYTES


def _split(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Split what is too large for one message; each item fits alone."""
    part: list[Item] = []
    room = MAX_ROW_BYTES
    for item in items:
        if part and _size(item) > room:
            yield part
            part, room = [], MAX_ROW_BYTES
        part.append(item)
        room -= _size(item)
    yield part
