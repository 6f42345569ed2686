from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.errors import PayloadError
from simulator.annotator import Annotator, Labelled, Seen

DELAY_S = 5.0
MAX_PER_CALL = 3
MAX_QUEUED = 6


class FakeLabels:
    """References are numbers; each fifth is held out and the label is the number's last digit."""

    def label_of(self, reference):
        return int(self._number(reference) % 10)

    def is_held_out(self, reference):
        return self._number(reference) % 5 == 0

    def _number(self, reference):
        if not reference.isdecimal():
            raise PayloadError("not a number", field="reference")
        return int(reference)


class AnnotatorMachine(RuleBasedStateMachine):
    """Shows samples, repeats them and collects labels in any order, with time that only goes forward."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.annotator = Annotator(DELAY_S, FakeLabels(), max_per_call=MAX_PER_CALL, max_queued=MAX_QUEUED)
        self.queued_at = {}
        self.labelled = Counter()

    @rule(number=st.integers(0, 40))
    def see(self, number):
        seen = self.annotator.see(number, str(number), self.now)
        if number % 5 == 0:
            assert seen is Seen.HELD_OUT
        elif number in self.queued_at:
            assert seen is Seen.KNOWN
        elif len(self.queued_at) - self.labelled.total() == MAX_QUEUED:
            assert seen is Seen.FULL
        else:
            assert seen is Seen.QUEUED
            self.queued_at[number] = self.now

    @rule(passed_s=st.floats(0, 10))
    def wait(self, passed_s):
        self.now += passed_s

    @rule()
    def collect(self):
        owed = [k for k, at in self.queued_at.items() if at + DELAY_S <= self.now and not self.labelled[k]]
        labelled = self.annotator.due(self.now)
        assert [label.key for label in labelled] == owed[:MAX_PER_CALL]
        assert all(label.label == label.key % 10 for label in labelled)
        self.labelled.update(label.key for label in labelled)

    @invariant()
    def each_key_once_and_bounded(self):
        assert max(self.labelled.values(), default=0) <= 1
        assert self.annotator.queued == len(self.queued_at) - self.labelled.total() <= MAX_QUEUED

    def teardown(self):
        """Whatever was queued is labelled in the end."""
        self.now += DELAY_S
        for _ in range(MAX_QUEUED):
            self.collect()
        assert set(self.labelled) == set(self.queued_at)


TestAnnotator = AnnotatorMachine.TestCase


def test_label_is_due_when_its_delay_has_passed_and_not_before():
    """Pins the edge: at the delay, not one instant earlier."""
    annotator = Annotator(DELAY_S, FakeLabels())
    annotator.see("a", "3", now=100.0)
    assert annotator.due(104.999) == []
    assert annotator.due(105.0) == [Labelled("a", 3)]
    assert annotator.due(1000.0) == []


def test_unknown_reference_changes_nothing():
    """Pins that a sample without a known reference is the caller's to count and nobody else's problem."""
    annotator = Annotator(DELAY_S, FakeLabels())
    with pytest.raises(PayloadError):
        annotator.see("a", "picture.jpg", now=0.0)
    assert annotator.queued == 0
    assert annotator.see("a", "3", now=0.0) is Seen.QUEUED


def test_sample_turned_away_may_come_again():
    """Pins that a full queue forgets nothing for ever."""
    annotator = Annotator(0.0, FakeLabels(), max_queued=1)
    assert [annotator.see(key, "3", now=0.0) for key in "ab"] == [Seen.QUEUED, Seen.FULL]
    assert annotator.due(0.0) == [Labelled("a", 3)]
    assert annotator.see("b", "3", now=0.0) is Seen.QUEUED


@given(shown=st.integers(1, 50), max_known=st.integers(1, 10))
def test_memory_of_keys_is_bounded(shown, max_known):
    """Pins that the newest keys are known and the memory does not grow."""
    annotator = Annotator(0.0, FakeLabels(), max_queued=1, max_known=max_known)
    for key in range(shown):
        annotator.see(key, "3", now=0.0)
        annotator.due(0.0)
    assert len(annotator._known) == min(shown, max_known)
    assert annotator.see(shown - 1, "3", now=0.0) is Seen.KNOWN


@pytest.mark.parametrize(
    "limits", [{"delay_s": -1}, {"max_per_call": 0}, {"max_queued": 0}, {"max_queued": 5, "max_known": 4}]
)
def test_impossible_limits_are_refused(limits):
    """Pins that a limit that would stop the annotator for ever is a mistake."""
    with pytest.raises(ValueError, match="expected"):
        Annotator(**{"delay_s": 0.0, "labels": FakeLabels(), **limits})
