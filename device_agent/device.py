"""One device: readings in, the easy ones answered here, the hard ones asked, none lost on the way.

Invariants:
- produced = kept + accepted and accepted = answered + dropped + quarantined + in flight, at each commit of the outbox;
- the application hears the device's own answer at once and the gateway's when it comes.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_agent.change import make_change
from device_agent.config import DeviceConfig
from device_agent.inputs import InputMaker
from device_agent.metrics import render
from device_agent.policy import Choice, PolicyConfig, UploadPolicy
from device_agent.questions import Questions, size_of
from device_agent.readings import AnsweredBy, Outcome, Reading
from device_agent.runtime import load
from device_agent.timekeeping import Timekeeper
from shoal.commands import Action, CommandDesk
from shoal.delivery.outbox import Outbox
from shoal.errors import ModelError
from shoal.link import Link
from shoal.release.probation import Watch, parse_baseline
from shoal.release.selftest import Runtime
from shoal.scoring import Scaler, all_finite, score_rows
from shoal.state import Report, StateReporter, quality_of
from shoal.v1 import inference_pb2 as pb
from shoal.v1.node_pb2 import ModelState, UploadState
from shoal.v1.release_pb2 import Artefact, ReleaseSpec, Tier
from shoal.v1.sensor_pb2 import Scalars, SensorData, TimeQuality

log = logging.getLogger(__name__)

_SEQ_BLOCK = 256
_REASONS = {
    Choice.ASK_SCORE: pb.ASK_REASON_SCORE,
    Choice.ASK_NO_MODEL: pb.ASK_REASON_NO_MODEL,
    Choice.ASK_AUDIT: pb.ASK_REASON_AUDIT,
    Choice.ASK_COMMAND: pb.ASK_REASON_COMMAND,
}


@dataclass(frozen=True, slots=True)
class _ActiveModel:
    spec: ReleaseSpec
    artefact: Artefact
    runtime: Runtime
    inputs: InputMaker
    shape: tuple[int, ...]
    scaler: Scaler
    watch: Watch


class Device:
    """Everything of a device but its process: the agent drives one, the simulator thousands, on one loop.

    Args:
        lane: the outbox's lane for this device's link.
        on_outcome: the application.

    Attributes:
        model_states: what the update client says of the slots, for NodeState.
        clock_suspect: what it says of the system's clock.
        timekeeper: what is known of it besides; the simulator's devices have none, and never doubt theirs.
        actions: what it does on command; the agent adds its own.
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
        self.timekeeper: Timekeeper | None = None
        self._outbox = outbox
        self._rng = rng
        self._on_outcome = on_outcome
        self._change = make_change(config.change)
        self._policy = UploadPolicy(config.policy)
        self._active: _ActiveModel | None = None
        self._seqs = iter(range(0))
        self._questions = Questions(config, link, outbox, clock=clock, lane=lane, on_answer=self._hear)
        self._reporter = StateReporter(link, self._report, interval_s=config.state_interval_s, rng=rng)
        self.actions: dict[str, Action] = {"report_state": lambda _: self._report_now()}
        self._desk = CommandDesk(link, config.site, config.node, self.actions)
        self._wants_snapshot = False

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
        runtime = load(path, self.config.runtime)
        inputs, shape = InputMaker(spec.input), (1, *spec.input.shape)
        self._active = _ActiveModel(spec, artefact, runtime, inputs, shape, Scaler(spec.input), watch)
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
        audit = self._policy.take(self._rng.random(), now)
        is_changed = self._change.should_upload(reading.values, now)
        if not is_changed and not audit and not self._wants_snapshot:
            self._count("kept.unchanged")
            return self._tell(seq, reading, None, "kept.unchanged")
        answer = self._answer(reading.values)
        score = None if answer is None else answer.score
        choice = self._policy.decide(score, self._released_threshold(), audit=audit)
        if self._wants_snapshot:
            self._wants_snapshot, choice = False, Choice.ASK_COMMAND
        if choice.is_ask:
            choice = self._ask(seq, reading, answer, choice, now)
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
            scaled = self._active.scaler(values.reshape(self._active.shape))
            if not all_finite(scaled):
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

    def _ask(self, seq: int, reading: Reading, answer: pb.Answer | None, choice: Choice, now: float) -> Choice:
        """Owe the question, unless a cap refuses it; return what became of the reading."""
        data = SensorData(
            seq=seq,
            captured_at_us=reading.captured_at_us,
            time_quality=self._time_quality(),
            scalars=Scalars(values=reading.values.ravel().tolist()),
            reference=reading.reference,
        )
        if self.timekeeper is not None and data.time_quality != TimeQuality.TIME_QUALITY_SYNCED:
            boot = self.timekeeper.now()
            data.boot_id, data.since_boot_us = boot.boot_id, boot.since_boot_us
        row = pb.InferenceRow(reading=data, reason=_REASONS[choice], device_answer=answer)
        # What somebody commands is booked where there is room, and asked in any case.
        if not self._policy.spend(size_of(row), now) and choice is not Choice.ASK_COMMAND:
            self._count(Choice.OVER_BUDGET.value)
            return Choice.OVER_BUDGET
        if self._questions.ask(row, now):
            self._count(choice.value)
        return choice

    # -- the gateway ---------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Send what is due; call it after each commit of the outbox and a few times a second."""
        self._desk.tick()
        self._reporter.tick(now)
        self._questions.tick(now)

    def _hear(self, row: pb.RowReply, latency_s: float) -> None:
        answer = row.answer
        label = answer.label if answer.HasField("label") else None
        by = AnsweredBy.CACHE if answer.from_cache else AnsweredBy.GATEWAY
        self._on_outcome(Outcome(row.seq, "", by, answer.release, answer.score, label, "answered", latency_s))

    def snapshot(self) -> None:
        """Ask about the next reading, whatever it is."""
        self._wants_snapshot = True

    def retune(self, policy: PolicyConfig) -> None:
        """Go on with another share and threshold."""
        self._policy.retune(policy)
        self._reporter.soon()

    def metrics(self) -> bytes:
        """Counters as committed, and what waits, for Prometheus."""
        upload = self._upload_state()
        gauges = {
            "outbox_items": self._outbox.in_flight,
            "outbox_bytes": self._outbox.size_bytes,
            "connected": int(self.link.connected),
            "release": self.release,
            "upload_threshold": upload.threshold,
            "upload_budget_share": upload.budget_ppm / 1e6,
            "upload_asked_share": upload.asked_ppm / 1e6,
        }
        return render(self._report().counters, gauges)

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

    def _count(self, name: str) -> None:
        self._outbox.count(self.config.node, name)

    def _report(self) -> Report:
        counters: Counter[str] = self._outbox.counters(self.config.node)
        counters.update(self.link.counters)
        boot = None if self.timekeeper is None else self.timekeeper.now()
        return Report(counters, self.model_states(), self._time_quality(), self._upload_state(), boot)

    def _time_quality(self) -> TimeQuality:
        if self.timekeeper is None:
            return quality_of(clock_suspect=self.clock_suspect())
        return self.timekeeper.quality(clock_suspect=self.clock_suspect())

    def _upload_state(self) -> UploadState:
        return UploadState(
            threshold=self._policy.threshold(self._released_threshold()),
            budget_ppm=round(self._policy.budget_share * 1e6),
            asked_ppm=round(self._policy.asked_share * 1e6),
        )

    def _released_threshold(self) -> float:
        return self._active.artefact.threshold if self._active else 0.0

    def _report_now(self) -> str:
        self._reporter.soon()
        return "state follows"
