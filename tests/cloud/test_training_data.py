"""What a release is made from and judged by, out of the store."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from cloud.sample_store import StoredLabel, StoredSample
from cloud.sqlite_store import SqliteSampleStore
from shoal.tensors import to_tensor
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER, LABEL_SOURCE_WITH_SAMPLE
from shoal.v1.inference_pb2 import ASK_REASON_AUDIT, ASK_REASON_COMMAND, ASK_REASON_SCORE
from shoal.v1.sensor_pb2 import SensorData

EPOCH = bytes(range(16))
SHAPE = (2, 2, 1)
NOBODY = {"device_release": None, "device_score": None, "device_label": None}


def sample(seq, **fields):
    pixels = np.full(SHAPE, seq, np.float32)
    values = {
        "device": "cam-00",
        "epoch": EPOCH,
        "seq": seq,
        "model": "digits",
        "gateway": "gw-01",
        "reason": ASK_REASON_SCORE,
        "reference": "",
        "captured_at_us": 5,
        "received_at_us": 1000 + seq,
        "reading": SensorData(tensor=to_tensor(pixels)).SerializeToString(),
        "device_release": 1,
        "device_score": 0.5,
        "device_label": 3,
        "gateway_release": 1,
        "gateway_score": 0.1,
        "gateway_label": 3,
    }
    return StoredSample(**(values | fields))


def label(seq, value=3, source=LABEL_SOURCE_PERSON, author="ann", at=9):
    return StoredLabel("cam-00", EPOCH, seq, value, source, author, at)


@pytest.fixture
def store(tmp_path):
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as store:
        yield store


def seqs(found):
    return [] if found is None else found.x[:, 0, 0, 0].astype(int).tolist()


# -- what counts -------------------------------------------------------------------------------------------------------


def test_training_gets_the_label_that_counts_and_leaves_out_what_persons_differ_about(store):
    """A person's above a teacher's; two persons' different words are no label until one settles it."""
    store.add([sample(seq) for seq in (1, 2, 3)])
    store.add_labels([label(1, 5), label(1, 6, LABEL_SOURCE_TEACHER, "t", 99), label(2, 1), label(2, 2, author="bob")])
    assert store.labelled("digits", SHAPE, 10).y.tolist() == [5]
    assert store.count_labelled("digits") == 1
    store.add_labels([replace(label(2, 2, author="eve", at=10), settles=True)])
    assert store.labelled("digits", SHAPE, 10).y.tolist() == [5, 2]
    assert store.count_labelled("digits") == 2


def test_a_gate_can_ask_for_what_no_teacher_said(store):
    """Or a teacher would be measured by its own words."""
    store.add([sample(seq) for seq in (1, 2, 3)])
    store.add_labels([label(1), label(2, 3, LABEL_SOURCE_TEACHER, "t"), label(3, 3, LABEL_SOURCE_WITH_SAMPLE)])
    trusted = frozenset({LABEL_SOURCE_PERSON, LABEL_SOURCE_WITH_SAMPLE})
    assert seqs(store.labelled("digits", SHAPE, 10, sources=trusted)) == [1, 3]
    assert seqs(store.labelled("digits", SHAPE, 10)) == [1, 2, 3]


# -- hard samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "value", "is_hard"),
    [
        ({}, 3, False),
        ({}, 4, True),
        ({"gateway_label": 4}, 4, True),
        ({"device_label": 4}, 4, True),
        ({**NOBODY, "gateway_label": 4}, 4, False),
        ({**NOBODY, "gateway_label": None}, 4, False),
        ({"device_label": None, "gateway_label": None}, 1, False),
        ({"device_label": None, "gateway_label": None}, 0, True),
        ({"device_label": None, "gateway_label": None, "reason": ASK_REASON_AUDIT}, 1, True),
        ({"device_label": None, "gateway_label": None, "reason": ASK_REASON_AUDIT}, 0, False),
        ({"device_label": None, "gateway_label": None, "reason": ASK_REASON_COMMAND}, 1, False),
    ],
    ids=[
        "both right",
        "both wrong",
        "the device wrong",
        "the gateway wrong",
        "no device's answer",
        "no answer",
        "an anomaly that scored",
        "a false alarm",
        "an anomaly that only the lot brought up",
        "the audit of a normal reading",
        "somebody wanted it: nothing is known",
    ],
)
def test_hard_is_what_a_model_got_wrong(store, fields, value, is_hard):
    """By class, or where there is none by why the device asked."""
    store.add([sample(1, **fields)])
    store.add_labels([label(1, value)])
    assert seqs(store.hard("digits", SHAPE, 10, 10)) == ([1] if is_hard else [])


def test_hard_samples_are_the_newest_first_and_no_more_than_asked_for(store):
    """Those that came at the same time by their key; of this model, labelled and still here."""
    store.add([sample(seq, received_at_us=1000 + seq // 2) for seq in range(1, 8)])
    store.add([sample(8, model="other"), sample(9)])
    store.add_labels([label(seq, 4) for seq in range(1, 9)])
    assert seqs(store.hard("digits", SHAPE, 10, 4)) == [6, 7, 4, 5]
    assert store.hard("digits", SHAPE, 10, 4).y.tolist() == [4] * 4
    assert seqs(store.hard("digits", SHAPE, 10, 100)) == [6, 7, 4, 5, 2, 3, 1]
    assert store.hard("digits", SHAPE, 3, 100) is None


# -- the digest of a snapshot ------------------------------------------------------------------------------------------


def test_digest_is_of_keys_contents_and_labels_and_nothing_else(store, tmp_path):
    """The same samples and labels are the same input, in whatever order and through whomever they came."""
    store.add([sample(seq) for seq in (1, 2)])
    store.add_labels([label(1), label(2, 4, LABEL_SOURCE_TEACHER, "t")])
    with closing(SqliteSampleStore(tmp_path / "other.sqlite")) as other:
        other.add_labels([label(2, 4, author="bob", at=77)])
        other.add([sample(3), sample(2, gateway="gw-02", received_at_us=4)])
        other.add_labels([label(1)])
        assert other.snapshot_digest("digits") != store.snapshot_digest("digits")
        other.add([sample(1, captured_at_us=8)])
        assert other.snapshot_digest("digits") == store.snapshot_digest("digits")
        assert other.labelled("digits", SHAPE, 10).x.tolist() == store.labelled("digits", SHAPE, 10).x.tolist()
        assert other.snapshot_digest("other") != store.snapshot_digest("digits")


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.add_labels([label(2, 5)]),
        lambda store: store.add_labels([label(1, 5, at=10)]),
        lambda store: store.add_labels([label(1, 5, author="bob")]),
    ],
    ids=["one more", "another label", "a conflict"],
)
def test_digest_changes_with_what_a_build_gets(store, change):
    """More, other or fewer labels are another input; the same ones are not."""
    store.add([sample(seq) for seq in (1, 2)])
    store.add_labels([label(1)])
    before = store.snapshot_digest("digits")
    assert store.snapshot_digest("digits") == before
    change(store)
    assert store.snapshot_digest("digits") != before


def test_snapshot_is_of_one_moment(store, tmp_path):
    """Digest and data belong together, though somebody labels between the two."""
    store.add([sample(seq) for seq in (1, 2)])
    store.add_labels([label(1)])
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as other, store.snapshot():
        before = store.snapshot_digest("digits")
        other.add_labels([label(2)])
        assert len(store.labelled("digits", SHAPE, 10)) == 1
        assert store.snapshot_digest("digits") == before != other.snapshot_digest("digits")
    assert len(store.labelled("digits", SHAPE, 10)) == 2
