"""From a recorded trace to settings: the recording, the replay in virtual time, the choice."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gateway.costs import element_of, measure
from edge_gateway.deploy import local_model
from edge_gateway.replay import Costs, Setting, replay
from edge_gateway.trace import Asked, faster, format_line, of_model, parse_trace
from edge_gateway.tune import advise, candidates
from shoal.errors import ConfigError
from tests.edge_gateway.test_gateway_live import linear

WINDOW = 500
SLOW = {(1, 1): 0.010, (1, 4): 0.020, (2, 1): 0.014, (2, 4): 0.028}
FAST = {(1, 1): 0.001, (1, 2): 0.001, (1, 4): 0.002}


def asked(at_s, device="d", rows=1):
    return Asked(at_s, device, "m", rows, 100)


# -- the recording ----------------------------------------------------------------------------------------------------


def test_line_comes_back_as_it_was_written():
    """What is recorded can be replayed."""
    trace = [asked(0.0), asked(0.25, "other", 7)]
    assert parse_trace([format_line(each) for each in trace]) == trace


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense", "line 2: JSON"),
        (b'{"at_s": 1, "device": "d", "model": "m", "bytes": 9}', "line 2: .*`rows`"),
        (b'{"at_s": 1, "device": "d", "model": "m", "rows": 0, "bytes": 9}', r"line 2: .*\$.rows"),
        (b'{"at_s": -1, "device": "d", "model": "m", "rows": 1, "bytes": 9}', r"line 2: .*\$.at_s"),
        (b'{"at_s": 1, "device": "No", "model": "m", "rows": 1, "bytes": 9}', "line 2: device"),
        (b'{"at_s": 1, "device": "d", "model": "m", "rows": 1, "bytes": 9, "colour": 1}', "line 2: .*`colour`"),
        (b'{"at_s": 0.5, "device": "d", "model": "m", "rows": 1, "bytes": 9}', "line 2: at_s: 0.5 is before 1"),
        (b"\xff", "line 2: "),
    ],
)
def test_bad_line_is_named_with_its_field(line, said):
    """An operator can find it."""
    with pytest.raises(ConfigError, match=said):
        parse_trace([format_line(asked(1.0)), line])


def test_empty_trace_is_refused():
    """There is nothing to replay."""
    with pytest.raises(ConfigError, match="no requests"):
        parse_trace([])


def test_model_is_chosen_where_there_are_several():
    """And need not be where there is one."""
    trace = [asked(0.0), Asked(1.0, "d", "other", 1, 100)]
    assert of_model(trace[:1], None) == trace[:1]
    assert of_model(trace, "other") == trace[1:]
    with pytest.raises(ConfigError, match="m, other: choose one"):
        of_model(trace, None)
    with pytest.raises(ConfigError, match="no requests to third, but to m, other"):
        of_model(trace, "third")


def test_faster_trace_has_the_same_requests_closer_together():
    """What if the fleet grows."""
    assert [each.at_s for each in faster([asked(0.0), asked(2.0)], 4)] == [0.0, 0.5]


# -- the replay -------------------------------------------------------------------------------------------------------

requests = st.lists(
    st.tuples(st.floats(0, 0.1), st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=80
).map(lambda items: [asked(at_s, device, rows) for at_s, device, rows in sorted(items)])
settings = st.builds(Setting, st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.001, 0.05]), st.integers(1, 2))


@given(requests, settings, st.sampled_from([SLOW, FAST]), st.integers(1, 20))
def test_every_row_leaves_once(trace, setting, batch_s, window):
    """However they come: each request is answered or refused, after its arrival, and no row runs twice."""
    done = replay(trace, setting, Costs(batch_s, 1e-5, 2e-5, 1e-6), window=window)
    assert len(done.latencies_s) + done.refused == len(trace)
    if not done.refused:
        assert done.rows == sum(each.rows for each in trace)
    assert done.batches >= done.rows / setting.max_batch_size
    assert all(latency > 0 for latency in done.latencies_s)
    assert 0 < done.utilisation <= 1.0001


def test_one_worker_is_a_queue_with_constant_service():
    """M/D/1: each wait as Lindley's recursion says, and their mean as Pollaczek and Khinchine say."""
    rng, service_s, load = random.Random(3), 0.010, 0.7
    gaps = [rng.expovariate(load / service_s) for _ in range(40_000)]
    trace = [asked(at_s, f"d{index % 400}") for index, at_s in enumerate(itertools.accumulate(gaps))]
    wait, waits = 0.0, [0.0]
    for gap in gaps[1:]:
        wait = max(0.0, wait + service_s - gap)
        waits.append(wait)
    done = replay(trace, Setting(1), Costs({(1, 1): service_s}), window=10_000)
    # The gateway lets devices take turns, so that single waits differ where one asks twice in a queue.
    assert np.quantile(done.latencies_s, 0.99) == pytest.approx(np.quantile(waits, 0.99) + service_s, rel=0.01)
    assert np.mean(done.latencies_s) == pytest.approx(service_s + load * service_s / 2 / (1 - load), rel=0.05)
    assert done.utilisation == pytest.approx(load, rel=0.02)


def test_fast_model_answers_a_whole_round_together():
    """Worked by hand: four rows at once, two a batch, 1 ms each; replies leave when the loop is done."""
    done = replay([asked(0.0, f"d{index}") for index in range(4)], Setting(2), Costs(FAST), window=WINDOW)
    assert done.latencies_s == pytest.approx([0.002] * 4)
    assert (done.batches, done.utilisation) == (2, pytest.approx(1.0))


def test_waiting_for_company_is_played():
    """Worked by hand: the first waits 5 ms, the second joins it, both run for 1 ms."""
    costs = Costs(FAST, round_s=0.0, request_s=0.0001)
    done = replay([asked(0.0, "a"), asked(0.002, "b")], Setting(4, 0.005), costs, window=WINDOW)
    # 0.1 ms to take the first, 5 ms from then, 1 ms for both.
    assert sorted(done.latencies_s) == pytest.approx([0.0041, 0.0061])
    assert done.batches == 1


def test_two_workers_take_what_one_cannot():
    """Two calls at once cost what was measured for two at once."""
    trace = [asked(0.0, "a"), asked(0.0, "b")]
    one = replay(trace, Setting(1, workers=1), Costs(SLOW), window=WINDOW)
    two = replay(trace, Setting(1, workers=2), Costs(SLOW), window=WINDOW)
    assert sorted(one.latencies_s) == pytest.approx([0.010, 0.020])
    assert sorted(two.latencies_s) == pytest.approx([0.010, 0.014])


def test_costs_between_sizes_lie_on_a_line():
    """Not every size is measured."""
    assert Costs(SLOW).call_s(2) == pytest.approx(0.010 + 0.010 / 3)
    assert Costs(SLOW).call_s(2, running=9) == pytest.approx(0.014 + 0.014 / 3)


def test_what_finds_no_room_is_refused():
    """As the gateway refuses a device that has too many waiting."""
    done = replay([asked(0.0, rows=70), asked(0.001), asked(0.002, "other")], Setting(1), Costs(SLOW), window=WINDOW)
    assert (done.refused, done.keeps_up) == (1, False)


# -- the choice -------------------------------------------------------------------------------------------------------


def test_advice_is_the_soonest_of_those_that_keep_up():
    """At 100 a second and 10 ms a row, only batches keep up; and no larger ones than help."""
    rng = random.Random(5)
    times = itertools.accumulate(rng.expovariate(150) for _ in range(3000))
    advice = advise([asked(at_s, f"d{index % 50}") for index, at_s in enumerate(times)], Costs(SLOW), window=WINDOW)
    alone = [each for each in advice.tried if each.setting == Setting(1, 0.0, 1)]
    assert not alone[0].keeps_up
    assert advice.best.keeps_up
    assert advice.best.setting.max_batch_size == 4
    able = [each.quantile_s(0.99) for each in advice.tried if each.keeps_up]
    assert advice.best.quantile_s(0.99) <= min(able) * 1.02


def test_nothing_is_advised_where_nothing_keeps_up():
    """A thousand a second, and 5 ms a row at best."""
    trace = [asked(index / 1000, f"d{index % 50}") for index in range(2000)]
    advice = advise(trace, Costs(SLOW), window=WINDOW)
    assert advice.best is None
    assert all(each.utilisation > 0.9 for each in advice.tried if each.setting.max_delay_s == 0)


def test_candidates_have_workers_only_where_they_would_be_used():
    """A fast model runs in the loop's thread."""
    assert {each.workers for each in candidates(Costs(SLOW))} == {1, 2}
    assert {each.workers for each in candidates(Costs({**FAST, (2, 1): 0.001, (2, 2): 0.001, (2, 4): 0.001}))} == {1}


# -- the measurement --------------------------------------------------------------------------------------------------


def test_costs_are_measured_with_the_gateways_own_code(tmp_path):
    """Each size has a cost, and a request costs something beside the model."""
    served = local_model("m", linear(tmp_path / "m.onnx"))
    costs = measure(served, 1, 0.2, element=np.dtype(np.uint8))
    assert costs.sizes == [1, 2, 4, 8, 16, 32, 64]
    assert all(took_s > 0 for took_s in costs.batch_s.values())
    assert 0 < costs.request_s + costs.row_s < 0.01


@pytest.mark.parametrize(("row_bytes", "expected"), [(3100, np.uint8), (12_400, np.float32), (24_600, np.float64)])
def test_element_type_is_told_by_the_length(row_bytes, expected):
    """The trace has no payloads, and bytes are read faster than floats."""
    assert element_of(row_bytes, 3072) == np.dtype(expected)
