"""The two places where a node keeps a model, as a state machine. Pure: every step returns the next `Slots`.

Invariants:
- the active slot is on probation or confirmed;
- a slot is written only while the other one could take over: never while the active model is on probation;
- `tries_left` goes down before an attempt, so that a model that kills the process runs out of them; it goes up again
  only for a start that ended in order;
- a digest that was refused is never written again.

A step that is not in `TRANSITIONS` raises `RuntimeError` and changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, unique
from types import MappingProxyType

TRIES = 3
# Old refusals are forgotten; a fleet that refuses 32 releases in a row needs a person.
MAX_REFUSALS = 32


@unique
class Phase(Enum):
    EMPTY = "empty"
    WRITTEN = "written"
    PROBATION = "probation"
    CONFIRMED = "confirmed"
    FAILED = "failed"


@unique
class Event(Enum):
    WRITE = "write"
    ATTEMPT = "attempt"
    EXCUSE = "excuse"
    PROVE = "prove"
    CONFIRM = "confirm"
    FAIL = "fail"
    DROP = "drop"


TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = MappingProxyType(
    {
        (Phase.EMPTY, Event.WRITE): Phase.WRITTEN,
        (Phase.WRITTEN, Event.WRITE): Phase.WRITTEN,
        (Phase.FAILED, Event.WRITE): Phase.WRITTEN,
        (Phase.CONFIRMED, Event.WRITE): Phase.WRITTEN,
        (Phase.WRITTEN, Event.ATTEMPT): Phase.WRITTEN,
        (Phase.PROBATION, Event.ATTEMPT): Phase.PROBATION,
        (Phase.PROBATION, Event.EXCUSE): Phase.PROBATION,
        (Phase.WRITTEN, Event.PROVE): Phase.PROBATION,
        (Phase.PROBATION, Event.CONFIRM): Phase.CONFIRMED,
        (Phase.WRITTEN, Event.FAIL): Phase.FAILED,
        (Phase.PROBATION, Event.FAIL): Phase.FAILED,
        (Phase.CONFIRMED, Event.FAIL): Phase.FAILED,
        (Phase.WRITTEN, Event.DROP): Phase.EMPTY,
        (Phase.PROBATION, Event.DROP): Phase.EMPTY,
        (Phase.CONFIRMED, Event.DROP): Phase.EMPTY,
        (Phase.FAILED, Event.DROP): Phase.EMPTY,
    }
)


@dataclass(frozen=True, slots=True)
class Content:
    """What a slot holds: an artefact and the release that it came with."""

    release: int
    sha256: bytes
    spec_sha256: bytes


NOTHING = Content(0, b"", b"")


@dataclass(frozen=True, slots=True)
class Slot:
    phase: Phase = Phase.EMPTY
    content: Content = NOTHING
    tries_left: int = 0

    def after(self, event: Event) -> "Slot":
        """Take one step of the table.

        Raises:
            RuntimeError: the table does not have it.
        """
        phase = TRANSITIONS.get((self.phase, event))
        if phase is None:
            raise RuntimeError(f"slot is {self.phase.value}: cannot {event.value}")
        return replace(self, phase=phase)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A release that this node will not try again. `content.sha256` is empty where the release had no artefact."""

    content: Content
    reason: str


@dataclass(frozen=True, slots=True)
class Slots:
    """Both slots, which of them runs, and what was refused."""

    pair: tuple[Slot, Slot] = (Slot(), Slot())
    active: int | None = None
    refusals: tuple[Refusal, ...] = ()

    @property
    def running(self) -> Slot | None:
        return None if self.active is None else self.pair[self.active]

    @property
    def spare_index(self) -> int:
        if self.active is not None:
            return 1 - self.active
        return 1 if self.pair[1].phase is Phase.WRITTEN else 0

    @property
    def spare(self) -> Slot:
        return self.pair[self.spare_index]

    @property
    def on_probation(self) -> bool:
        return self.running is not None and self.running.phase is Phase.PROBATION

    def is_refused(self, content: Content) -> bool:
        """Whether this artefact, or this very release, was refused before."""
        return any(
            content.spec_sha256 == known.content.spec_sha256
            or (content.sha256 and content.sha256 == known.content.sha256)
            for known in self.refusals
        )

    def write(self, content: Content) -> "Slots":
        """Record that the spare slot's files now hold `content`."""
        if self.on_probation:
            raise RuntimeError("the spare slot is what a model on probation goes back to")
        if self.is_refused(content):
            raise RuntimeError(f"release {content.release} was refused before")
        return self._with(self.spare_index, replace(self.spare.after(Event.WRITE), content=content, tries_left=TRIES))

    def attempt(self) -> "Slots":
        """Count down a try of the slot on trial, before trying."""
        index = self._trial_index()
        slot = self.pair[index].after(Event.ATTEMPT)
        if slot.tries_left == 0:
            raise RuntimeError(f"release {slot.content.release} has no tries left")
        return self._with(index, replace(slot, tries_left=slot.tries_left - 1))

    def excuse(self) -> "Slots":
        """Give a start on probation its try back: the process was told to end."""
        index = self._trial_index()
        slot = self.pair[index].after(Event.EXCUSE)
        return self._with(index, replace(slot, tries_left=min(TRIES, slot.tries_left + 1)))

    def pass_test(self) -> "Slots":
        """The spare slot passed its self-test: it becomes active, on probation, its first start counted."""
        index = self.spare_index
        slot = replace(self.spare.after(Event.PROVE), tries_left=TRIES - 1)
        return replace(self._with(index, slot), active=index)

    def confirm(self) -> "Slots":
        if self.active is None:
            raise RuntimeError("no model is active")
        return self._with(self.active, self.pair[self.active].after(Event.CONFIRM))

    def fail(self, index: int, reason: str) -> "Slots":
        """Refuse what a slot holds, for good; a confirmed model in the other slot takes over."""
        slot = self.pair[index].after(Event.FAIL)
        slots = self._without(index, slot).refuse(slot.content, reason)
        # The same artefact may be on trial in the other slot under another release.
        other = slots.pair[1 - index]
        on_trial = other.phase in (Phase.WRITTEN, Phase.PROBATION)
        return slots.drop(1 - index) if on_trial and slots.is_refused(other.content) else slots

    def drop(self, index: int) -> "Slots":
        """Empty a slot whose files are damaged or no longer wanted; its content may be written again."""
        self.pair[index].after(Event.DROP)
        return self._without(index, Slot())

    def switch(self) -> "Slots":
        """Run the confirmed model in the spare slot instead, as when a plan goes back to an earlier release."""
        if self.spare.phase is not Phase.CONFIRMED:
            raise RuntimeError(f"the spare slot is {self.spare.phase.value}: cannot switch")
        if self.on_probation and self.active is not None:
            return self.drop(self.active)
        return replace(self, active=self.spare_index)

    def refuse(self, content: Content, reason: str) -> "Slots":
        """Remember that a release is not to be tried again."""
        refusal = Refusal(content, reason)
        return replace(self, refusals=(*self.refusals, refusal)[-MAX_REFUSALS:])

    def _trial_index(self) -> int:
        return self.active if self.on_probation and self.active is not None else self.spare_index

    def _with(self, index: int, slot: Slot) -> "Slots":
        return replace(self, pair=(slot, self.pair[1]) if index == 0 else (self.pair[0], slot))

    def _without(self, index: int, slot: Slot) -> "Slots":
        slots = self._with(index, slot)
        if index != self.active:
            return slots
        takes_over = self.pair[1 - index].phase is Phase.CONFIRMED
        return replace(slots, active=1 - index if takes_over else None)
