"""A full outbox and a full quarantine: who makes way, and that all of it is counted."""

import sqlite3
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.delivery.outbox import Item, Key, Limits, Outbox, Priority, Refusal
from shoal.delivery.schedule import Ranks

pytestmark = pytest.mark.device

_EPOCH = b"e" * 16
TELEMETRY, ALARM = Priority.TELEMETRY, Priority.ALARM


def item(seq, priority=TELEMETRY, payload=b"0123456789"):
    return Item(Key("cam", _EPOCH, seq), "digits", payload, priority)


def settled(box):
    counters = box.counters()
    accepted = counters.pop("accepted", 0)
    counters.pop("quarantine.forgotten", None)
    return accepted - counters.total()


@pytest.fixture
def box(tmp_path):
    limits = Limits(max_items=3, max_bytes=100, quarantine_items=3, quarantine_bytes=100)
    made = Outbox(tmp_path / "outbox.sqlite", limits)
    yield made
    made.close()


@pytest.mark.parametrize("is_committed", [True, False])
def test_oldest_telemetry_makes_way_for_an_alarm(box, is_committed):
    """Whether it is on disk already or not, it is counted as accepted and dropped."""
    for seq in range(3):
        box.put(item(seq))
    if is_committed:
        box.commit()
    assert box.put(item(3, ALARM))
    box.commit()
    assert [key.seq for key in box.waiting_keys()] == [1, 2, 3]
    assert box.counters() == {"accepted": 4, "dropped.displaced": 1}


def test_nothing_makes_way_for_its_equal_or_for_less(box):
    """What came first stays."""
    for seq in range(3):
        box.put(item(seq, ALARM))
    box.commit()
    assert not box.put(item(3, ALARM))
    assert not box.put(item(4, TELEMETRY))
    assert box.commit() == []


def test_nothing_is_dropped_in_vain(box):
    """An alarm too large to fit even then takes nobody's place."""
    box.put(item(0, ALARM, bytes(50)))
    box.put(item(1, TELEMETRY, bytes(40)))
    assert not box.put(item(2, ALARM, bytes(60)))
    assert box.owed == 2
    assert box.put(item(3, ALARM, bytes(50)))
    assert box.size_bytes == 100


def test_priority_survives_the_process(tmp_path):
    """And a store made before there were priorities holds telemetry."""
    path = tmp_path / "o.sqlite"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE items (id INTEGER PRIMARY KEY, device TEXT, epoch BLOB, seq INTEGER, model TEXT,"
            " payload BLOB, UNIQUE (device, epoch, seq))"
        )
        old.execute("INSERT INTO items VALUES (1, 'cam', ?, 7, 'digits', x'00')", (_EPOCH,))
    old.close()
    box = Outbox(path, Limits(max_items=2))
    assert box.put(item(8, ALARM))
    box.close()
    box = Outbox(path, Limits(max_items=2))
    assert box.put(item(9, ALARM))
    assert not box.put(item(10, ALARM))
    box.close()
    assert sorted(key.seq for key in Outbox(path).waiting_keys()) == [8, 9]


@given(
    st.lists(
        st.tuples(st.sampled_from(Priority), st.integers(1, 60), st.sampled_from(["put", "settle", "commit"])),
        max_size=60,
    )
)
def test_no_alarm_is_dropped_while_telemetry_waits(tmp_path_factory, steps):
    """At no time, by rows or by bytes; bounds hold and the books add up at each commit."""
    limits = Limits(max_items=5, max_bytes=150)
    box = Outbox(tmp_path_factory.mktemp("o") / "o.sqlite", limits)
    waiting = {}
    for seq, (priority, size, step) in enumerate(steps):
        if step == "commit":
            box.commit()
            assert settled(box) == box.in_flight == len(waiting)
        elif step == "settle":
            for key in [key for key in box.waiting_keys() if key.seq % 3 == 0]:
                assert box.settle(key, "answered")
                del waiting[key.seq]
        else:
            is_in = box.put(item(seq, priority, bytes(size)))
            left = {key.seq for key in box._waiting}
            gone = {waiting[other].priority for other in waiting.keys() - left}
            assert ALARM not in gone
            assert not gone or priority is ALARM
            if not is_in and priority is ALARM:
                # All telemetry together would not have been enough, and all of it is still there.
                alarms = [one for one in waiting.values() if one.priority is ALARM]
                assert len(alarms) == 5 or sum(len(one.payload) for one in alarms) + size > 150
            waiting = {other: one for other, one in waiting.items() if other in left}
            if is_in:
                waiting[seq] = item(seq, priority, bytes(size))
        assert set(waiting) == {key.seq for key in box._waiting}
        assert box.owed <= 5
        assert box.size_bytes <= 150
    box.close()


def test_victims_are_found_without_looking_at_those_that_stay():
    """A full outbox in an alarm storm must not take time for each item that it holds."""
    ranks = Ranks()
    keys = [item(seq).key for seq in range(100)]
    for key in keys:
        ranks.add(key, TELEMETRY, 10)
    assert ranks.victims(ALARM, 1, 25) == keys[:3]
    ranks.remove(keys[0], TELEMETRY)
    assert ranks.victims(ALARM, 2, 0) == keys[1:3]
    assert ranks.victims(ALARM, 100, 0) == []
    assert ranks.victims(TELEMETRY, 1, 0) == []


def set_aside(box):
    rows = box._store.db.execute("SELECT seq, payload, size_bytes, status, field, message FROM quarantine ORDER BY id")
    return rows.fetchall()


@pytest.mark.parametrize("is_committed", [True, False])
def test_quarantine_takes_over_item_and_reason(box, is_committed):
    """In the transaction that takes it off the queue; what cannot be known to the peer is not refused by it."""
    box.put(item(1))
    if is_committed:
        box.commit()
    refusal = Refusal("INVALID_ARGUMENT", "rows[0]", "too hot")
    assert box.quarantine(item(1).key, refusal) is is_committed
    assert not box.quarantine(item(9).key, refusal)
    box.commit()
    rows = [(1, b"0123456789", 10, "INVALID_ARGUMENT", "rows[0]", "too hot")]
    assert (set_aside(box), box.in_flight) == ((rows, 0) if is_committed else ([], 1))


def test_quarantine_is_bounded_and_forgets_the_oldest_first(box):
    """By rows and by bytes, counted; a single reading larger than all of it is there without its payload."""
    for seq in range(5):
        box.refuse(item(seq), Refusal("TOO_LARGE"))
        box.commit()
    assert [row[0] for row in set_aside(box)] == [2, 3, 4]
    box.refuse(item(5, payload=bytes(85)), Refusal("TOO_LARGE"))
    box.commit()
    assert [row[0] for row in set_aside(box)] == [4, 5]
    box.refuse(item(6, payload=bytes(101)), Refusal("TOO_LARGE"))
    box.commit()
    assert [row[:3] for row in set_aside(box)][-1] == (6, b"", 101)
    assert Counter(box.counters()) == {"accepted": 7, "quarantined": 7, "quarantine.forgotten": 4}


def test_what_is_in_quarantine_holds_up_nobody(box):
    """It takes no room of the queue, and the next is sent."""
    for seq in range(9):
        assert box.put(item(seq))
        box.commit()
        assert [one.key.seq for one, _ in box.take(0.0, 9, 1.0)] == [seq]
        assert box.quarantine(item(seq).key, Refusal("INVALID_ARGUMENT"))
