"""What a node may conclude from live readings: pure decisions, then the slots that follow them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.release.probation import (
    BINS,
    EDGES,
    MAX_DIVERGENCE_PPM,
    MAX_ERROR_PPM,
    MAX_SCORES,
    MIN_ERRORS,
    MIN_READINGS,
    MIN_SCORES,
    PATIENCE,
    REWEIGHTING,
    Baseline,
    Outcome,
    Watch,
    divergence_ppm,
    measure_baseline,
    parse_baseline,
)
from shoal.v1.node_pb2 import SlotPhase
from shoal.v1.release_pb2 import Baseline as BaselineMessage

pytestmark = pytest.mark.device

PROBATION_S = 10.0
SCORES = st.floats(0.0, 1e6) | st.just(math.inf)
HISTOGRAMS = st.lists(st.integers(0, 1000), min_size=BINS, max_size=BINS).filter(any)


def row(number):
    return number.to_bytes(8, "big")


def watched(scores, *, errors=0, baseline=None):
    watch = Watch(baseline or Baseline())
    for number, score in enumerate(scores):
        watch.answered(score, row(number))
    for _ in range(errors):
        watch.erred("no such kernel")
    return watch


def outcome(watch, waited_s=PROBATION_S):
    return watch.decide(waited_s, PROBATION_S).outcome


def ppm(counts):
    total = sum(counts)
    return [count * 1_000_000 // total for count in counts]


def measured(scores):
    return parse_baseline(measure_baseline(scores))


@given(st.lists(SCORES, min_size=1, max_size=300))
def test_baseline_is_whole_and_accepts_its_own_scores(scores):
    """Shares add up to one; a model that does live what it did at the gate is never refused, however often asked."""
    message = measure_baseline(scores)
    assert sum(message.score_ppm) == 1_000_000
    assert (len(message.score_ppm), message.rows) == (BINS, len(scores))
    baseline = parse_baseline(message)
    watch = Watch(baseline)
    number = 0
    while number < MIN_SCORES + 7:
        for score in scores:
            watch.answered(score, row(number))
            number += 1
            if len(scores) > 1 and len(set(scores)) > 1:
                assert outcome(watch, 0.0) is not Outcome.FAIL
    assert watch.divergence_ppm == 0


def test_baseline_of_no_scores_is_its_limits():
    """Of a model that somebody else made, with no rows to measure."""
    assert measure_baseline([]) == BaselineMessage(max_error_ppm=MAX_ERROR_PPM, max_divergence_ppm=MAX_DIVERGENCE_PPM)


@given(HISTOGRAMS, st.integers(1, 10**6), st.data())
def test_any_choice_of_one_row_in_twenty_is_no_divergence(counts, rows, data):
    """What a layer below passes on may be distributed in any way that so large a share of the baseline allows."""
    kept = [data.draw(st.integers(0, count)) for count in counts]
    if sum(kept) * REWEIGHTING < sum(counts) or not any(kept):
        kept = counts
    # Rounding of each bin to a millionth, times the reweighting.
    assert divergence_ppm(ppm(kept), Baseline(tuple(ppm(counts)), 0)) <= BINS * REWEIGHTING
    assert divergence_ppm(ppm(kept), Baseline(tuple(ppm(counts)), 3_000_000 // rows)) <= BINS * REWEIGHTING


@given(HISTOGRAMS, HISTOGRAMS)
def test_divergence_is_a_share(observed, expected):
    """Between nothing and all, and never more for a baseline of fewer rows."""
    shares = tuple(ppm(expected))
    exact = divergence_ppm(ppm(observed), Baseline(shares, 0))
    assert 0 <= divergence_ppm(ppm(observed), Baseline(shares, 10_000)) <= exact <= 1_000_000


@given(
    answers=st.integers(0, 400),
    errors=st.integers(0, 60),
    waited_s=st.floats(0.0, 3 * PATIENCE * PROBATION_S),
)
def test_errors_decide_by_rate_and_least_count(answers, errors, waited_s):
    """Fail, wait and confirm are exactly what rate, counts and time say; probation always ends."""
    watch = watched([0.1] * answers, errors=errors)
    is_over = errors * 1_000_000 > MAX_ERROR_PPM * (answers + errors)
    is_patient = waited_s < PATIENCE * PROBATION_S
    if is_over and (errors >= MIN_ERRORS or not is_patient):
        expected = Outcome.FAIL
    elif waited_s < PROBATION_S or (is_patient and (is_over or answers + errors < MIN_READINGS)):
        expected = Outcome.WAIT
    else:
        expected = Outcome.CONFIRM
    assert outcome(watch, waited_s) is expected
    assert outcome(watch, PATIENCE * PROBATION_S) is not Outcome.WAIT


@pytest.mark.parametrize(
    ("answers", "errors", "waited_s", "expected"),
    [
        (0, MIN_ERRORS - 1, PATIENCE * PROBATION_S - 1, Outcome.WAIT),
        (0, MIN_ERRORS, 0.0, Outcome.FAIL),
        (0, 1, PATIENCE * PROBATION_S, Outcome.FAIL),
        (19, 1, PROBATION_S, Outcome.CONFIRM),
        (18, 1, PROBATION_S, Outcome.WAIT),
        (18, 2, PROBATION_S, Outcome.WAIT),
        (18, 2, PATIENCE * PROBATION_S, Outcome.FAIL),
        (95, 5, 0.0, Outcome.WAIT),
        (94, 5, 0.0, Outcome.FAIL),
        (0, 0, PATIENCE * PROBATION_S, Outcome.CONFIRM),
    ],
)
def test_errors_at_the_limits(answers, errors, waited_s, expected):
    """Pins each limit from both sides: more than one in twenty, five at least, and what patience ends with."""
    assert outcome(watched([0.1] * answers, errors=errors), waited_s) is expected


@given(st.lists(SCORES, max_size=50), st.integers(0, 20), st.floats(0, 1000))
def test_failing_names_its_reason(scores, errors, waited_s):
    """And nothing else has one."""
    decision = watched(scores, errors=errors).decide(waited_s, PROBATION_S)
    assert bool(decision.reason) == (decision.outcome is Outcome.FAIL)


def test_errors_fail_at_once_and_say_how_many():
    """A model that fails on everything is not watched to the end."""
    decision = watched([], errors=MIN_ERRORS).decide(0.1, PROBATION_S)
    assert decision.outcome is Outcome.FAIL
    assert decision.reason == "it failed on 5 of 5 readings, at most 5.0%: no such kernel"


def test_long_error_is_cut():
    """What a runtime says is bounded before it is stored and sent."""
    watch = Watch(Baseline())
    for _ in range(MIN_ERRORS):
        watch.erred("x" * 10_000)
    assert len(watch.decide(0.0, PROBATION_S).reason) < 300


def test_score_that_is_not_a_number_is_an_error():
    """It compares false with every threshold, so that it is no answer."""
    watch = watched([math.nan] * MIN_ERRORS)
    assert (watch.answers, watch.errors) == (0, MIN_ERRORS)
    assert outcome(watch, 0.0) is Outcome.FAIL


def test_drifted_scores_are_no_fault():
    """Scores three times as high as ever at the gate, or only the hardest rows, are what drift and cascades bring."""
    rng = random.Random(1)
    gate = [rng.lognormvariate(-4, 1) for _ in range(2000)]
    baseline = measured(gate)
    assert outcome(watched([3 * max(gate)] * 50 + [2 * max(gate)] * 100, baseline=baseline)) is Outcome.CONFIRM
    assert outcome(watched(sorted(gate)[-200:], baseline=baseline)) is Outcome.CONFIRM


@pytest.mark.parametrize("factor", [1e4, math.inf])
def test_scores_where_the_gate_saw_none_fail(factor):
    """Orders of magnitude off, on most readings: another scale, or an output that saturates."""
    rng = random.Random(2)
    gate = [rng.lognormvariate(-4, 1) for _ in range(2000)]
    watch = watched([score * factor for score in gate[: MIN_SCORES - 1]], baseline=measured(gate))
    assert outcome(watch) is Outcome.CONFIRM
    watch.answered(gate[-1] * factor, b"one more")
    decision = watch.decide(0.0, PROBATION_S)
    assert decision.outcome is Outcome.FAIL
    assert "of 100 scores" in decision.reason
    assert "next to none, at most 50.0%" in decision.reason


def test_scores_that_never_change_fail_unless_the_gate_saw_the_same():
    """An output that is stuck; a classifier that is sure of everything says 0 all the time and is right."""
    spread = measured([0.005, 0.05, 0.5] * 200)
    sure = measured([0.0] * 400 + [0.05] * 200)
    stuck = watched([0.05] * MIN_SCORES, baseline=spread).decide(0.0, PROBATION_S)
    assert stuck.reason == "100 different readings all score 0.05"
    assert outcome(watched([0.0] * MIN_SCORES, baseline=sure)) is Outcome.CONFIRM
    assert outcome(watched([0.05] * MIN_SCORES + [0.06], baseline=spread)) is Outcome.CONFIRM


def test_stuck_sensor_is_no_evidence_on_scores():
    """The same row again tells nothing new about the model; it is an answer all the same."""
    watch = Watch(measured([0.005, 0.05, 0.5] * 200))
    for _ in range(10 * MIN_SCORES):
        watch.answered(1e4, b"stuck")
    assert watch.divergence_ppm is None
    assert watch.answers == 10 * MIN_SCORES
    for number in range(MIN_SCORES):
        watch.answered(0.05, row(number))
    assert watch.divergence_ppm == 0
    assert outcome(watch) is Outcome.CONFIRM


def test_what_a_watch_remembers_is_bounded():
    """After so many rows nothing more is kept of them, and counting goes on."""
    watch = watched([0.1] * (MAX_SCORES + 100))
    assert len(watch._rows) == MAX_SCORES
    assert watch.answers == MAX_SCORES + 100


def test_few_rows_at_the_gate_hold_nothing_against_scores():
    """What eight golden rows did not show is not unheard of."""
    assert outcome(watched([1e4 + n for n in range(MIN_SCORES)], baseline=measured([0.1] * 8))) is Outcome.CONFIRM


@pytest.mark.parametrize(
    "message",
    [BaselineMessage(), BaselineMessage(score_ppm=[1_000_000], rows=9), BaselineMessage(score_ppm=[0] * BINS)],
)
def test_release_without_a_usable_baseline_is_held_to_errors_only(message):
    """Of a release made before there were any, of another version with other bins, or of nothing."""
    baseline = parse_baseline(message)
    assert baseline == Baseline((), 1_000_000, MAX_ERROR_PPM, MAX_DIVERGENCE_PPM)
    assert outcome(watched([1e9] * MAX_SCORES, baseline=baseline)) is Outcome.CONFIRM
    assert outcome(watched([], errors=MIN_ERRORS, baseline=baseline)) is Outcome.FAIL


def test_release_sets_its_own_limits():
    """Zero is a limit and not its absence; a million turns a criterion off."""
    message = BaselineMessage(score_ppm=[1_000_000] + [0] * (BINS - 1), rows=1000, max_error_ppm=0)
    strict = parse_baseline(message)
    assert outcome(watched([0.0] * 1000, errors=MIN_ERRORS, baseline=strict)) is Outcome.FAIL
    message.max_divergence_ppm = 1_000_000
    assert outcome(watched(range(10, 10 + MIN_SCORES), baseline=parse_baseline(message))) is Outcome.CONFIRM


def test_edges_are_those_that_releases_were_measured_with():
    """Pins the bins: other edges would need another field, because signed baselines hold shares only."""
    assert EDGES == (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)
    assert list(measure_baseline([1e-2]).score_ppm).index(1_000_000) == 5


# -- the slots ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(cloud, make_node):
    """A node that watches, with release 1 confirmed and release 2 on probation."""
    made = make_node()
    made.baseline = Baseline()
    for number in (1, 2):
        cloud.ship(b"model %d" % number, parent=number - 1)
        made.run(3)
        if number == 1:
            live(made)
            made.run(PROBATION_S)
            assert made.state.phase == SlotPhase.SLOT_PHASE_CONFIRMED
    assert (made.state.release, made.state.phase) == (2, SlotPhase.SLOT_PHASE_PROBATION)
    return made


def live(node, readings=MIN_READINGS):
    for number in range(readings):
        node.watch.answered(0.1, row(number))


def test_errors_bring_the_last_model_back_for_good(node):
    """At the next tick; the digest is blocked over a restart, and the state says why."""
    for _ in range(MIN_ERRORS):
        node.watch.erred("no such kernel")
    assert (node.state.answers, node.state.errors) == (0, MIN_ERRORS)
    node.run(0.5)
    assert node.active[-1] == (1, b"model 1")
    expected = "probation: it failed on 5 of 5 readings, at most 5.0%: no such kernel"
    assert (node.state.refused_release, node.state.refused_reason) == (2, expected)
    assert (node.state.release, node.state.phase) == (1, SlotPhase.SLOT_PHASE_CONFIRMED)
    node.boot()
    node.run(200)
    assert [release for release, _ in node.active] == [1, 2, 1, 1]
    assert node.state.refused_reason == expected


def test_good_readings_confirm_after_their_time(node):
    """Neither before, nor without readings."""
    node.run(PROBATION_S)
    assert node.state.phase == SlotPhase.SLOT_PHASE_PROBATION
    live(node)
    node.run(0.5)
    assert node.state.phase == SlotPhase.SLOT_PHASE_CONFIRMED


def test_silence_confirms_in_the_end(node):
    """A node without readings does not stay on probation, where no newer release could be installed."""
    node.run(PATIENCE * PROBATION_S + 1)
    assert (node.state.release, node.state.phase) == (2, SlotPhase.SLOT_PHASE_CONFIRMED)


def test_ordered_restarts_never_cost_a_good_model(node):
    """However many, of a node too slow to end its probation between them."""
    for _ in range(10):
        node.client.excuse_start()
        node.client.close()
        node.boot()
        node.run(3)
    assert (node.state.release, node.state.phase) == (2, SlotPhase.SLOT_PHASE_PROBATION)
    live(node)
    node.run(PROBATION_S)
    assert (node.state.phase, node.state.refused_release) == (SlotPhase.SLOT_PHASE_CONFIRMED, 0)


def test_two_power_cuts_are_survived_and_the_third_is_not(node):
    """Cuts are counted, because a model that kills its process looks the same; ordered restarts between do not help."""
    for cut in range(2):
        node.boot()
        assert node.active[-1] == (2, b"model 2"), cut
        node.client.excuse_start()
        node.boot()
    node.boot()
    assert node.active[-1] == (1, b"model 1")
    assert node.state.refused_reason == "it did not survive its probation"


def test_power_cut_starts_probation_anew_without_blame(node):
    """What the last start saw is gone, errors included; the model has its whole time again."""
    for _ in range(MIN_ERRORS - 1):
        node.watch.erred("glitch")
    node.boot()
    node.watch.erred("glitch")
    node.run(PROBATION_S / 2)
    assert (node.state.phase, node.state.errors) == (SlotPhase.SLOT_PHASE_PROBATION, 1)
    live(node, 100)
    node.run(PROBATION_S)
    assert node.state.phase == SlotPhase.SLOT_PHASE_CONFIRMED


def test_first_model_that_is_unfit_leaves_the_node_without_one(cloud, make_node):
    """There is nothing to go back to, and what was refused must not go on answering."""
    node = make_node()
    node.baseline = Baseline()
    cloud.ship(b"model 1")
    node.run(3)
    for _ in range(MIN_ERRORS):
        node.watch.erred("no such kernel")
    node.run(1)
    assert node.active == [(1, b"model 1"), (0, b"")]
    assert (node.state.answers, node.state.refused_release) == (0, 1)


def test_disk_that_fails_at_the_end_does_not_keep_a_node_from_ending(node, monkeypatch):
    """The try is lost, nothing else."""

    def broken(_slots):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node.client._installers["digits"]._store, "save", broken)
    node.client.excuse_start()
    assert node.counters["install_errors"] == 1
