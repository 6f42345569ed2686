"""The scorer is right where it gives what NAB published, row by row and file by file."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import nab_score
from benchmarks.nab_score import Judge, Labels

_NAB = Path(__file__).resolve().parents[3] / "shared" / "data" / "sensor_nab"
_FILE = "realKnownCause/ambient_temperature_system_failure.csv"
_DETECTORS = ("ARTime", "numenta", "randomCutForest")
needs_nab = pytest.mark.skipif(not _NAB.is_dir(), reason="left out: ../shared/data/sensor_nab is not there")


def published_rows(detector):
    with (_NAB / "published" / f"{detector}_{Path(_FILE).name}").open(newline="") as file:
        return list(csv.DictReader(file))


def labels_of(rows):
    at = [row["timestamp"] for row in rows]
    windows = json.loads((_NAB / "combined_windows.json").read_text())[_FILE]
    return Labels(len(rows), tuple((at.index(first[:19]), at.index(last[:19])) for first, last in windows))


@needs_nab
@pytest.mark.parametrize("detector", _DETECTORS)
def test_published_rows_give_the_published_score(detector):
    """Pins the whole scorer: the score of the file, from the detector's own scores of its rows."""
    rows = published_rows(detector)
    with (_NAB / "published" / f"{detector}_standard_scores.csv").open(newline="") as file:
        result = next(row for row in csv.DictReader(file) if row["File"] == _FILE)
    scores = np.array([float(row["anomaly_score"]) for row in rows])
    # A published threshold is a rounded score.
    alarms = nab_score.alarm_rows(scores, float(result["Threshold"]) - 1e-9)
    assert Judge(labels_of(rows)).raw(alarms) == pytest.approx(float(result["Score"]), abs=1e-9)


@needs_nab
def test_rows_earn_what_is_published():
    """Pins the sigmoid, inside and behind windows, at every row."""
    rows = published_rows("ARTime")
    earned = [float(row["S(t)_standard"]) for row in rows]
    np.testing.assert_allclose(nab_score.row_scores(labels_of(rows)), earned, atol=1e-6)


def test_probation_is_15_percent_of_at_most_5000_rows():
    """Pins NAB's definition on both sides of its bound."""
    assert Labels(1127, ()).probation == 169
    assert Labels(5000, ()).probation == 750
    assert Labels(22_695, ()).probation == 750


def test_silence_is_0_and_perfection_is_100():
    """Pins the scale, and that alarms in probation count neither way."""
    judge = Judge(Labels(1000, ((300, 399), (700, 799))))
    assert nab_score.scaled(judge.raw(np.array([], dtype=np.int64)), judge.windows) == 0.0
    assert nab_score.scaled(judge.raw(np.array([3, 149, 300, 310, 700])), judge.windows) == pytest.approx(100.0)
    assert judge.raw(np.array([150, 300, 700])) == pytest.approx(2.0 - 0.11)


def test_window_inside_probation_is_no_window():
    """Pins that nobody is asked for what cannot be earned; one that reaches out of probation is."""
    assert Judge(Labels(1000, ((10, 149), (400, 499)))).windows == 1
    assert Judge(Labels(1000, ((10, 150),))).windows == 1


def test_false_alarm_just_behind_a_window_is_cheap():
    """Pins the slope behind windows, of one row too, and its end at the next window."""
    earned = nab_score.row_scores(Labels(1000, ((300, 399), (420, 420))))
    assert -0.01 < earned[400] < 0.0
    assert earned[419] > -0.11
    assert earned[420] > 0.0
    assert earned[421] == -0.11


def test_windows_out_of_order_are_refused():
    """Pins that a score is never made of nonsense."""
    for windows in (((5, 3),), ((3, 5), (1, 2)), ((8, 10),)):
        with pytest.raises(ValueError, match="in order and inside"):
            Labels(10, windows)
    with pytest.raises(ValueError, match="no"):
        nab_score.scaled(0.0, 0)


@given(
    scores=st.lists(st.integers(0, 9), max_size=80),
    threshold=st.integers(0, 10),
    start=st.integers(0, 10),
    dead_time=st.integers(0, 12),
)
def test_dead_time_parts_alarms_and_hides_no_more(scores, threshold, start, dead_time):
    """Pins the rule both ways: alarms lie apart, and every exceedance is an alarm or in one's dead time."""
    values = np.array(scores, dtype=np.float64)
    alarms = nab_score.alarm_rows(values, threshold, start, dead_time).tolist()
    assert all(later - row > dead_time for row, later in itertools.pairwise(alarms))
    for row in range(start, len(scores)):
        if values[row] >= threshold:
            assert any(alarm <= row <= alarm + dead_time for alarm in alarms)
    assert all(row >= start and values[row] >= threshold for row in alarms)


def test_left_out_series_does_not_choose_its_threshold():
    """Pins leave-one-out: the series that alone wants the second threshold is judged at the first."""
    raw = np.array([[1.0, 0.0], [1.0, 0.5], [-1.0, 9.0]])
    assert nab_score.leave_one_out(raw).tolist() == [1, 1, 0]


def test_bootstrap_holds_the_score_and_knows_certainty():
    """Pins the interval: of equal series it has no width, of unequal ones it spans their mean."""
    rng = np.random.default_rng(1)
    assert nab_score.bootstrap([0.5] * 5, [1] * 5, rng) == (75.0, 75.0)
    low, high = nab_score.bootstrap([1.0, -1.0] * 4, [1] * 8, rng)
    assert low < 50.0 < high
