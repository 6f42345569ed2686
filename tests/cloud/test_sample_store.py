"""Exactly once, and nothing that `add` returned is ever lost."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.sample_store import MAX_SEQ, Fate, StoredLabel, StoredSample
from cloud.sqlite_store import SqliteSampleStore
from shoal.tensors import to_tensor
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON
from shoal.v1.sensor_pb2 import EncodedImage, Scalars, SensorData

PATIENCE_S = 20.0
EPOCH = bytes(range(16))
BATCH = 10

# Adds batches of ten for ever and says the number of each that is stored.
WRITER = f"""
import itertools, sys
from pathlib import Path
from cloud.sample_store import StoredSample
from cloud.sqlite_store import SqliteSampleStore
store = SqliteSampleStore(Path(sys.argv[1]))
for batch in range(int(sys.argv[2])):
    store.add(
        StoredSample("cam-00", bytes(16), batch * {BATCH} + index, "digits", "gw", 1, "", 0, batch, b"r",
                     None, None, None, None, None, None)
        for index in range({BATCH})
    )
    print(batch, flush=True)
"""


def sample(seq=1, reading=b"reading", **fields):
    return StoredSample(
        **{
            "device": "cam-00",
            "epoch": EPOCH,
            "seq": seq,
            "model": "digits",
            "gateway": "gw-01",
            "reason": 1,
            "reference": f"digits/{seq}",
            "captured_at_us": 5,
            "received_at_us": 1000 + seq,
            "reading": reading,
            "device_release": 1,
            "device_score": 0.5,
            "device_label": 3,
            "gateway_release": None,
            "gateway_score": None,
            "gateway_label": None,
        }
        | fields
    )


def label(seq=1, value=7, **fields):
    return replace(StoredLabel("cam-00", EPOCH, seq, value, LABEL_SOURCE_PERSON, "ann", 9), **fields)


@pytest.fixture
def store(tmp_path):
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as store:
        yield store


def rows(store, table="samples"):
    return store._db.conn.execute(f"SELECT * FROM {table}").fetchall()


# -- exactly once ------------------------------------------------------------------------------------------------------


def test_same_key_is_stored_once_whatever_comes_later(store):
    """The same bytes are a duplicate, others a conflict, and neither changes what is stored."""
    assert store.add([sample()]) == [Fate.STORED]
    before = rows(store)
    assert store.add([sample()]) == [Fate.DUPLICATE]
    assert store.add([sample(reading=b"other")]) == [Fate.CONFLICT]
    assert store.add([sample(model="shuttle")]) == [Fate.CONFLICT]
    assert rows(store) == before


def test_how_a_sample_came_is_not_what_it_is(store):
    """Through another gateway, later and with other answers it is the same sample."""
    store.add([sample()])
    again = sample(gateway="gw-02", received_at_us=9_999, captured_at_us=6, gateway_release=4, gateway_score=0.1)
    assert store.add([again]) == [Fate.DUPLICATE]


def test_one_batch_is_judged_row_by_row(store):
    """Repeats within one call are seen too, in order."""
    batch = [sample(1), sample(2), sample(1), sample(2, b"other"), sample(3)]
    assert store.add(batch) == [Fate.STORED, Fate.STORED, Fate.DUPLICATE, Fate.CONFLICT, Fate.STORED]
    assert store.count() == 3


@pytest.mark.parametrize("other", [{"device": "cam-01"}, {"epoch": bytes(16)}, {"seq": 2}])
def test_each_part_of_the_key_counts(store, other):
    """Another device, epoch or number is another sample, whatever it holds."""
    assert store.add([sample(), sample()._replace(**other)]) == [Fate.STORED, Fate.STORED]


@settings(deadline=None)
@given(
    calls=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from([b"a", b"b"])), max_size=6),
        max_size=6,
    )
)
def test_first_word_stays_for_every_order_of_deliveries(calls):
    """For any repetition, over calls and within them: the first bytes of each key are what the store holds."""
    first = {}
    with closing(SqliteSampleStore(Path(":memory:"))) as store:
        for call in calls:
            expected = []
            for seq, reading in call:
                repeated = Fate.DUPLICATE if first.get(seq) == reading else Fate.CONFLICT
                expected.append(repeated if seq in first else Fate.STORED)
                first.setdefault(seq, reading)
            assert store.add(sample(seq, reading) for seq, reading in call) == expected
        assert {row[2]: row[9] for row in rows(store)} == first


def test_every_column_comes_back(store):
    """What was stored is what is there, absent answers included, and the reference of each for reconciling."""
    stored = sample(seq=MAX_SEQ, received_at_us=9, boot_id=EPOCH, since_boot_us=12)
    store.add([stored])
    said = (1, 0.5, 3, None, None, None, EPOCH, 12, stored.digest, None)
    assert rows(store) == [("cam-00", EPOCH, MAX_SEQ, "digits", "gw-01", 1, stored.reference, 5, 9, b"reading", *said)]
    assert list(store.references()) == [("cam-00", EPOCH, MAX_SEQ, stored.reference)]


# -- transactions ------------------------------------------------------------------------------------------------------


def test_call_that_breaks_off_stores_nothing(store):
    """A batch is one transaction, and the store serves on."""

    def broken():
        yield sample(1)
        yield sample(2)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        store.add(broken())
    assert store.count() == 0
    assert store.add([sample(1)]) == [Fate.STORED]


def test_full_disk_is_said_and_stores_nothing(store):
    """The first error is the one that is raised, and once there is room the store serves on."""
    (pages,) = store._db.conn.execute("PRAGMA page_count").fetchone()
    store._db.conn.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.add(sample(seq, bytes(4000)) for seq in range(40))
    assert store.count() == 0
    store._db.conn.execute("PRAGMA max_page_count = 100000")
    assert set(store.add(sample(seq, bytes(4000)) for seq in range(40))) == {Fate.STORED}


def test_error_of_the_commit_itself_leaves_no_open_transaction(store):
    """After a failed commit nothing is stored and the next call is not told of a transaction within another."""
    connection = store._db.conn
    connection.executescript(
        "PRAGMA foreign_keys = ON; CREATE TABLE parent (seq PRIMARY KEY);"
        "CREATE TABLE child (seq REFERENCES parent DEFERRABLE INITIALLY DEFERRED);"
        "CREATE TRIGGER orphan AFTER INSERT ON samples BEGIN INSERT INTO child VALUES (new.seq); END;"
    )
    with pytest.raises(sqlite3.IntegrityError):
        store.add([sample()])
    assert store.count() == 0
    connection.execute("DROP TRIGGER orphan")
    assert store.add([sample()]) == [Fate.STORED]


def test_promise_outlives_power(store):
    """Pins the settings under which a returned `add` is on disk."""
    assert store._db.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.conn.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


# -- labels and quarantine ---------------------------------------------------------------------------------------------


def test_label_may_come_before_its_sample(store):
    """It counts from the moment on in which both are here."""
    assert store.add_labels([label(1), label(2)]) == 2
    assert store.count_labelled("digits") == 0
    store.add([sample(1), sample(3)])
    assert store.count_labelled("digits") == 1
    assert store.count_labelled("shuttle") == 0


def test_last_word_of_an_author_counts(store):
    """Whoever corrects a label is heard, and an old word that comes again is not."""
    store.add([sample(1, image(1))])
    store.add_labels([label(1, 7)])
    store.add_labels([label(1, 8, labelled_at_us=10)])
    store.add_labels([label(1, 7)])
    assert store.labelled("digits", (8, 8, 1), 10).y.tolist() == [8]
    assert store.count_labelled("digits") == 1


def test_refused_bytes_are_kept_for_people(store):
    """Quarantine holds the payload, who sent it and why it was refused, and is no part of the samples."""
    store.set_aside("gw-01", "no epoch", b"\0payload", 77)
    store.set_aside("gw-01", "no epoch", b"\0payload", 78)
    assert rows(store, "quarantine") == [
        (1, "gw-01", "no epoch", 77, b"\0payload"),
        (2, "gw-01", "no epoch", 78, b"\0payload"),
    ]
    assert (store.count_quarantined(), store.count()) == (2, 0)


def image(value):
    pixels = np.full((8, 8, 1), value, np.float32)
    return SensorData(tensor=to_tensor(pixels)).SerializeToString()


def test_labelled_samples_are_arrays_in_the_order_of_their_keys(store):
    """Scalars and tensors alike become (n, *shape) float32 beside (n,) int64; when they came changes nothing."""
    scalars = SensorData(scalars=Scalars(values=[4.0] * 64)).SerializeToString()
    store.add([sample(1, image(1), received_at_us=30), sample(2, scalars, received_at_us=10)])
    store.add([sample(3, image(3), received_at_us=20), sample(4, image(4), received_at_us=5)])
    store.add([sample(5, image(5), model="other")])
    store.add_labels([label(1, 1), label(2, 2), label(3, 3), label(5, 5)])
    found = store.labelled("digits", (8, 8, 1), 10)
    assert (found.x.shape, found.x.dtype, found.y.dtype) == ((3, 8, 8, 1), np.float32, np.int64)
    assert found.y.tolist() == [1, 2, 3]
    assert found.x[:, 0, 0, 0].tolist() == [1.0, 4.0, 3.0]


def test_readings_of_another_shape_are_left_out(store):
    """An older schema, an image that is not decoded here and a value that is not finite stop nobody."""
    encoded = SensorData(image=EncodedImage(media_type="image/png", data=b"x")).SerializeToString()
    nine = SensorData(scalars=Scalars(values=[0.0] * 9)).SerializeToString()
    infinite = SensorData(scalars=Scalars(values=[float("inf")] * 64)).SerializeToString()
    store.add([sample(1, nine), sample(2, encoded), sample(3, infinite)])
    store.add_labels([label(seq) for seq in (1, 2, 3)])
    assert store.labelled("digits", (8, 8, 1), 10) is None
    store.add([sample(4, image(4))])
    store.add_labels([label(4, 4)])
    assert store.labelled("digits", (8, 8, 1), 10).y.tolist() == [4]
    assert store.labelled("digits", (9,), 10).x.shape == (1, 9)


# -- more than one process ---------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path):
    """Start a process that adds so many batches."""
    started = []

    def start(batches):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "samples.sqlite"), str(batches)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_reader_beside_a_writer_sees_whole_transactions(store, writer):
    """Another process reads and labels while ingest writes; nobody is turned away and nobody sees half a batch."""
    process = writer(400)
    seen = []
    deadline = time.monotonic() + PATIENCE_S
    while (count := store.count()) < 400 * BATCH:
        assert time.monotonic() < deadline
        if count not in seen[-1:]:
            seen.append(count)
        if len(seen) == 10:
            store.add_labels([label(3, epoch=bytes(16))])
    assert process.wait(PATIENCE_S) == 0
    assert len(seen) >= 10
    assert seen == sorted(seen)
    assert {count % BATCH for count in seen} == {0}
    assert store.count_labelled("digits") == 1


def test_killed_writer_has_lost_nothing_that_it_was_told_is_stored(store, writer):
    """SIGKILL between or within adds: every batch that `add` returned is there, and no half of another."""
    process = writer(1_000_000)
    returned = [int(process.stdout.readline()) for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    returned += [int(line) for line in process.stdout.read().splitlines()]
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert store._db.conn.execute("PRAGMA quick_check").fetchone() == ("ok",)
    stored = {seq for _, _, seq, _ in store.references()}
    assert set(range((returned[-1] + 1) * BATCH)) <= stored
    assert len(stored) in ((returned[-1] + 1) * BATCH, (returned[-1] + 2) * BATCH)


def test_labels_of_no_class_are_left_out_and_told(store, caplog):
    """A slip of the hand costs one sample, not every build to come."""
    store.add([sample(seq, image(seq)) for seq in (1, 2, 3)])
    store.add_labels([label(1, 9), label(2, 10), label(3, 4_000_000_000)])
    assert store.labelled("digits", (8, 8, 1), 10).y.tolist() == [9]
    assert "count=2" in caplog.text
