"""Readings of a device whose clock was wrong, dated by what the same boot said later."""

from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.sample_store import StoredSample
from cloud.sqlite_store import SqliteSampleStore
from shoal.v1.node_pb2 import NodeState
from shoal.v1.sensor_pb2 import TIME_QUALITY_SYNCED, TIME_QUALITY_UNSYNCED

BOOT, OTHER = b"b" * 16, b"o" * 16
BEGAN_US = 1_700_000_000_000_000


def sample(seq, boot_id=BOOT, since_boot_us=7_000_000):
    nothing = [None] * 6
    return StoredSample("cam", bytes(16), seq, "m", "gw", 1, "", 55, 66, b"r%d" % seq, *nothing, boot_id, since_boot_us)


def state(quality=TIME_QUALITY_SYNCED, since_boot_us=90_000_000, boot_id=BOOT, at_us=None):
    at_us = BEGAN_US + since_boot_us if at_us is None else at_us
    return NodeState(boot_id=boot_id, since_boot_us=since_boot_us, at_us=at_us, time_quality=quality)


@pytest.fixture
def store(tmp_path):
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as store:
        yield store


def dated(store):
    return dict(store._db.execute("SELECT seq, dated_at_us FROM dated_samples").fetchall())


def test_later_state_with_a_right_clock_dates_what_was_taken_before(store):
    """A reading of second 7 of a boot; one of another boot, and one whose clock was right, stay as they are."""
    store.add([sample(1), sample(2, OTHER), sample(3, None, None)])
    assert dated(store) == {1: 55, 2: 55, 3: 55}
    store.boots.note(state(), 1, retained=True)
    assert dated(store) == {1: BEGAN_US + 7_000_000, 2: 55, 3: 55}


def test_earliest_arrival_stands_in_until_a_clock_is_right(store):
    """Each message was on its way for some time, so that the earliest guess is the best; the exact one ends it."""
    store.add([sample(1)])
    for delay_us in (5_000_000, 2_000_000, 9_000_000):
        received_us = BEGAN_US + 90_000_000 + delay_us
        store.boots.note(state(TIME_QUALITY_UNSYNCED, at_us=0), received_us, retained=False)
    assert dated(store) == {1: BEGAN_US + 7_000_000 + 2_000_000}
    store.boots.note(state(), 1, retained=False)
    store.boots.note(state(TIME_QUALITY_UNSYNCED, at_us=0), BEGAN_US, retained=False)
    assert dated(store) == {1: BEGAN_US + 7_000_000}


def test_retained_state_with_a_wrong_clock_says_nothing(store):
    """It may have been published days ago."""
    store.add([sample(1)])
    store.boots.note(state(TIME_QUALITY_UNSYNCED), BEGAN_US, retained=True)
    assert dated(store) == {1: 55}


def test_what_was_learned_outlives_the_process(store, tmp_path):
    """A guess of the next process does not replace what this one knew exactly."""
    store.add([sample(1)])
    store.boots.note(state(), 1, retained=False)
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as again:
        again.boots.note(state(TIME_QUALITY_UNSYNCED), 1, retained=False)
        assert dated(again) == {1: BEGAN_US + 7_000_000}


STATES = st.builds(
    NodeState,
    boot_id=st.binary(max_size=40) | st.just(BOOT),
    since_boot_us=st.integers(0, (1 << 64) - 1),
    at_us=st.integers(-(1 << 63), (1 << 63) - 1),
    time_quality=st.integers(0, 4),
)


@given(state=STATES, retained=st.booleans())
def test_no_state_breaks_it(tmp_path_factory, state, retained):
    """Numbers that SQLite has no integer for, and ids that are none, are passed over."""
    with closing(SqliteSampleStore(tmp_path_factory.mktemp("s") / "samples.sqlite")) as store:
        store.add([sample(1)])
        store.boots.note(state, 1 << 50, retained=retained)
        assert len(dated(store)) == 1
