"""Asking a person for labels, one sample after the other; each answer is stored before the next question."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloud.label_book import LabelBook, Question, Why
from cloud.label_csv import MAX_LABEL
from cloud.sample_store import StoredLabel, StoredSample
from fleet_console.sample_picture import draw, sketch
from shoal.errors import PayloadError
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON
from shoal.v1.sensor_pb2 import SensorData

HELP = "a number is the label; s skips, u takes the last label back, q ends"


class LabelledStore(Protocol):
    """What labels go to."""

    @property
    def labels(self) -> LabelBook: ...
    def add_labels(self, labels: Iterable[StoredLabel]) -> int: ...


class Terminal(Protocol):
    """Whom we ask."""

    def say(self, text: str) -> None: ...
    def show(self, path: Path) -> None:
        """Bring a file before their eyes."""

    def ask(self, prompt: str) -> str:
        """Return a line of theirs.

        Raises:
            EOFError: there is nobody.
        """


@dataclass(frozen=True, slots=True)
class Outcome:
    labelled: int
    skipped: int


@dataclass(frozen=True, slots=True)
class _Given:
    question: Question
    label: StoredLabel
    before: StoredLabel | None


class Labelling:
    """One sitting of one person.

    Args:
        classes: how many there are; None where nobody knows.
        reveal: show what device and gateway answered before, not after; that sways people.
    """

    def __init__(
        self,
        store: LabelledStore,
        terminal: Terminal,
        author: str,
        *,
        picture: Path,
        classes: int | None = None,
        reveal: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._terminal = terminal
        self._author = author
        self._picture = picture
        self._most = MAX_LABEL if classes is None else classes - 1
        self._reveal = reveal
        self._wall_clock = wall_clock
        self._given: list[_Given] = []
        self._skipped = 0

    @property
    def outcome(self) -> Outcome:
        return Outcome(len(self._given), self._skipped)

    def run(self, questions: Iterable[Question]) -> Outcome:
        """Ask until there is nothing more to ask, or the person has had enough."""
        waiting = deque(questions)
        total = len(waiting)
        while waiting or self._wants_last_again(waiting):
            question = waiting.popleft()
            sample = self._store.labels.sample(question.key)
            if sample is None:
                continue  # dropped since
            self._show(question, sample, f"{total - len(waiting)} of {total}")
            answer = self._ask()
            if answer == "q":
                break
            if answer == "u":
                waiting.appendleft(question)
                if self._given:
                    waiting.appendleft(self._take_back())
                else:
                    self._terminal.say("There is nothing to take back.")
            elif answer == "s":
                self._skipped += 1
            else:
                self._keep(question, int(answer))
                if not self._reveal:
                    self._terminal.say(answers_of(sample))
        return self.outcome

    def _show(self, question: Question, sample: StoredSample, place: str) -> None:
        said = f"{place}: {sample.device} {sample.epoch.hex()} {sample.seq}"
        if question.why is Why.CONFLICT:
            words = sorted({word.label for word in self._store.labels.words(question.key)})
            said += f", others said {' and '.join(map(str, words))}; your word settles it"
        self._terminal.say(said)
        reading = SensorData.FromString(sample.reading)
        try:
            if text := sketch(reading):
                self._terminal.say(text)
            self._terminal.show(draw(reading, self._picture))
        except PayloadError as exc:
            self._terminal.say(f"It cannot be shown: {exc}")
        if self._reveal:
            self._terminal.say(answers_of(sample))

    def _ask(self) -> str:
        while True:
            try:
                answer = self._terminal.ask("label, s, u, q or ?: ").strip().lower()
            except EOFError:
                return "q"
            if answer in {"s", "u", "q"}:
                return answer
            if answer.isascii() and answer.isdigit() and len(answer) <= len(str(MAX_LABEL)):
                if int(answer) <= self._most:
                    return answer
                self._terminal.say(f"Labels go from 0 to {self._most}.")
            else:
                self._terminal.say(HELP)

    def _wants_last_again(self, waiting: deque[Question]) -> bool:
        """At the end, where nothing else would let them correct the last answer."""
        if not self._given:
            return False
        try:
            answer = self._terminal.ask("That was all; u takes the last label back, Enter ends: ").strip().lower()
        except EOFError:
            return False
        if answer == "u":
            waiting.append(self._take_back())
        return bool(waiting)

    def _keep(self, question: Question, value: int) -> None:
        label = StoredLabel(
            *question.key,
            label=value,
            source=LABEL_SOURCE_PERSON,
            author=self._author,
            labelled_at_us=int(self._wall_clock() * 1e6),
            settles=question.why is Why.CONFLICT,
        )
        mine = (word for word in self._store.labels.words(question.key) if word.source == LABEL_SOURCE_PERSON)
        before = next((word for word in mine if word.author == self._author), None)
        self._store.add_labels([label])
        self._given.append(_Given(question, label, before))

    def _take_back(self) -> Question:
        last = self._given.pop()
        self._store.labels.take_back(last.label, last.before)
        return last.question


def answers_of(sample: StoredSample) -> str:
    """What the models made of it, in words."""
    device = _answer("device", sample.device_release, sample.device_label, sample.device_score)
    return f"{device}; {_answer('gateway', sample.gateway_release, sample.gateway_label, sample.gateway_score)}"


def _answer(who: str, release: int | None, label: int | None, score: float | None) -> str:
    if release is None or score is None:
        return f"the {who} gave no answer"
    said = "gave no class" if label is None else f"said {label}"
    return f"the {who}'s release {release} {said}, score {score:.3g}"
