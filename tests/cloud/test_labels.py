"""Which word counts, and that SQL and Python mean the same."""

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.labels import Word, decide, parse_source, source_name
from cloud.sample_store import SampleKey, StoredLabel
from cloud.sqlite_store import SqliteSampleStore
from shoal.errors import PayloadError
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON as PERSON
from shoal.v1.command_pb2 import LABEL_SOURCE_TEACHER as TEACHER
from shoal.v1.command_pb2 import LABEL_SOURCE_WITH_SAMPLE as WITH_SAMPLE

KEYS = [SampleKey("cam-00", bytes(16), 1), SampleKey("cam-00", bytes(16), 2), SampleKey("cam-01", bytes(16), 1)]


def word(label, source=PERSON, author="ann", at=1, *, settles=False):
    return Word(label, source, author, at, settles)


@pytest.mark.parametrize(
    ("words", "label", "is_conflict"),
    [
        ([word(1, WITH_SAMPLE, at=9), word(2, TEACHER, at=5), word(3, PERSON, at=1)], 3, False),
        ([word(1, WITH_SAMPLE, at=9), word(2, TEACHER, at=5)], 2, False),
        ([word(1, WITH_SAMPLE)], 1, False),
        ([word(1, source=77), word(2, WITH_SAMPLE)], 2, False),
        ([word(1, TEACHER, "digits-3", 3), word(2, TEACHER, "digits-4", 4)], 2, True),
        ([word(2, TEACHER, "digits-3", 3), word(2, TEACHER, "digits-4", 4)], 2, False),
        ([word(1, author="ann", at=3), word(2, author="bob", at=4)], None, True),
        ([word(2, author="ann", at=3), word(2, author="bob", at=4)], 2, False),
        ([word(1, TEACHER), word(2, TEACHER, "b"), word(4)], 4, False),
    ],
    ids=[
        "a person stands above all",
        "a teacher above the device",
        "the device where nobody else speaks",
        "a source of a later version below all",
        "the newer of two teachers",
        "teachers agree",
        "persons differ",
        "persons agree",
        "what teachers differ about is over once a person speaks",
    ],
)
def test_best_source_and_then_the_newest_counts(words, label, is_conflict):
    """The table of the rule, in any order of the words."""
    for said in (words, words[::-1]):
        decision = decide(said)
        assert (decision.label, decision.is_conflict) == (label, is_conflict)


def test_who_has_seen_the_others_settles_it():
    """A settling word ends the conflict for either side; who says something else later opens it again."""
    ann, bob = word(1, author="ann", at=3), word(2, author="bob", at=4)
    settled = word(2, author="eve", at=5, settles=True)
    assert decide([ann, bob, settled]).label == 2
    assert decide([ann, bob, word(3, author="eve", at=5, settles=True)]).label == 3
    assert decide([ann, bob, settled, word(1, author="joe", at=6)]).label is None
    assert decide([ann, bob, settled, word(2, author="joe", at=6)]) == decide([settled, word(2, author="joe", at=6)])


def test_only_persons_settle():
    """A teacher's newest word counts anyhow, and what others said stays a conflict."""
    decision = decide([word(1, TEACHER, "a", 3), word(2, TEACHER, "b", 4, settles=True)])
    assert (decision.label, decision.is_conflict) == (2, True)


def test_nothing_said_decides_nothing():
    """A sample without words has no label and no conflict."""
    assert decide([]) is None


WORDS = st.builds(
    StoredLabel,
    device=st.just(""),
    epoch=st.just(b""),
    seq=st.just(0),
    label=st.integers(0, 3),
    source=st.sampled_from([PERSON, TEACHER, WITH_SAMPLE, 77, 0]),
    author=st.sampled_from(["ann", "bob", "é", "", "z\U0001f600", "\uffff"]),
    labelled_at_us=st.integers(0, 3),
    settles=st.booleans(),
)


@settings(deadline=None)
@given(said=st.lists(st.tuples(st.sampled_from(KEYS), WORDS), max_size=16), taken_back=st.integers(0, 3))
def test_store_decides_as_the_function_does(said, taken_back):
    """Whatever is said and taken back, in whatever order: the view, the table beside it and `decide` agree."""
    with closing(SqliteSampleStore(Path(":memory:"))) as store:
        labels = [StoredLabel(*key, *list(_rest(label))) for key, label in said]
        for label in labels:
            store.add_labels([label])
        for label in labels[:taken_back]:
            store.labels.take_back(label, None)
        expected = {}
        for key in KEYS:
            decision = store.labels.decision(key)
            if decision is not None:
                newest = decision.word
                expected[key] = (
                    decision.label,
                    newest.source,
                    newest.author,
                    newest.labelled_at_us,
                    decision.is_conflict,
                )
        for table in ("decided_labels", "effective_labels"):
            rows = store._db.conn.execute(f"SELECT * FROM {table}").fetchall()
            assert {SampleKey(*row[:3]): (*row[3:7], bool(row[7])) for row in rows} == expected


def _rest(label):
    return label.label, label.source, label.author, label.labelled_at_us, label.note, label.settles


@settings(deadline=None)
@given(said=st.lists(WORDS, max_size=6, unique_by=lambda label: (label.source, label.author)))
def test_order_of_arrival_changes_no_decision(said):
    """Labels come by several ways; which comes first must not matter."""
    words = [Word(item.label, item.source, item.author, item.labelled_at_us, item.settles) for item in said]
    assert decide(words) == decide(words[::-1])


def test_sources_have_names():
    """What a person types is what is shown; a number that nobody knows yet is shown as it is."""
    assert [parse_source(source_name(source)) for source in (PERSON, TEACHER, WITH_SAMPLE)] == [1, 2, 3]
    assert source_name(77) == "77"
    with pytest.raises(PayloadError, match="'nobody', expected one of"):
        parse_source("nobody")
