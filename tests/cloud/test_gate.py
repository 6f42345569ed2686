import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cloud import gate
from cloud.gate import ArtefactReport, choose, passes
from cloud.tasks.base import GateLimits, RecallRule, ShareRule
from shoal.errors import ModelError
from shoal.tensors import to_array
from shoal.v1 import release_pb2 as pb

LIMITS = GateLimits(min_metric=0.9, max_drop_from_float=0.01, max_drop_from_parent=0.02, max_bytes=5000)
FLOAT = ArtefactReport(metric=0.95, latency_us=100, size_bytes=4000)

reports = st.builds(
    ArtefactReport,
    metric=st.floats(0, 1),
    latency_us=st.floats(1, 1000),
    size_bytes=st.integers(1, 10_000),
)
score_arrays = arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32).map(lambda v: round(v, 2)))


@pytest.mark.parametrize(
    ("change", "ships", "why"),
    [
        ({"latency_us": 60, "size_bytes": 1000}, True, "int8"),
        ({"latency_us": 110, "size_bytes": 1000}, True, "smaller"),
        ({"latency_us": 50, "size_bytes": 4400}, True, "int8"),
        ({"latency_us": 150, "size_bytes": 1000}, False, "slower"),
        ({"latency_us": 98, "size_bytes": 4400}, False, "neither"),
        ({"latency_us": 60, "size_bytes": 1000, "metric": 0.93}, False, "loses"),
    ],
)
def test_choose_ships_int8_only_where_it_gains(change, ships, why):
    """Faster and smaller ships; slower, pointless or worse does not, and the reason says which."""
    choice = choose(FLOAT, dataclasses.replace(FLOAT, **change), LIMITS)
    assert choice.int8 is ships
    assert why in choice.reason


def test_choose_keeps_float_when_only_int8_fails_the_gate():
    """A drop within its limit must not push a good model under the minimum."""
    exact = dataclasses.replace(FLOAT, metric=0.903)
    small = ArtefactReport(metric=0.897, latency_us=50, size_bytes=1000)
    assert "below 0.9" in choose(exact, small, LIMITS).reason


@given(exact=reports, small=reports)
def test_int8_never_ships_against_its_limits(exact, small):
    """Whatever was measured: a choice of int8 kept the metric, was not slower, and gained speed or size."""
    if choose(exact, small, LIMITS).int8:
        assert exact.metric - small.metric <= LIMITS.max_drop_from_float
        assert small.latency_us <= exact.latency_us * LIMITS.max_slowdown
        assert small.latency_us < exact.latency_us or small.size_bytes < exact.size_bytes


@pytest.mark.parametrize(
    ("change", "parent", "ok", "why"),
    [
        ({}, None, True, "0.9500"),
        ({}, 0.96, True, "parent 0.9600"),
        ({}, 0.99, False, "parent 0.9900"),
        ({"metric": 0.89}, None, False, "expected at least 0.9"),
        ({"metric": math.nan}, None, False, "expected at least 0.9"),
        ({"size_bytes": 5001}, None, False, "expected at most 5000"),
    ],
)
def test_passes_names_what_it_refuses(change, parent, ok, why):
    """Worse than the limits or than the model in the field does not ship."""
    verdict = passes(dataclasses.replace(FLOAT, **change), parent, LIMITS)
    assert verdict.ok is ok
    assert why in verdict.reason


@given(scores=score_arrays, data=st.data())
def test_threshold_for_count_is_the_highest_that_finds_enough(scores, data):
    """At least `count` wanted rows exceed it, and the next candidate above would lose one."""
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    count = data.draw(st.integers(1, len(scores)))
    if count > wanted.sum() or np.sort(scores[wanted])[-count] == 0:
        with pytest.raises(ModelError, match="no threshold"):
            gate.threshold_for_count(scores, wanted, count)
        return
    threshold = gate.threshold_for_count(scores, wanted, count)
    found = scores > np.float32(threshold)
    assert (found & wanted).sum() >= count
    assert (scores[wanted] > scores[found].min()).sum() < count


@given(scores=score_arrays, share=st.floats(0, 0.99))
def test_threshold_for_share_is_the_lowest_within_it(scores, share):
    """No more rows than allowed exceed it; letting in the next lower score would be too many."""
    threshold = gate.threshold_for_share(scores, share)
    found = scores > np.float32(threshold)
    assert found.sum() <= share * len(scores)
    assert (scores >= scores[~found].max()).sum() > share * len(scores)
    assert 0 <= threshold <= 1


def test_threshold_for_share_refuses_everything():
    """A threshold that asks for all rows is no threshold."""
    with pytest.raises(ValueError, match="less than all"):
        gate.threshold_for_share(np.ones(3, np.float32), 1.0)


def test_cascade_threshold_counts_only_what_the_device_asked():
    """The gateway's share of the recall is over all anomalies, though it sees only those that were asked."""
    labels = np.array([1] * 100 + [0] * 100)
    device = np.concatenate([np.linspace(1, 2, 100), np.linspace(0, 0.9, 100)]).astype(np.float32)
    gateway = np.concatenate([np.linspace(2, 1, 100), np.full(100, 3)]).astype(np.float32)
    first, second = gate.choose_thresholds(RecallRule(0.9, 0.8), device, gateway, labels)
    asked = device > np.float32(first)
    found = asked & (gateway > np.float32(second))
    assert asked.sum() == 90
    assert found.sum() == 80


def test_share_rule_takes_each_tier_alone():
    """Ten of a hundred at the device, five at the gateway."""
    scores = np.linspace(0, 0.9, 100).astype(np.float32)
    first, second = gate.choose_thresholds(ShareRule(0.1, 0.05), scores, scores, np.zeros(100, np.int64))
    assert ((scores > np.float32(first)).sum(), (scores > np.float32(second)).sum()) == (10, 5)


def test_recall_without_anomalies_is_refused():
    """No anomaly in the holdout means no threshold, not a threshold of nothing."""
    scores = np.ones(5, np.float32)
    with pytest.raises(ModelError, match="0 of 0"):
        gate.choose_thresholds(RecallRule(0.9, 0.8), scores, scores, np.zeros(5, np.int64))


def test_latency_is_the_fastest_of_interleaved_rounds():
    """A stall in one round does not count, calls take turns, and so does who begins."""
    now, order = [0], []

    def call(name, cost_ns, stall_at):
        def run():
            order.append(name)
            now[0] += 1_000_000 if order.count(name) == stall_at else cost_ns

        return run

    calls = [call("a", 2000, 5), call("b", 8000, 9)]
    assert gate.measure_latency_us(calls, rounds=5, repeats=2, clock_ns=lambda: now[0]) == [2.0, 8.0]
    assert order == ["a", "b", *"aabb", *"bbaa", *"aabb", *"bbaa", *"aabb"]


@pytest.mark.parametrize("model_format", [pb.MODEL_FORMAT_ONNX, pb.MODEL_FORMAT_TFLITE, pb.MODEL_FORMAT_UNSPECIFIED])
def test_bytes_that_no_runtime_takes_are_refused(model_format):
    """Damaged artefacts and unknown formats keep the old model."""
    with pytest.raises(ModelError):
        gate.load_runner(b"not a model at all", model_format)


@pytest.mark.parametrize("int8", [False, True])
def test_golden_vectors_hold_what_the_runner_said(int8):
    """Inputs, outputs and a tolerance in output units: steps of the span for int8, a share of the size for float."""
    rows = np.linspace(-1, 1, 60).reshape(20, 3).astype(np.float32)
    golden = gate.golden_vectors(lambda batch: batch * 255, rows, int8=int8, count=4)
    assert np.array_equal(to_array(golden.inputs), rows[:4])
    assert np.array_equal(to_array(golden.outputs), rows[:4] * 255)
    assert golden.tolerance == pytest.approx(8.0 if int8 else 0.0255)
