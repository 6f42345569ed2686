"""What goes and what stays, and that what went is known still."""

import logging
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.pruning import Retention, prune
from cloud.retention import Limits, Row, Sweep, Worth, choose_to_drop, next_pass
from cloud.sample_store import Fate, StoredLabel, StoredSample
from cloud.sqlite_store import SqliteSampleStore
from shoal.tensors import to_tensor
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER
from shoal.v1.sensor_pb2 import SensorData

PATIENCE_S = 30.0
DAY_US = 86_400_000_000
NOW_US = 1000 * DAY_US
EPOCH = bytes(range(16))
SIZE = 600
EVERYTHING = Limits(keep_us=0, max_age_us=0, max_bytes=1)

# Drops one row after the other for ever, and says so after each.
PRUNER = """
import sys
from pathlib import Path
from cloud.pruning import prune
from cloud.retention import Limits, Sweep
from cloud.sqlite_store import SqliteSampleStore
store = SqliteSampleStore(Path(sys.argv[1]))
sweep = Sweep()
while sweep is not None:
    done = prune(store._db, sweep, Limits(0, 0, 1), 10**15, step_rows=7)
    print(done.too_much, flush=True)
    sweep = done.next
"""


# -- the decision ------------------------------------------------------------------------------------------------------


def row(number, days, size=10, **fields):
    flags = {"is_labelled": False, "is_by_person": False, "is_hard": False, "is_disputed": False} | fields
    return Row(number, NOW_US - int(days * DAY_US), size, **flags)


@pytest.mark.parametrize(
    ("fields", "worth"),
    [
        ({}, Worth.ROUTINE),
        ({"is_disputed": True}, Worth.DISPUTED),
        ({"is_labelled": True}, Worth.LABELLED),
        ({"is_labelled": True, "is_disputed": True}, Worth.LABELLED),
        ({"is_labelled": True, "is_hard": True}, Worth.KEPT),
        ({"is_labelled": True, "is_by_person": True}, Worth.KEPT),
    ],
)
def test_worth_is_what_a_label_would_teach(fields, worth):
    """The table of what is kept longest."""
    assert row(1, 1, **fields).worth is worth


def test_age_takes_all_but_what_is_kept():
    """Too old is too old whatever it is worth, in the first pass and only there."""
    limits = Limits(keep_us=7 * DAY_US, max_age_us=30 * DAY_US, max_bytes=0)
    rows = [
        row(1, 31),
        row(2, 31, is_labelled=True),
        row(3, 31, is_labelled=True, is_by_person=True),
        row(4, 31, is_labelled=True, is_hard=True),
        row(5, 29),
    ]
    assert choose_to_drop(rows, NOW_US, limits, Worth.ROUTINE, 0).too_old == [1, 2]
    assert choose_to_drop(rows, NOW_US, limits, Worth.LABELLED, 0).too_old == []


def test_bytes_take_the_oldest_of_the_least_worth_and_no_more_than_needed():
    """Dropping ends with the row that makes enough room."""
    limits = Limits(keep_us=7 * DAY_US, max_age_us=0, max_bytes=1000)
    rows = [row(1, 30, is_disputed=True), row(2, 20), row(3, 19), row(4, 18), row(5, 1)]
    drops = choose_to_drop(rows, NOW_US, limits, Worth.ROUTINE, excess_bytes=15)
    assert (drops.too_old, drops.too_much, drops.freed_bytes) == ([], [2, 3], 20)
    assert choose_to_drop(rows, NOW_US, limits, Worth.DISPUTED, 15).too_much == [1]


ROWS = st.lists(
    st.builds(
        Row,
        number=st.just(0),
        received_at_us=st.integers(NOW_US - 60 * DAY_US, NOW_US + DAY_US),
        size_bytes=st.integers(0, 100),
        is_labelled=st.booleans(),
        is_by_person=st.booleans(),
        is_hard=st.booleans(),
        is_disputed=st.booleans(),
    ),
    max_size=12,
)
LIMITS = st.builds(
    Limits, st.integers(0, 40 * DAY_US), st.just(0) | st.integers(1, 50 * DAY_US), st.integers(1, 800) | st.just(0)
)


@given(rows=ROWS, limits=LIMITS, step=st.integers(1, 5))
def test_sweep_leaves_what_is_kept_and_the_most_worth(rows, limits, step):
    """For any store and step: what is kept stays, what is too old goes, and what is worth least goes first."""
    left = {number: Row(number, *_values(item)[1:]) for number, item in enumerate(rows, start=1)}
    stored = dict(left)
    too_much = []
    sweep = Sweep()
    while sweep is not None:
        excess = sum(item.size_bytes for item in left.values()) - limits.max_bytes if limits.max_bytes else 0
        part = [left[number] for number in sorted(left) if number > sweep.after][:step]
        drops = choose_to_drop(part, NOW_US, limits, sweep.worth, excess)
        for number in drops.too_old + drops.too_much:
            del left[number]
        too_much += drops.too_much
        here = Sweep(sweep.worth, part[-1].number if part else 0)
        sweep = here if len(part) == step else next_pass(here, excess - drops.freed_bytes)
    free = [
        item for item in left.values() if item.worth < Worth.KEPT and NOW_US - item.received_at_us >= limits.keep_us
    ]
    for number, item in stored.items():
        if number not in left:
            assert item.worth < Worth.KEPT
            assert NOW_US - item.received_at_us >= limits.keep_us
    if limits.max_age_us:
        assert all(NOW_US - item.received_at_us <= limits.max_age_us for item in free)
    size = sum(item.size_bytes for item in left.values())
    assert not free or not limits.max_bytes or size <= limits.max_bytes
    gone = [(stored[number].worth, number) for number in too_much]
    assert all(one < (item.worth, item.number) for one in gone for item in free)


def _values(item):
    return [getattr(item, name) for name in Row.__slots__]


# -- the store ---------------------------------------------------------------------------------------------------------


def sample(seq, days=10.0, reading=None, **fields):
    values = {
        "device": "cam-00",
        "epoch": EPOCH,
        "seq": seq,
        "model": "digits",
        "gateway": "gw-01",
        "reason": 1,
        "reference": f"d/{seq}",
        "captured_at_us": 5,
        "received_at_us": NOW_US - int(days * DAY_US),
        "reading": bytes(SIZE) if reading is None else reading,
        "device_release": 1,
        "device_score": 0.5,
        "device_label": 3,
        "gateway_release": 1,
        "gateway_score": 0.1,
        "gateway_label": 3,
    }
    return StoredSample(**(values | fields))


def label(seq, value=3, source=LABEL_SOURCE_PERSON):
    return StoredLabel("cam-00", EPOCH, seq, value, source, "ann", 9)


@pytest.fixture
def store(tmp_path):
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as store:
        yield store


def sweep(store, limits, **options):
    """Go through all of the store; return what each step did."""
    done = [store.prune_samples(Sweep(), limits, NOW_US, **options)]
    while done[-1].next is not None:
        done.append(store.prune_samples(done[-1].next, limits, NOW_US, **options))
    return done


def whole(store):
    return {seq for (seq,) in store._db.execute("SELECT seq FROM samples WHERE reading IS NOT NULL")}


def test_dropped_sample_is_a_duplicate_still(store):
    """Stored exactly once holds for ever: sent again it changes nothing, with other bytes it is a conflict."""
    store.add([sample(1), sample(2)])
    assert sum(step.too_much for step in sweep(store, EVERYTHING)) == 2
    assert whole(store) == set()
    assert store.add([sample(1), sample(2, reading=b"other"), sample(3)]) == [
        Fate.DUPLICATE,
        Fate.CONFLICT,
        Fate.STORED,
    ]
    assert whole(store) == {3}
    assert [seq for _, _, seq, _ in store.references()] == [1, 2, 3]


def test_what_is_kept_outlasts_every_limit(store):
    """A person's label, also one that is disputed; what a model got wrong; what is young. All else goes."""
    store.add([sample(seq) for seq in range(1, 8)])
    store.add([sample(8, days=0.5), sample(9, gateway_label=4)])
    store.add_labels([label(1), label(2), replace(label(2, 5), author="bob")])
    store.add_labels([label(3, 3, LABEL_SOURCE_TEACHER), label(4, 8, LABEL_SOURCE_TEACHER)])
    sweep(store, Limits(keep_us=DAY_US, max_age_us=DAY_US, max_bytes=1))
    assert whole(store) == {1, 2, 4, 8}


def test_file_shrinks_to_its_limit_and_no_further(store, tmp_path):
    """Small readings share pages; room is made in earnest, and only as much as is needed."""
    store.add([sample(seq) for seq in range(4000)])
    limit = store.room().used_bytes * 2 // 3
    sweep(store, Limits(0, 0, limit))
    assert 0.97 * limit < store.room().used_bytes <= limit
    assert store.room().free_bytes == 0
    assert whole(store) == set(range(4000 - len(whole(store)), 4000))
    store.close()
    assert (tmp_path / "samples.sqlite").stat().st_size <= limit


def test_large_readings_take_steps_of_few_rows(store):
    """A step is bounded by bytes too, so that ingest is not kept waiting."""
    store.add([sample(seq, reading=bytes(1 << 20)) for seq in range(12)])
    done = sweep(store, EVERYTHING)
    assert sum(step.too_much for step in done) == 12
    assert max(step.too_much for step in done) == 4


def test_store_of_an_earlier_version_keeps_its_size_until_it_is_compacted(tmp_path):
    """Freed pages are used again; giving them back needs the file to be written anew once."""
    path = tmp_path / "samples.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE colours (name TEXT)")
    with closing(SqliteSampleStore(path)) as store:
        store.add([sample(seq) for seq in range(1000)])
        sweep(store, EVERYTHING)
        assert not store.room().is_shrinking
        assert store.room().free_bytes > 400_000
        store.compact()
        assert store.room().is_shrinking
        assert store.room().free_bytes == 0
        assert store.add([sample(1)]) == [Fate.DUPLICATE]


def test_dry_run_tells_the_same_and_changes_nothing(store):
    """What would be dropped is what is dropped."""
    store.add([sample(seq, days=40 if seq < 30 else 10, gateway_label=3 + seq % 2) for seq in range(300)])
    limits = Limits(DAY_US, 20 * DAY_US, store.room().used_bytes - 100 * SIZE)
    pretended = sweep(store, limits, dry_run=True)
    assert whole(store) == set(range(300))
    assert sum(step.too_old for step in pretended) == 30
    done = sweep(store, limits)
    assert sum(step.too_old for step in done) == 30
    told, really = (sum(step.too_much for step in steps) for steps in (pretended, done))
    assert abs(told - really) <= 15


def test_dropping_looks_like_no_unlearning(store):
    """What a trigger compares does not fall; what a build gets is what is here."""
    image = SensorData(tensor=to_tensor(np.zeros((8, 8, 1), np.float32))).SerializeToString()
    store.add([sample(seq, reading=image, gateway_score=seq / 10) for seq in (1, 2)])
    store.add_labels([label(seq, 3, LABEL_SOURCE_TEACHER) for seq in (1, 2)])
    before = store.snapshot_digest("digits")
    prune(store._db, Sweep(Worth.LABELLED), Limits(0, 0, 1), NOW_US, step_rows=1)
    assert whole(store) == {2}
    assert store.count_labelled("digits") == 2
    assert len(store.labelled("digits", (8, 8, 1), 10)) == 1
    assert store.snapshot_digest("digits") != before


def test_killed_pruner_has_lost_no_key(store, tmp_path):
    """SIGKILL between or within steps: a sample is whole or a tombstone, all keys are known, and the file is sound."""
    samples = [sample(seq) for seq in range(3000)]
    store.add(samples)
    store.add_labels([label(seq) for seq in range(0, 3000, 10)])
    told = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", PRUNER, str(tmp_path / "samples.sqlite")], stdout=subprocess.PIPE, text=True
        )
        told += sum(int(process.stdout.readline()) for _ in range(20))
        process.send_signal(signal.SIGKILL)
        told += sum(int(line) for line in process.communicate(timeout=PATIENCE_S)[0].splitlines())
        assert process.returncode == -signal.SIGKILL
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    left = whole(store)
    assert told <= 3000 - len(left) <= told + 5 * 7
    assert left >= set(range(0, 3000, 10))
    assert set(store.add(samples)) == {Fate.DUPLICATE}
    assert whole(store) == left
    sweep(store, EVERYTHING)
    assert whole(store) == set(range(0, 3000, 10))


def test_retention_takes_small_steps_and_then_a_rest(store, caplog):
    """It comes back soon while there is more to look at; what is kept above the limit is told once in each sweep."""
    store.add([sample(seq) for seq in range(1200)])
    store.add_labels([label(seq) for seq in range(200)])
    retention = Retention(store, EVERYTHING, lambda: NOW_US / 1e6)
    waits = [retention.step()]
    with caplog.at_level(logging.WARNING):
        while waits[-1] < 1:
            waits.append(retention.step())
    assert len(waits) == 5
    assert max(waits[:-1]) < 0.1
    assert retention.counters == {"samples.dropped_too_much": 1000, "samples.dropped_too_old": 0}
    assert caplog.text.count("what is left is kept") == 1
    assert store.count("digits") == 1200


def test_store_within_its_limits_is_not_looked_through(store):
    """One question for its size, and a rest."""
    store.add([sample(seq) for seq in range(10)])
    done = sweep(store, Limits(0, 0, 1 << 40))
    assert [(step.too_old, step.too_much, step.next) for step in done] == [(0, 0, None)]
