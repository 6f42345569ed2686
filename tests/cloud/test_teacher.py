"""A teacher says only what it is sure of, is as good as it says, and overrides nobody."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.sample_store import StoredLabel, StoredSample
from cloud.sqlite_store import SqliteSampleStore
from cloud.tasks.base import LabelledSamples
from cloud.teacher import (
    Opinions,
    Sureness,
    Taught,
    Teacher,
    choose_sureness,
    label_unlabelled,
    measure_sureness,
    rows_needed,
    wilson_lower_bound,
)
from shoal.errors import ModelError
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER, LABEL_SOURCE_WITH_SAMPLE
from shoal.v1.sensor_pb2 import SensorData

EPOCH = bytes(range(16))
SHAPE = (3,)
SCHEMA = pb.InputSchema(shape=SHAPE, mean=[0.0], std=[1.0])


def logits(rows):
    """A model whose input is its output."""
    return rows


# -- how sure is sure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "bound"), [(0, 0, 0.0), (0, 10, 0.0), (9, 10, 0.6523), (100, 100, 0.9737), (980, 1000, 0.9713)]
)
def test_bound_is_wilsons(right, total, bound):
    """Against values worked out by the formula in the paper, one-sided 95 %."""
    assert wilson_lower_bound(right, total) == pytest.approx(bound, abs=5e-5)


@given(precision=st.floats(0.5, 0.999), wrong=st.integers(0, 5))
def test_fewest_rows_are_fewest(precision, wrong):
    """So many show it, one less does not."""
    fewest = rows_needed(precision, wrong)
    assert wilson_lower_bound(fewest - wrong, fewest) >= precision
    assert fewest == wrong + 1 or wilson_lower_bound(fewest - 1 - wrong, fewest - 1) < precision


@pytest.mark.parametrize("precision", [0.0, 1.0, 1.5, float("nan")])
def test_nobody_is_always_right(precision):
    """A precision that no number of rows can show is refused."""
    with pytest.raises(ValueError, match="more than 0 and less than 1"):
        rows_needed(precision)


def opinions(certainty, right):
    """Opinions of class 0, and labels that say which are right."""
    return Opinions(np.zeros(len(certainty), np.int64), np.asarray(certainty, np.float32)), np.where(right, 0, 1)


def test_limit_lies_where_the_surest_stop_being_right_often_enough():
    """Right above 0.8 and guessing below: about there is the limit, and what it rests on is told."""
    certainty = np.linspace(0, 1, 2000)
    right = (certainty > 0.8) | (np.arange(2000) % 2 == 0)
    chosen = choose_sureness(*opinions(certainty, right), precision=0.95)
    assert 0.79 < chosen.limit <= 0.81
    assert chosen.rows == int((certainty.astype(np.float32) >= np.float32(chosen.limit)).sum())
    assert chosen.right / chosen.rows > chosen.precision_bound >= 0.95
    assert chosen.share == chosen.rows / 2000


def test_always_right_speaks_always():
    """Nothing is held back where nothing is wrong."""
    chosen = choose_sureness(*opinions(np.linspace(0.2, 1, 500), np.ones(500, bool)), precision=0.99)
    assert (chosen.rows, chosen.right, chosen.share) == (500, 500, 1.0)
    assert chosen.limit == np.float32(0.2)


def test_equally_sure_rows_count_together():
    """A limit cannot part them, so the wrong ones among them are not left out of the figure."""
    certainty = np.array([0.9] * 300 + [0.5] * 300)
    right = np.array([True] * 300 + [False] * 300)
    assert choose_sureness(*opinions(certainty, right), precision=0.97).rows == 300
    with pytest.raises(ModelError, match="not even its surest answers"):
        choose_sureness(*opinions(np.full(600, 0.9), right), precision=0.97)


def test_too_few_rows_show_nothing():
    """140 held-out images are not enough for 99 %, whatever the teacher says of them."""
    with pytest.raises(ModelError, match=r"^140 held-out rows cannot show a precision of 0\.99: 268 could"):
        choose_sureness(*opinions(np.ones(140), np.ones(140, bool)), precision=0.99)


def test_chance_rarely_passes_for_precision():
    """Teachers whose true precision is just below what is wanted, at every certainty: about one in twenty may pass."""
    rng = np.random.default_rng(7)
    passed = 0
    for _ in range(400):
        try:
            choose_sureness(*opinions(rng.random(2000), rng.random(2000) < 0.949), precision=0.95)
        except ModelError:
            continue
        passed += 1
    assert passed <= 40


# -- opinions ----------------------------------------------------------------------------------------------------------


def test_several_models_answer_with_their_mean():
    """Each one's probabilities weigh the same, however large its logits are."""
    doubter = Teacher("two", [logits, lambda rows: -1000 * rows], SCHEMA)
    said = doubter.opinions(np.array([[0.0, 0.0, 4.0]], np.float32))
    alone = Teacher("one", [logits], SCHEMA).opinions(np.array([[0.0, 0.0, 4.0]], np.float32))
    assert (alone.labels.tolist(), said.labels.tolist()) == ([2], [2])
    assert alone.certainty[0] == pytest.approx(np.exp(4) / (np.exp(4) + 2), rel=1e-6)
    assert said.certainty[0] == pytest.approx(alone.certainty[0] / 2, rel=1e-6)


def test_readings_are_scaled_as_the_release_says():
    """Mean and deviation of its training set, not of what it is asked."""
    schema = pb.InputSchema(shape=SHAPE, mean=[10.0], std=[2.0])
    seen = []
    Teacher("t", [lambda rows: seen.append(rows) or rows], schema).opinions(np.full((1, 3), 14.0, np.float32))
    assert seen[0].tolist() == [[2.0] * 3]


def test_broken_answers_are_refused():
    """A value that is not finite and an odd number of values end it before anything is labelled."""
    for broken in (lambda rows: rows * np.nan, lambda _: np.zeros(7, np.float32)):
        with pytest.raises(ModelError):
            Teacher("t", [broken], SCHEMA).opinions(np.zeros((2, 3), np.float32))


# -- on a store --------------------------------------------------------------------------------------------------------


def sample(seq, values, **fields):
    reading = SensorData(tensor=to_tensor(np.asarray(values, np.float32))).SerializeToString()
    row = StoredSample("cam-00", EPOCH, seq, "digits", "gw", 1, "", 0, seq, reading, *[None] * 6)
    return row._replace(**fields)


def label(seq, value, source):
    return StoredLabel("cam-00", EPOCH, seq, value, source, "ann", 9)


TEACHER = Teacher("digits 7", [logits], SCHEMA)
SURE = Sureness(limit=0.9, rows=400, right=400, precision_bound=0.99, share=0.5)
CERTAIN, DOUBTFUL = [0, 9, 0], [1, 1, 1]


def teach(store, limit=1000):
    return label_unlabelled(store, TEACHER, SURE, model="digits", shape=SHAPE, limit=limit, now_us=lambda: 77)


@pytest.fixture
def store(tmp_path):
    with closing(SqliteSampleStore(tmp_path / "samples.sqlite")) as store:
        yield store


def test_teacher_labels_what_it_is_sure_of_and_nobody_else_labelled(store):
    """Its name, its source and how sure it was stand beside the label; the rest is left for people."""
    store.add([sample(1, CERTAIN), sample(2, DOUBTFUL), sample(3, CERTAIN), sample(4, CERTAIN), sample(5, [1] * 4)])
    store.add([sample(6, CERTAIN, model="other")])
    store.add_labels([label(3, 2, LABEL_SOURCE_PERSON), label(4, 2, LABEL_SOURCE_WITH_SAMPLE)])
    assert teach(store) == Taught(labelled=1, unsure=1, unreadable=1)
    (word,) = store.labels.find(source=LABEL_SOURCE_TEACHER)
    assert word == StoredLabel("cam-00", EPOCH, 1, 1, LABEL_SOURCE_TEACHER, "digits 7", 77, "certainty 0.9998")
    assert teach(store) == Taught(labelled=0, unsure=1, unreadable=1)


def test_person_stands_above_the_teacher_whenever_they_speak(store):
    """Also before, where the teacher looked before the word came."""
    store.add([sample(1, CERTAIN), sample(2, CERTAIN)])
    teach(store)
    store.add_labels([label(1, 2, LABEL_SOURCE_PERSON)])
    assert store.labelled("digits", SHAPE, 3).y.tolist() == [2, 1]


def test_teacher_stops_at_its_limit_and_goes_on_from_there(store):
    """More than one batch, oldest first, no more than asked for."""
    store.add([sample(seq, CERTAIN if seq % 2 else DOUBTFUL) for seq in range(1200)])
    assert teach(store, limit=400).labelled == 400
    assert {word.seq for word in store.labels.find()} == set(range(1, 800, 2))
    assert teach(store).labelled == 200


def test_sureness_is_measured_on_held_out_readings():
    """In the sensor's own units, as they are stored."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 600)
    rows = np.eye(3, dtype=np.float32)[labels] * rng.uniform(1, 9, (600, 1)).astype(np.float32)
    assert measure_sureness(TEACHER, LabelledSamples(rows, labels), 0.99).rows == 600
