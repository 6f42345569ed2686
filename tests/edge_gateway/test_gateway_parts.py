"""The pure parts of the gateway: batcher, cache, requests, inference."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gateway.batcher import Batcher, Left
from edge_gateway.cache import AnswerCache, CacheConfig
from edge_gateway.inference import ServedModel, run_batch
from edge_gateway.requests import check_request, open_request, parse_rows
from shoal.errors import MAX_MESSAGE_CHARS, ModelError, PayloadError
from shoal.routes import Address, Route
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import release_pb2
from shoal.v1.sample_pb2 import Sample
from shoal.v1.sensor_pb2 import Scalars, SensorData

_EPOCH = b"e" * 16
_SENDER = Address(Route.INFER, site="a", node="cam")


# -- batcher ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_every_row_leaves_once_in_its_order_and_fresh_ones_first(replays, max_rows):
    """However many come, no batch is larger than allowed."""
    batcher = Batcher(max_rows, max_waiting=100)
    for index, replay in enumerate(replays):
        batcher.add(index, 0.0, replay=replay)
    batches = []
    while (batch := batcher.take(0.0, drained=True)) is not None:
        batches.append(batch.rows)
    rows = [row for batch in batches for row in batch]
    fresh = [index for index, replay in enumerate(replays) if not replay]
    assert rows == fresh + [index for index, replay in enumerate(replays) if replay]
    assert all(len(batch) == max_rows for batch in batches[:-1])


def test_batch_leaves_for_a_reason_that_is_told():
    """Full, drained, or waited for long enough."""
    eager, patient = Batcher(2), Batcher(2, max_delay_s=0.5)
    for batcher in (eager, patient):
        batcher.add("a", 1.0)
    assert eager.take(1.0, drained=False) is None
    assert eager.take(1.0, drained=True).left is Left.DRAINED
    assert patient.take(1.4, drained=True) is None
    assert patient.due_at() == 1.5
    assert patient.take(1.5, drained=False).left is Left.WAITED
    for row in "abc":
        patient.add(row, 2.0)
    full = patient.take(2.0, drained=False)
    assert (full.rows, full.left) == (["a", "b"], Left.FULL)


def test_queue_is_bounded():
    """Whoever adds asks first."""
    batcher = Batcher(1, max_waiting=2)
    batcher.add("a", 0.0)
    batcher.add("b", 0.0)
    assert not batcher.has_room(1)
    with pytest.raises(ValueError, match="2 rows wait"):
        batcher.add("c", 0.0)


# -- cache ------------------------------------------------------------------------------------------------------------


def test_cache_knows_model_and_input():
    """The same bytes to another release are another question."""
    counters = Counter()
    cache = AnswerCache(CacheConfig(), counters)
    cache.put(b"m1", b"input", 0.5, 3)
    assert cache.get(b"m1", b"input").label == 3
    assert cache.get(b"m2", b"input") is None
    assert (counters["cache.hits"], counters["cache.misses"]) == (1, 1)


def test_cache_is_bounded_in_bytes():
    """The least recently used go first; what is larger than all of it is not kept."""
    cache = AnswerCache(CacheConfig(max_bytes=1500), Counter())
    for name in (b"a", b"b", b"c"):
        cache.put(b"m", name * 100, 0.0, None)
        cache.get(b"m", b"a" * 100)
    cache.put(b"m", b"d" * 100, 0.0, None)
    assert cache.get(b"m", b"a" * 100) is not None
    assert cache.get(b"m", b"b" * 100) is None
    cache.put(b"m", b"e" * 2000, 0.0, None)
    assert cache.get(b"m", b"e" * 2000) is None


def test_cache_steps_aside_where_it_does_not_pay():
    """And tries again later."""
    counters = Counter()
    cache = AnswerCache(CacheConfig(min_hit_rate=0.5, window=10, bypass=5), counters)
    for index in range(10):
        cache.get(b"m", bytes([index]))
    assert cache.is_bypassed
    for _ in range(5):
        cache.get(b"m", b"x")
    assert not cache.is_bypassed
    assert (counters["cache.misses"], counters["cache.bypassed"]) == (10, 5)
    assert AnswerCache(CacheConfig(max_bytes=0), Counter()).is_bypassed


# -- requests ---------------------------------------------------------------------------------------------------------


def row(seq, *values, reason=pb.ASK_REASON_SCORE):
    return pb.InferenceRow(reading=SensorData(seq=seq, scalars=Scalars(values=values)), reason=reason)


def request(*rows, **fields):
    return pb.InferenceRequest(**{"device": "cam", "epoch": _EPOCH, "model": "m", "rows": rows, **fields})


@pytest.mark.parametrize(
    ("bad", "response_topic", "field"),
    [
        (request(row(1, 1.0), device="other"), "", "device"),
        (request(row(1, 1.0), epoch=b"short"), "", "epoch"),
        (request(), "", "rows"),
        (request(row(1, 1.0), model=""), "", "model"),
        (request(row(1, 1.0), model="No Id"), "", "model"),
        (request(row(1, 1.0)), "shoal/v1/down/a/other/reply", "response_topic"),
    ],
)
def test_request_that_is_not_its_senders_own_is_refused(bad, response_topic, field):
    """The field at fault is named."""
    with pytest.raises(PayloadError) as caught:
        check_request(bad, _SENDER, response_topic)
    assert caught.value.field == field


def test_derived_response_topic_is_accepted():
    """It is what clients of other libraries send."""
    check_request(request(row(1, 1.0)), _SENDER, "shoal/v1/down/a/cam/reply")


def test_bad_rows_do_not_take_good_ones_with_them():
    """Each is answered for itself."""
    asked = request(row(1, 1.0, 2.0), row(2, float("nan"), 0.0), row(3, 1.0), row(4, 3.0, 4.0))
    opened = open_request(asked, _SENDER, b"", 0.0)
    good = parse_rows(opened, list(asked.rows), (2,))
    assert [item.seq for item in good] == [1, 4]
    refused = [reply for reply in opened.replies if reply is not None]
    assert [(reply.seq, reply.status) for reply in refused] == [
        (2, pb.STATUS_INVALID_ARGUMENT),
        (3, pb.STATUS_INVALID_ARGUMENT),
    ]
    assert all(reply.field.startswith(f"rows[{reply.seq - 1}].reading") for reply in refused)
    assert not opened.is_complete


def test_replay_carries_no_deadline():
    """It is late already."""
    assert open_request(request(row(1, 1.0), answer_within_ms=50), _SENDER, b"", 10.0).deadline == 10.05
    assert open_request(request(row(1, 1.0), answer_within_ms=50, replay=True), _SENDER, b"", 10.0).deadline is None


# -- inference --------------------------------------------------------------------------------------------------------


class Echo:
    """Answers its input; keeps how many rows each call had."""

    def __init__(self, *, fail=False):
        self.calls = []
        self.fail = fail
        self.story = "broken"

    def run(self, inputs):
        self.calls.append(len(inputs))
        if self.fail:
            raise ModelError(self.story)
        return inputs


def served(runtime, threshold=0.4):
    spec = release_pb2.ReleaseSpec(
        model="m",
        release=3,
        input=release_pb2.InputSchema(shape=[2], mean=[0.0], std=[1.0]),
        score=release_pb2.SCORE_KIND_UNCERTAINTY,
    )
    return ServedModel(spec, release_pb2.Artefact(threshold=threshold, sha256=b"d" * 32), runtime)


def rows_of(asked):
    opened = open_request(asked, _SENDER, b"", 0.0)
    return parse_rows(opened, list(asked.rows), (2,)), opened


def test_what_exceeds_the_threshold_and_every_audit_becomes_a_sample():
    """With both answers; the owner is the group's, not the row's."""
    sure, unsure = (0.0, 9.0), (1.0, 1.0)
    asked = request(row(1, *sure), row(2, *unsure), row(3, *sure, reason=pb.ASK_REASON_AUDIT))
    asked.rows[1].device_answer.CopyFrom(pb.Answer(release=2, score=0.3, label=1))
    rows, _ = rows_of(asked)
    answered = run_batch(served(Echo()), rows, AnswerCache(CacheConfig(), Counter()), Counter())
    assert [item.sample is not None for item in answered] == [False, True, True]
    sample = Sample.FromString(answered[1].sample.payload)
    assert sample.device_answer.release == 2
    assert (sample.gateway_answer.release, sample.gateway_answer.score) == (3, 0.5)
    assert (sample.reading.device, answered[1].sample.key) == ("", ("cam", _EPOCH, 2))


def test_answer_only_owes_no_sample():
    """The device said so."""
    rows, _ = rows_of(request(row(1, 1.0, 1.0), answer_only=True))
    (answered,) = run_batch(served(Echo()), rows, AnswerCache(CacheConfig(), Counter()), Counter())
    assert answered.sample is None


def test_cached_rows_are_not_run_again():
    """And have the same answer."""
    runtime, cache, counters = Echo(), AnswerCache(CacheConfig(), Counter()), Counter()
    first = run_batch(served(runtime), rows_of(request(row(1, 1.0, 2.0)))[0], cache, counters)
    again = run_batch(served(runtime), rows_of(request(row(2, 1.0, 2.0), row(3, 5.0, 0.0)))[0], cache, counters)
    assert runtime.calls == [1, 1]
    by_seq = {item.row.seq: item.answer for item in again}
    assert by_seq[2] == first[0].answer
    assert by_seq[3].label == 0


def test_broken_model_is_answered_and_promises_nothing():
    """The device asks again; nothing else happens."""
    counters = Counter()
    rows, opened = rows_of(request(row(1, 1.0, 1.0), row(2, 0.0, 1.0)))
    assert run_batch(served(Echo(fail=True)), rows, AnswerCache(CacheConfig(), Counter()), counters) == []
    assert [reply.status for reply in opened.replies] == [pb.STATUS_INTERNAL] * 2
    assert (counters["model_errors"], counters["rows.inferred"]) == (2, 0)


class Picky(Echo):
    """Fails on a negative first value, and on the whole call with it."""

    def run(self, inputs):
        super().run(inputs)
        if (inputs[:, 0] < 0).any():
            raise ModelError("negative")
        return inputs


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_every_row_is_answered_or_refused_for_itself(good):
    """Whichever rows break the model, the others have the answers they would have had alone, in their order."""
    asked = request(*(row(index, 1.0 if is_good else -1.0, float(index)) for index, is_good in enumerate(good)))
    rows, opened = rows_of(asked)
    counters = Counter()
    answered = run_batch(served(Picky()), rows, AnswerCache(CacheConfig(), Counter()), counters)
    assert [item.row.seq for item in answered] == [index for index, is_good in enumerate(good) if is_good]
    assert [reply is None for reply in opened.replies] == good
    assert (counters["rows.inferred"], counters["model_errors"]) == (sum(good), len(good) - sum(good))
    for item in answered:
        alone, _ = rows_of(request(row(0, 1.0, float(item.row.seq))))
        (expected,) = run_batch(served(Echo()), alone, AnswerCache(CacheConfig(), Counter()), Counter())
        assert item.answer == expected.answer


def test_long_story_of_the_runtime_is_cut():
    """256 rows of it must fit one reply."""
    rows, opened = rows_of(request(row(1, 1.0, 1.0)))
    broken = Echo(fail=True)
    broken.story = "x" * 10_000
    run_batch(served(broken), rows, AnswerCache(CacheConfig(), Counter()), Counter())
    assert len(opened.replies[0].message) == MAX_MESSAGE_CHARS


def test_failing_row_costs_few_calls():
    """It is found by halves."""
    runtime = Picky()
    rows, _ = rows_of(request(*(row(index, -1.0 if index == 5 else 1.0, 0.0) for index in range(32))))
    run_batch(served(runtime), rows, AnswerCache(CacheConfig(max_bytes=0), Counter()), Counter())
    assert len(runtime.calls) <= 1 + 2 * 5


def test_value_beyond_the_models_scale_is_refused_for_ever():
    """It is finite, and infinitely many deviations away: no warning, no INTERNAL that would be asked again."""
    model = served(Echo())
    model.spec.input.std[:] = [1e-30]
    rows, opened = rows_of(request(row(1, 1e30, 0.0), row(2, 0.0, 0.0)))
    (answered,) = run_batch(model, rows, AnswerCache(CacheConfig(), Counter()), Counter())
    assert answered.row.seq == 2
    assert (opened.replies[0].status, opened.replies[0].field) == (pb.STATUS_INVALID_ARGUMENT, "rows[0].reading")


def test_row_unpacked_for_another_shape_is_asked_again():
    """The release was replaced while it waited."""
    model = served(Echo())
    rows, opened = rows_of(request(row(1, 1.0, 1.0)))
    model.spec.input.shape[:] = [3]
    assert run_batch(model, rows, AnswerCache(CacheConfig(), Counter()), Counter()) == []
    assert opened.replies[0].status == pb.STATUS_INTERNAL


def test_scores_match_the_model_row_by_row():
    """Batching changes no answer."""
    values = np.random.default_rng(3).normal(size=(9, 2)).astype(np.float32)
    rows, _ = rows_of(request(*(row(index, *value) for index, value in enumerate(values))))
    together = run_batch(served(Echo()), rows, AnswerCache(CacheConfig(), Counter()), Counter())
    for item, value in zip(together, values, strict=True):
        alone = run_batch(
            served(Echo()), rows_of(request(row(1, *value)))[0], AnswerCache(CacheConfig(), Counter()), Counter()
        )
        assert item.answer == alone[0].answer
