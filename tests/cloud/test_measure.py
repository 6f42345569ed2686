from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloud import gate, measure
from cloud.export import to_tflite
from cloud.measure import Interval, interleave, metric_interval, repeats_for, speed_ratio, zstd_bytes
from cloud.tflite_child import ask_child
from shoal.errors import ModelError

DEVICE_PYTHON = Path(__file__).parents[2] / ".venv-device" / "bin" / "python"


class Machine:
    """Calls that take known times on a clock of their own, and write down their order."""

    def __init__(self, costs_ns):
        self.now_ns = 0
        self.slowdown = 1
        self.order = []
        self.calls = [lambda index=index, cost=cost: self.run(index, cost) for index, cost in enumerate(costs_ns)]

    def run(self, index, cost_ns):
        self.order.append(index)
        self.now_ns += cost_ns * self.slowdown

    def clock_ns(self):
        return self.now_ns


def test_calls_take_turns_and_another_begins_each_round():
    """Pins that all calls share a round, after one warm-up each, with the repeats of each."""
    machine = Machine([2, 10])
    taken = interleave(machine.calls, rounds=2, repeats=[3, 1], clock_ns=machine.clock_ns)
    assert machine.order == [0, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    assert taken.tolist() == [[2, 10], [2, 10]]


def test_repeats_fill_a_turn():
    """Pins that a fast call is repeated until a clock can see it, and a slow one runs once."""
    machine = Machine([1_000, 900_000_000])
    assert repeats_for(machine.calls, 0.001, machine.clock_ns) == [1_000, 1]


def test_slow_rounds_do_not_move_the_ratio():
    """Pins the pairing: half of the rounds ran on a machine three times as slow, for both calls."""
    slow = np.where(np.arange(20) % 2, 3.0, 1.0)
    assert speed_ratio(40 * slow, 10 * slow, seed=0) == Interval(4.0, 4.0, 4.0)


def test_ratio_lies_within_an_interval_that_narrows_with_rounds():
    """Pins that the interval is of the ratio, the same for a seed, and narrower with more evidence."""
    rng = np.random.default_rng(1)
    base, other = rng.lognormal(np.log(30), 0.2, 400), rng.lognormal(np.log(10), 0.2, 400)
    few, many = (speed_ratio(base[:count], other[:count], seed=0) for count in (20, 400))
    assert few == speed_ratio(base[:20], other[:20], seed=0)
    for found in (few, many):
        assert found.low < 3.0 < found.high
        assert found.low <= found.value <= found.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_metric_interval_covers_as_often_as_it_says():
    """Pins the coverage: of 200 samples of a coin of 0.8, about 95 % of the intervals hold 0.8."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        right = rng.random(150) < 0.8
        found = metric_interval(lambda rows, right=right: float(right[rows].mean()), 150, seed=0, resamples=200)
        covered += found.low <= 0.8 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


@given(st.integers(2, 50), st.integers(0, 9))
def test_difference_of_equal_models_is_exactly_nothing(rows, seed):
    """Pins that a paired difference draws the same rows for both."""
    right = np.random.default_rng(seed).random(rows) < 0.5
    found = metric_interval(lambda drawn: float(right[drawn].mean() - right[drawn].mean()), rows, seed, resamples=20)
    assert found == Interval(0.0, 0.0, 0.0)


def test_zstd_sees_what_repeats():
    """Pins that packed bytes are counted, not raw ones."""
    noise = np.random.default_rng(0).bytes(10_000)
    small, large = zstd_bytes(bytes(10_000)), zstd_bytes(noise)
    if small is None:
        pytest.skip("left out: needs the program zstd")
    assert small < 100
    assert large >= 10_000


def test_missing_zstd_is_told(monkeypatch):
    """Pins None and not 0 where the program is missing."""
    monkeypatch.setattr(measure.shutil, "which", lambda _: None)
    assert zstd_bytes(b"x") is None


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    return to_tflite(torch.nn.Linear(4, 3).eval(), (4,))


def test_child_answers_as_litert(linear):
    """Pins that the other runtime runs the same bytes on the same rows, and is timed."""
    if not DEVICE_PYTHON.exists():
        pytest.skip("left out: needs .venv-device (make venv-device)")
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = ask_child(DEVICE_PYTHON, [linear, linear], rows, rounds=3, turn_s=0.001, timeout_s=60)
    assert found.taken_ns.shape == (3, 2)
    assert (found.taken_ns > 0).all()
    for outputs in found.outputs:
        assert np.allclose(outputs, gate.tflite_runner(linear)(rows), atol=1e-5)


def test_child_that_fails_is_told_with_its_reason(tmp_path):
    """Pins that nothing is left out in silence."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no such runtime' >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ModelError, match="ended with 3: no such runtime"):
        ask_child(python, [], np.zeros((1, 4), np.float32), rounds=1, turn_s=0.001, timeout_s=60)


def test_child_that_hangs_is_ended(tmp_path):
    """Pins the limit of time."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    python.chmod(0o755)
    with pytest.raises(ModelError, match=r"more than 0\.2 s"):
        ask_child(python, [], np.zeros((1, 4), np.float32), rounds=1, turn_s=0.001, timeout_s=0.2)
