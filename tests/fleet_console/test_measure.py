import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_console.demo.measure import (
    Accuracy,
    AccuracyPoint,
    Mark,
    accuracy,
    accuracy_by_release,
    accuracy_over_time,
    latencies_ms,
    make_books,
    marks,
    percentiles,
    uplink,
)
from fleet_console.demo.observer import Seen
from shoal.delivery.ledger import Row, reconcile
from shoal.v1.node_pb2 import NodeState
from simulator.journal import Entry
from simulator.script import Phase


@pytest.fixture
def story(read, reply):
    """A camera's life in seven readings, small enough to count by hand."""
    return [
        read(0),
        read(1, predicted=5, reason="asked.score"),
        reply(1, predicted=3),
        read(2, predicted=5, held_out=0),
        read(3, predicted=None),
        read(10, phase="after_drift", predicted=5, reason="asked.score"),
        reply(10, predicted=8),
        read(11, phase="after_drift", reason="asked.audit"),
        reply(11, predicted=8),
        read(20, phase="after_update", release=2),
    ]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        # The gateway mends reading 1; reading 2 was trained on and reading 3 has no answer: neither counts.
        (Phase.BEFORE_DRIFT, Accuracy(device=0.5, cascade=1.0, readings=2)),
        # The gateway's answer is the application's, also where it is worse.
        (Phase.AFTER_DRIFT, Accuracy(device=0.5, cascade=0.0, readings=2)),
        (Phase.AFTER_UPDATE, Accuracy(device=1.0, cascade=1.0, readings=1)),
        (Phase.WAITING, Accuracy(device=0.0, cascade=0.0, readings=0)),
    ],
)
def test_accuracy_counts_answered_held_out_readings_of_its_phase(story, phase, expected):
    """Pins what is counted and whose answer is the cascade's."""
    assert accuracy(story, phase) == expected


def test_accuracy_by_release_is_keyed_by_release_and_phase(story):
    """Pins keys, order and figures of the live view."""
    assert list(accuracy_by_release(story).items()) == [
        ((1, "after_drift"), Accuracy(0.5, 0.0, 2)),
        ((1, "before_drift"), Accuracy(0.5, 1.0, 2)),
        ((2, "after_update"), Accuracy(1.0, 1.0, 1)),
    ]


def test_accuracy_over_time_leaves_out_windows_without_a_held_out_reading(story):
    """Pins the windows' middles, counted from the first reading, and the gaps between them."""
    assert accuracy_over_time(story, window_s=5.0) == [
        AccuracyPoint(2.5, 0.5, 1.0, 2),
        AccuracyPoint(12.5, 0.5, 0.0, 2),
        AccuracyPoint(22.5, 1.0, 1.0, 1),
    ]


def test_reply_of_another_device_with_the_same_number_changes_nothing(read, reply):
    """Pins that numbers are each device's own."""
    entries = [read(0, predicted=5), reply(0, device="cam-01", predicted=3)]
    assert accuracy(entries, Phase.BEFORE_DRIFT) == Accuracy(0.0, 0.0, 1)


def _entry(event, seq, **fields):
    blank = dict.fromkeys(("device", "reference", "phase", "reason"), "x")
    numbers = dict.fromkeys(("release", "score", "latency_ms", "bytes_json", "bytes_json_compact"), 0)
    return Entry(
        **{"at": float(seq), "event": event, "seq": seq, "label": 3, "held_out": 1, **blank, **numbers, **fields}
    )


@given(
    answers=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([None, 3, 5]), st.integers(0, 1), st.sampled_from([None, 3, 5]))
    )
)
def test_readings_are_grouped_without_loss(answers):
    """Pins that releases and windows split the same readings: none is counted twice or forgotten."""
    entries = []
    for seq, (release, predicted, held_out, answer) in enumerate(answers):
        fields = {"release": release, "predicted": predicted, "held_out": held_out}
        entries.append(_entry("read", seq, **fields))
        if answer is not None:
            entries.append(_entry("reply", seq, predicted=answer))
    scored = sum(1 for _, predicted, held_out, _ in answers if held_out and predicted is not None)
    groups = accuracy_by_release(entries).values()
    points = accuracy_over_time(entries, 3.0)
    assert sum(group.readings for group in groups) == scored == sum(point.readings for point in points)
    right = sum(group.device * group.readings for group in groups)
    assert right == pytest.approx(sum(point.device * point.readings for point in points))


def test_marks_name_the_first_drift_and_each_release_once(story):
    """Pins texts and times, in seconds since the first reading."""
    assert marks(story) == [Mark(0.0, "release 1"), Mark(10.0, "drift begins"), Mark(20.0, "release 2")]


def test_reading_without_a_release_is_no_release(read):
    """Pins that release 0 means that no model was there."""
    assert marks([read(0, release=0), read(1)]) == [Mark(1.0, "release 1")]


def test_nothing_read_measures_nothing():
    """Pins that an empty journal is no error: a run may end before its first reading."""
    assert accuracy_by_release([]) == {}
    assert accuracy_over_time([], 3.0) == []
    assert marks([]) == []
    assert uplink([], {Row("a", 1)}, Seen()).recall == 0


def test_uplink_counts_what_the_cloud_has_of_what_was_read(read, reply):
    """Pins each share against a journal of four readings; rows of other fleets in the store do not count."""
    entries = [
        read(0, label=1, reason="asked.score"),
        read(1, label=1),
        read(2, label=0, reason="asked.audit"),
        read(3, label=0),
        reply(0),
    ]
    found = uplink(entries, {Row("cam-00", 0), Row("cam-00", 2), Row("cam-07", 1)}, Seen(10, 20.4))
    assert (found.readings, found.anomalies) == (4, 2)
    assert (found.recall, found.precision) == (0.5, 0.5)
    assert (found.asked_share, found.uplink_share) == (0.5, 0.5)
    assert (found.bytes_sent, found.bytes_all_json, found.bytes_all_json_compact) == (30, 800, 320)


def test_percentiles_are_numpys_rounded_to_microseconds():
    """Pins names and values, which the report prints as they are."""
    assert percentiles([float(value) for value in range(1, 102)]) == {"p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert percentiles([0.12345]) == {"p50": 0.123, "p90": 0.123, "p99": 0.123}
    assert percentiles([]) == {}


def test_latencies_are_those_of_replies(read, reply):
    """Pins that a reading, which has no latency, is none of 0 ms."""
    assert latencies_ms([read(0), reply(0, latency_ms=7.5)]) == [7.5]


def _books(read, **changes):
    entries = [read(0, device="a"), read(1, device="a", reason="asked.score"), read(0, device="endless")]
    seen = Seen(asked={Row("a", 1)}, answered={Row("a", 1)}, promised={Row("a", 1)})
    states = {
        "a": NodeState(counters={"kept.below_threshold": 1, "accepted": 1, "answered": 1}),
        "endless": NodeState(counters={"kept.below_threshold": 1}),
    }
    arguments = {
        "entries": entries,
        "seen": [seen, Seen()],
        "states": states,
        "stored": [(Row("a", 1), "row/1")],
        "set_aside": 0,
        "expected": {("a", "row/0"), ("a", "row/1")},
    }
    return make_books(**(arguments | changes))


def test_books_of_a_journal_balance(read):
    """Pins that each witness lands in its own column, and that endless sources cannot fall short."""
    books = _books(read)
    assert books.wanted == {Row("a", 1)}
    assert books.produced == {Row("a", 0): "row/0", Row("a", 1): "row/1", Row("endless", 0): "row/0"}
    account = reconcile(books)
    assert account.named_holes == []
    assert (account.produced, account.kept, account.accepted, account.answered) == (3, 2, 1, 1)
    assert (account.samples_promised, account.samples_stored) == (1, 1)


def test_finite_source_that_was_not_read_whole_is_a_hole(read):
    """Pins the one check that only the data set itself can make."""
    account = reconcile(_books(read, expected={("a", "row/0"), ("a", "row/1"), ("a", "row/2")}))
    assert account.named_holes == ["a never read row/2"]


def test_books_without_witnesses_or_expectations_are_empty():
    """Pins that a run which saw nothing still closes its books."""
    books = make_books([], [], {}, [], set_aside=0, expected=set())
    assert reconcile(books).holes == 0
    assert books.expected == frozenset()
