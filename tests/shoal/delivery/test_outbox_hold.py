"""An outbox that spares the flash: held in memory while all goes well, on disk before a kill could take much."""

import contextlib
import sqlite3

import pytest

from shoal.delivery.outbox import Hold, Item, Key, Limits, Outbox, Refusal

pytestmark = pytest.mark.device

_EPOCH = b"e" * 16
HOLD = Hold(max_s=5.0, max_items=4, max_bytes=100)


def item(seq, payload=b"0123456789"):
    return Item(Key("cam", _EPOCH, seq), "digits", payload)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "o.sqlite"


@pytest.fixture
def box(path):
    made = Outbox(path, hold=HOLD)
    yield made
    made.close()


def on_disk(path):
    """Numbers of the items, and the counters, as another process sees them."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        items = [seq for (seq,) in db.execute("SELECT seq FROM items ORDER BY id")]
        return items, dict(db.execute("SELECT name, value FROM counters"))


def sent(box, now=0.0):
    return [one.key.seq for one, _ in box.take(now, 99, 10.0)]


def test_held_item_is_sent_and_settled_without_touching_the_disk(box, path):
    """Pins what the mode is for, and that nothing is called accepted before it is committed."""
    box.put(item(1))
    assert [(one, attempts) for one, attempts in box.take(0.0, 9, 10.0)] == [(item(1), 0)]
    assert (box.in_flight, box.owed, box.waiting_keys()) == (0, 1, [])
    assert box.settle(item(1).key, "answered")
    box.commit_due(0.1, is_connected=True)
    assert on_disk(path) == ([], {})
    box.commit_due(5.1, is_connected=True)
    assert on_disk(path) == ([], {"accepted": 1, "answered": 1})
    assert not box.is_dirty


@pytest.mark.parametrize(
    ("now", "is_connected", "is_written"), [(4.9, True, False), (5.0, True, True), (0.1, False, True)]
)
def test_what_is_not_answered_is_written_in_time(box, path, now, is_connected, is_written):
    """After the hold's seconds, and at once when the link is down."""
    box.commit_due(0.0, is_connected=True)
    box.put(item(1))
    box.commit_due(0.0, is_connected=True)
    box.commit_due(now, is_connected=is_connected)
    assert on_disk(path) == (([1], {"accepted": 1}) if is_written else ([], {}))


def test_the_time_counts_from_the_first_change(box, path):
    """A steady flow does not put the commit off for ever."""
    for step in range(6):
        assert on_disk(path)[0] == []
        box.count("cam", "produced")
        box.commit_due(float(step), is_connected=True)
    assert on_disk(path)[1] == {"produced": 6}
    box.count("cam", "produced")
    box.commit_due(9.0, is_connected=True)
    assert on_disk(path)[1] == {"produced": 6}


@pytest.mark.parametrize(("payload", "count"), [(b"0123456789", 4), (bytes(60), 2), (bytes(100), 1)])
def test_no_more_is_held_than_may_be_lost(box, path, payload, count):
    """By rows and by bytes, whatever the time."""
    for seq in range(count):
        assert on_disk(path)[0] == []
        box.put(item(seq, payload))
    assert on_disk(path) == (list(range(count)), {"accepted": count})


def test_held_item_that_is_refused_is_in_quarantine(box, path):
    """Its payload comes from memory."""
    box.put(item(1))
    assert box.quarantine(item(1).key, Refusal("INVALID_ARGUMENT", "rows[0]", "no"))
    box.commit()
    assert on_disk(path) == ([], {"accepted": 1, "quarantined": 1})
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT seq, payload, status FROM quarantine").fetchall() == [
            (1, b"0123456789", "INVALID_ARGUMENT")
        ]


def test_same_key_is_taken_again_after_it_was_settled(box, path):
    """On disk or not: the books count it as often as it was accepted."""
    for _ in range(3):
        box.put(item(1))
        box.settle(item(1).key, "answered")
    box.put(item(1))
    box.commit()
    box.settle(item(1).key, "answered")
    box.put(item(1))
    box.commit()
    assert on_disk(path) == ([1], {"accepted": 5, "answered": 4})


def test_kill_takes_what_was_held_and_nothing_else(path):
    """What was on disk waits, as a replay; what was settled since comes back and is settled once."""
    box = Outbox(path, hold=HOLD)
    box.put(item(1))
    box.commit()
    box.settle(item(1).key, "answered")
    box.put(item(2))
    assert sent(box) == [2]
    box._store.close()
    again = Outbox(path, hold=HOLD)
    assert [(one.key.seq, attempts) for one, attempts in again.take(0.0, 9, 10.0)] == [(1, 1)]
    assert again.settle(item(1).key, "answered")
    assert not again.settle(item(2).key, "answered")
    again.close()
    assert on_disk(path) == ([], {"accepted": 1, "answered": 1})


def test_bounds_of_the_store_hold_for_what_is_held(path):
    """Whether it is on disk or not."""
    box = Outbox(path, Limits(max_items=2), hold=HOLD)
    assert [box.put(item(seq)) for seq in range(3)] == [True, True, False]
    assert box.settle(item(0).key, "answered")
    assert box.put(item(3))
    box.close()
    assert on_disk(path) == ([1, 3], {"accepted": 3, "answered": 1})


def test_without_a_hold_every_tick_commits(path):
    """The default: nothing is sent that a kill could take."""
    box = Outbox(path)
    box.put(item(1))
    assert sent(box) == []
    box.commit_due(0.0, is_connected=True)
    assert on_disk(path)[0] == sent(box) == [1]
    box.close()
