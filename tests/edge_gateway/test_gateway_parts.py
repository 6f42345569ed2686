"""The pure parts of the gateway: batcher, cache, requests, inference."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gateway.batcher import Batcher, Left
from edge_gateway.cache import AnswerCache, CacheConfig
from edge_gateway.inference import Scored, ServedModel, gather, infer
from edge_gateway.requests import OpenRequest, Row, check_request, parse_rows
from edge_gateway.samples import sample_of
from shoal.errors import MAX_MESSAGE_CHARS, ModelError, PayloadError
from shoal.routes import Address, Route
from shoal.tensors import DTYPES, to_array, to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import release_pb2
from shoal.v1.sample_pb2 import Sample
from shoal.v1.sensor_pb2 import Scalars, SensorData

_EPOCH = b"e" * 16
_SENDER = Address(Route.INFER, site="a", node="cam")


# -- batcher ----------------------------------------------------------------------------------------------------------

asked = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60)


@given(asked, st.integers(1, 7))
def test_every_row_leaves_once_and_fresh_ones_first(rows, max_rows):
    """However many come, no batch is larger than allowed, and an owner's rows keep their order."""
    batcher = Batcher(max_rows, max_waiting=100)
    for index, (owner, replay) in enumerate(rows):
        batcher.add(owner, (owner, replay, index), 0.0, replay=replay)
    batches = []
    while (batch := batcher.take(0.0, drained=True)) is not None:
        batches.append(batch.rows)
    left = [row for batch in batches for row in batch]
    assert [replay for _, replay, _ in left] == sorted(replay for _, replay in rows)
    assert sorted(index for _, _, index in left) == list(range(len(rows)))
    for owner in "abc":
        for late in (False, True):
            own = [index for who, replay, index in left if (who, replay) == (owner, late)]
            assert own == sorted(own)
    assert all(len(batch) == max_rows for batch in batches[:-1])
    assert len(batcher) == 0


@given(st.integers(1, 50), st.integers(1, 5))
def test_flood_of_one_owner_delays_another_by_one_turn(flood, others):
    """Who sends ten times as much waits ten times as long, and nobody else does."""
    batcher = Batcher(1, max_waiting=100)
    for index in range(flood):
        batcher.add("flooder", index, 0.0)
    for owner in range(others):
        batcher.add(f"o{owner}", "mine", 0.0)
    first = [batcher.take(0.0, drained=True).rows[0] for _ in range(others + 1)]
    assert first.count("mine") == others


def test_batch_leaves_for_a_reason_that_is_told():
    """Full, drained, or waited for long enough."""
    eager, patient = Batcher(2), Batcher(2, max_delay_s=0.5)
    for batcher in (eager, patient):
        batcher.add("o", "a", 1.0)
    assert eager.take(1.0, drained=False) is None
    assert eager.take(1.0, drained=True).left is Left.DRAINED
    assert patient.take(1.4, drained=True) is None
    assert patient.due_at() == 1.5
    waited = patient.take(1.5, drained=False)
    assert (waited.left, waited.since) == (Left.WAITED, 1.0)
    assert patient.due_at() is None
    for row in "abc":
        patient.add("o", row, 2.0)
    full = patient.take(2.0, drained=False)
    assert (full.rows, full.left) == (["a", "b"], Left.FULL)


def test_queue_is_bounded():
    """Whoever adds asks first."""
    batcher = Batcher(1, max_waiting=2)
    batcher.add("o", "a", 0.0)
    batcher.add("o", "b", 0.0)
    assert not batcher.has_room("other", 1)
    with pytest.raises(ValueError, match="2 rows wait"):
        batcher.add("other", "c", 0.0)


def test_each_owner_has_a_bound_of_its_own():
    """A request of many rows still gets in where nothing of its device waits."""
    batcher = Batcher(1, max_waiting=100, max_waiting_per_owner=2)
    assert batcher.has_room("a", 50)
    batcher.add("a", 1, 0.0)
    batcher.add("a", 2, 0.0, replay=True)
    assert not batcher.has_room("a", 1)
    assert batcher.has_room("b", 1)
    batcher.take(0.0, drained=True)
    assert batcher.has_room("a", 1)


@pytest.mark.parametrize("settings", [(0,), (1, -1.0), (5, 0.0, 4), (1, 0.0, 4, 0)])
def test_impossible_batcher_is_refused(settings):
    """By who made it."""
    with pytest.raises(ValueError, match="max_rows"):
        Batcher(*settings)


# -- cache ------------------------------------------------------------------------------------------------------------


def one_row(data=b"input", **fields):
    return Row(open_request(request(row(1, 1.0), **fields)), 0, row(1, 1.0), np.dtype("<f4"), data)


def look(cache, digest, *rows):
    hits, misses = cache.split(digest, [*rows])
    return [scored for _, scored in hits], misses


def test_cache_knows_model_and_input():
    """The same bytes to another release, or of another type, are another question."""
    counters = Counter()
    cache = AnswerCache(CacheConfig(), counters)
    asking = one_row()
    cache.put(b"m1", asking, Scored(0.5, 3))
    assert look(cache, b"m1", asking) == ([Scored(0.5, 3)], [])
    assert look(cache, b"m2", asking) == ([], [asking])
    other = asking._replace(dtype=np.dtype("<i4"))
    assert look(cache, b"m1", other) == ([], [other])
    assert (counters["cache.hits"], counters["cache.misses"]) == (1, 2)


def test_cache_is_bounded_in_bytes():
    """The least recently used go first; what is larger than all of it is not kept."""
    cache = AnswerCache(CacheConfig(max_bytes=2400), Counter())
    rows = {name: one_row(name * 100) for name in (b"a", b"b", b"c", b"d")}
    for name in (b"a", b"b", b"c"):
        cache.put(b"m", rows[name], Scored(0.0, None))
        look(cache, b"m", rows[b"a"])
    cache.put(b"m", rows[b"d"], Scored(0.0, None))
    assert look(cache, b"m", rows[b"a"])[0]
    assert not look(cache, b"m", rows[b"b"])[0]
    large = one_row(b"e" * 2000)
    cache.put(b"m", large, Scored(0.0, None))
    assert not look(cache, b"m", large)[0]


def test_cache_compares_more_than_it_looks_at():
    """A large input with the sample of another is never taken for it; the last one keeps their place, and its size."""
    cache = AnswerCache(CacheConfig(max_bytes=12_000), Counter())
    first, other, third = (one_row(bytes([0, mark]) + b"x" * 4998) for mark in (1, 2, 3))
    cache.put(b"m", first, Scored(0.1, 1))
    assert look(cache, b"m", other) == ([], [other])
    for asking in (other, third, other):
        cache.put(b"m", asking, Scored(0.2, 2))
    assert look(cache, b"m", first, other) == ([Scored(0.2, 2)], [first])
    another = one_row(b"y" * 5000)
    cache.put(b"m", another, Scored(0.3, 3))
    assert look(cache, b"m", other, another)[1] == []


@pytest.mark.parametrize("dtype", ["<f4", "<i2"])
def test_cache_looks_at_every_byte_of_a_value(dtype):
    """Whole numbers as floats have zeros for their low bytes: inputs of nothing else would share one place."""
    cache = AnswerCache(CacheConfig(), Counter())
    rng = np.random.default_rng(1)
    rows = [one_row(rng.integers(0, 256, 3072).astype(dtype).tobytes()) for _ in range(20)]
    for asking in rows:
        cache.put(b"m", asking, Scored(0.5, 3))
    assert look(cache, b"m", *rows)[1] == []


def test_cache_steps_aside_where_it_does_not_pay():
    """And tries again later."""
    counters = Counter()
    cache = AnswerCache(CacheConfig(min_hit_rate=0.5, window=10, bypass=5), counters)
    for index in range(10):
        look(cache, b"m", one_row(bytes([index])))
    assert cache.is_bypassed
    look(cache, b"m", *[one_row(b"x")] * 5)
    assert not cache.is_bypassed
    assert (counters["cache.misses"], counters["cache.bypassed"]) == (10, 5)
    assert AnswerCache(CacheConfig(max_bytes=0), Counter()).is_bypassed


def test_cache_that_pays_stays():
    """A hit rate above the floor is never bypassed."""
    cache = AnswerCache(CacheConfig(min_hit_rate=0.5, window=10), Counter())
    asking = one_row()
    cache.put(b"m", asking, Scored(0.5, 3))
    for _ in range(50):
        assert look(cache, b"m", asking)[0]


def test_outputs_are_neither_kept_nor_found():
    """An answer without them would not be what was asked for."""
    cache = AnswerCache(CacheConfig(), Counter())
    plain, full = one_row(), one_row(wants_outputs=True)
    cache.put(b"m", full, Scored(0.5, 3))
    assert look(cache, b"m", plain) == ([], [plain])
    cache.put(b"m", plain, Scored(0.5, 3))
    assert look(cache, b"m", full) == ([], [full])


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


def open_request(asked, now=0.0, **options):
    return OpenRequest(asked, _SENDER, now, lambda _: None, **options)


def rows_of(asked):
    opened = open_request(asked)
    return parse_rows(opened, asked, 2, size_bytes=asked.ByteSize()), opened


def test_bad_rows_do_not_take_good_ones_with_them():
    """Each is answered for itself; what is not finite is the model's call to find."""
    asked = request(row(1, 1.0, 2.0), row(2, 1.0, 2.0, 3.0), row(3, 1.0), row(4, 3.0, 4.0))
    good, opened = rows_of(asked)
    assert [item.seq for item in good] == [1, 4]
    replies = opened.reply.rows
    assert [reply.seq for reply in replies] == [1, 2, 3, 4]
    assert [reply.status for reply in replies[1:3]] == [pb.STATUS_INVALID_ARGUMENT] * 2
    assert all(reply.field.startswith(f"rows[{reply.seq - 1}].reading") for reply in replies[1:3])
    assert opened.unanswered == 2


def test_request_is_complete_once():
    """When its last row has its reply, in whatever order they come."""
    done = []
    opened = OpenRequest(request(row(1, 1.0), row(2, 1.0)), _SENDER, 0.0, done.append)
    opened.refuse(1, pb.STATUS_INTERNAL, "x" * 1000, "rows[1]")
    assert done == []
    opened.answer(0, pb.Answer(release=3, score=0.5), promised=True)
    assert done == [opened]
    assert [reply.status for reply in opened.reply.rows] == [pb.STATUS_OK, pb.STATUS_INTERNAL]
    assert opened.reply.rows[0].sample_promised
    assert len(opened.reply.rows[1].message) == MAX_MESSAGE_CHARS


def test_replay_carries_no_deadline():
    """It is late already."""
    assert open_request(request(row(1, 1.0), answer_within_ms=50), 10.0).deadline == 10.05
    assert open_request(request(row(1, 1.0), answer_within_ms=50, replay=True), 10.0).deadline is None


@pytest.mark.parametrize(("fields", "late"), [({"answer_only": True}, True), ({}, False)])
def test_only_answers_that_nobody_awaits_are_late(fields, late):
    """A reading that is owed is run however old it is."""
    opened = open_request(request(row(1, 1.0), answer_within_ms=50, **fields), 10.0)
    assert not opened.is_late(10.05)
    assert opened.is_late(10.06) is late


# -- inference --------------------------------------------------------------------------------------------------------


class Echo:
    """Answers its input; keeps how many rows each call had."""

    def __init__(self, *, fail=False):
        self.calls = []
        self.fail = fail

    def run_all(self, inputs):
        self.calls.append(len(inputs))
        if self.fail:
            raise ModelError("broken")
        return [inputs, inputs.sum(axis=1).astype(np.int64)]


def served(runtime, threshold=0.4, std=1.0):
    spec = release_pb2.ReleaseSpec(
        model="m",
        release=3,
        input=release_pb2.InputSchema(shape=[2], mean=[0.0], std=[std]),
        score=release_pb2.SCORE_KIND_UNCERTAINTY,
    )
    return ServedModel(spec, release_pb2.Artefact(threshold=threshold, sha256=b"d" * 32), runtime)


@pytest.mark.parametrize("reason", [pb.ASK_REASON_AUDIT, pb.ASK_REASON_COMMAND])
def test_what_exceeds_the_threshold_or_was_wanted_for_itself_becomes_a_sample(reason):
    """With both answers; the owner is the group's, not the row's."""
    sure, unsure = (0.0, 9.0), (1.0, 1.0)
    asked = request(row(1, *sure), row(2, *unsure), row(3, *sure, reason=reason))
    asked.rows[1].device_answer.CopyFrom(pb.Answer(release=2, score=0.3, label=1))
    rows, _ = rows_of(asked)
    model = served(Echo())
    samples = [sample_of(item, model, scored) for item, scored in zip(rows, infer(model, rows), strict=True)]
    assert [sample is not None for sample in samples] == [False, True, True]
    sample = Sample.FromString(samples[1].payload)
    assert sample.device_answer.release == 2
    assert (sample.gateway_answer.release, sample.gateway_answer.score) == (3, 0.5)
    assert (sample.reading.device, samples[1].key) == ("", ("cam", _EPOCH, 2))


def test_answer_only_owes_no_sample():
    """The device said so."""
    rows, _ = rows_of(request(row(1, 1.0, 1.0), answer_only=True))
    model = served(Echo())
    assert sample_of(rows[0], model, infer(model, rows)[0]) is None


def test_broken_model_is_said_for_every_row():
    """The device asks again; nothing else happens."""
    rows, _ = rows_of(request(row(1, 1.0, 1.0), row(2, 0.0, 1.0)))
    assert [str(outcome) for outcome in infer(served(Echo(fail=True)), rows)] == ["broken"] * 2


class Picky(Echo):
    """Fails on a negative first value, and on the whole call with it."""

    def run_all(self, inputs):
        outputs = super().run_all(inputs)
        if (inputs[:, 0] < 0).any():
            raise ModelError("negative")
        return outputs


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_every_row_is_answered_or_refused_for_itself(good):
    """Whichever rows break the model, the others have the answers they would have had alone, in their order."""
    asked = request(*(row(index, 1.0 if is_good else -1.0, float(index)) for index, is_good in enumerate(good)))
    rows, _ = rows_of(asked)
    outcomes = infer(served(Picky()), rows)
    assert [isinstance(outcome, Scored) for outcome in outcomes] == good
    for item, outcome in zip(rows, outcomes, strict=True):
        alone, _ = rows_of(request(row(0, 1.0, float(item.seq))))
        if isinstance(outcome, Scored):
            assert [outcome] == infer(served(Echo()), alone)


def test_failing_row_costs_few_calls():
    """It is found by halves."""
    runtime = Picky()
    rows, _ = rows_of(request(*(row(index, -1.0 if index == 5 else 1.0, 0.0) for index in range(32))))
    infer(served(runtime), rows)
    assert len(runtime.calls) <= 1 + 2 * 5


@pytest.mark.parametrize(
    ("value", "std", "why"), [(1e30, 1e-30, "scale"), (np.nan, 1.0, "finite"), (-np.inf, 1.0, "finite")]
)
def test_value_that_no_model_can_take_is_refused_for_ever(value, std, why):
    """No warning, no INTERNAL that would be asked again, and its neighbour is answered."""
    rows, _ = rows_of(request(row(1, value, 0.0), row(2, 0.0, 0.0)))
    refused, answered = infer(served(Echo(), std=std), rows)
    assert isinstance(refused, PayloadError)
    assert (refused.field, why in str(refused)) == ("rows[0].reading", True)
    assert isinstance(answered, Scored)


@given(st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=6), st.data())
def test_element_types_mix_in_a_batch(types, data):
    """Each row is what numpy makes of its bytes, whoever its neighbours are."""
    arrays = [
        np.array(data.draw(st.lists(st.integers(0, 100), min_size=2, max_size=2)), DTYPES[kind]) for kind in types
    ]
    questions = [
        pb.InferenceRow(reading=SensorData(seq=index, tensor=to_tensor(array))) for index, array in enumerate(arrays)
    ]
    rows, _ = rows_of(request(*questions))
    np.testing.assert_array_equal(gather(rows), np.stack([array.astype(np.float32) for array in arrays]))


def test_outputs_come_where_they_are_wanted():
    """All of them, in their own element types, row by row."""
    rows, _ = rows_of(request(row(1, 1.0, 2.0), row(2, 3.0, 4.0), wants_outputs=True))
    outcomes = infer(served(Echo()), rows)
    assert [[to_array(tensor).tolist() for tensor in outcome.outputs] for outcome in outcomes] == [
        [[1.0, 2.0], 3],
        [[3.0, 4.0], 7],
    ]
    plain, _ = rows_of(request(row(1, 1.0, 2.0)))
    assert infer(served(Echo()), plain)[0].outputs == ()


def test_scores_match_the_model_row_by_row():
    """Batching changes no answer."""
    values = np.random.default_rng(3).normal(size=(9, 2)).astype(np.float32)
    rows, _ = rows_of(request(*(row(index, *value) for index, value in enumerate(values))))
    together = infer(served(Echo()), rows)
    for outcome, value in zip(together, values, strict=True):
        assert [outcome] == infer(served(Echo()), rows_of(request(row(1, *value)))[0])
