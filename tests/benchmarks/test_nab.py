"""The benchmarks read any folder laid out like NAB's and SKAB's, and report what they did."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import nab, nab_score, skab
from benchmarks.labelled_series import Series, load_nab, load_skab
from benchmarks.nab_score import Labels
from cloud.detectors.alarms import Alarms

_START = np.datetime64("2024-01-01T00:00:00")


def write_nab(folder, files):
    """Write (name, values, windows as rows) as NAB does."""
    windows = {}
    for name, values, rows in files:
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        at = [str(_START + np.timedelta64(5 * row, "m")).replace("T", " ") for row in range(len(values))]
        path.write_text("timestamp,value\n" + "".join(f"{t},{v}\n" for t, v in zip(at, values, strict=True)))
        windows[name] = [[f"{at[first]}.000000", f"{at[last]}.000000"] for first, last in rows]
    (folder / "combined_windows.json").write_text(json.dumps(windows))


def series_with_spike(rows=1200, spike=800, seed=0):
    values = np.random.default_rng(seed).normal(size=rows)
    values[spike] += 20.0
    return values


def test_folder_of_other_files_is_scored_with_everything_frozen(tmp_path):
    """Pins the command from other files to the line of JSON: found early, no false alarm, nothing written."""
    write_nab(
        tmp_path, [("a/b.csv", series_with_spike(), [(800, 920)]), ("c.csv", series_with_spike(seed=1)[:700], [])]
    )
    command = [sys.executable, nab.__file__, "--data", str(tmp_path), "--threshold", "5"]
    before = nab._RESULTS.read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    result = json.loads(done.stdout)
    assert result["score"] == pytest.approx(100.0, abs=0.1)
    assert result["files"]["a/b.csv"]["found"] == 1
    assert result["files"]["c.csv"]["false_alarms"] == 0
    assert result["threshold"] == 5.0
    assert {"interval", "leave_one_out", "published", "us_per_point"} <= result.keys()
    assert nab._RESULTS.read_bytes() == before


def test_file_without_labels_is_refused(tmp_path):
    """Pins that a file that nobody labelled is not taken for one without anomalies."""
    write_nab(tmp_path, [("a.csv", series_with_spike(), [])])
    (tmp_path / "combined_windows.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"a\.csv"):
        load_nab(tmp_path)


def test_window_edges_are_rows_of_the_file(tmp_path):
    """Pins the labels, and that an edge between two rows is refused, as it would shift what an alarm earns."""
    write_nab(tmp_path, [("a.csv", np.zeros(300), [(100, 110), (200, 205)])])
    assert load_nab(tmp_path)[0].labels.windows == ((100, 110), (200, 205))
    (tmp_path / "combined_windows.json").write_text('{"a.csv": [["2024-01-01 01:02:03", "2024-01-01 02:00:00"]]}')
    with pytest.raises(SystemExit, match="timestamps"):
        load_nab(tmp_path)


def test_gaussian_looks_back_only():
    """Pins that the baseline that we compare with is causal too."""
    values = series_with_spike()[:, None]
    whole = nab.gaussian(Series("", values, Labels(len(values), ())))
    np.testing.assert_allclose(nab.gaussian(Series("", values[:500], Labels(500, ()))), whole[:500])


def test_plateau_is_the_run_around_the_best():
    """Pins that a second good place elsewhere does not widen it."""
    flags = np.array([True, False, True, True, False, True])
    assert nab._around(flags, 3) == slice(2, 4)
    assert nab._around(flags, 0) == slice(0, 1)
    assert nab._around(flags, 5) == slice(5, 6)


@pytest.mark.skipif(not nab._DATA.is_dir(), reason="left out: ../shared/data/sensor_nab is not there")
def test_detector_reaches_what_the_docs_say():
    """Pins at least 80 at one threshold for all files, and when each file's is chosen by the others."""
    run = nab.sweep(load_nab(nab._DATA), nab.novelty)
    result = nab.summary(run, nab.best(run))
    assert result["score"] >= 85.0
    assert result["leave_one_out"] >= 80.0
    frozen = run.total(run.raw_at(2.3))
    assert frozen >= 85.0


@pytest.mark.skipif(not nab._DATA.is_dir(), reason="left out: ../shared/data/sensor_nab is not there")
def test_published_scores_are_those_of_the_folder():
    """Pins the sum of NAB's published scores of each file: 85.0 for CAD-OSE is what others computed too."""
    found = nab.published(nab._DATA, load_nab(nab._DATA))
    assert found["contextOSE"] == {"at_nab_threshold": 85.0, "same_sweep": 85.0}
    assert nab.published(nab._DATA, [Series("other.csv", np.zeros((9, 1)), Labels(9, ((5, 6),)))]) == {}


def test_rates_of_everything_anomalous_are_trivial():
    """Pins the definitions, at the corner that fools F1."""
    truth = np.array([True, True, False, False, False])
    everything = skab.rates(skab.counts(np.ones(5, dtype=bool), truth))
    assert everything["f1"] == pytest.approx(4 / 7)
    assert (everything["false_alarm_rate"], everything["missed_alarm_rate"]) == (1.0, 0.0)
    half = skab.rates(skab.counts(np.array([True, False, True, False, False]), truth))
    assert (half["f1"], half["missed_alarm_rate"]) == (0.5, 0.5)
    assert half["false_alarm_rate"] == pytest.approx(1 / 3)


@pytest.mark.skipif(not skab._DATA.is_dir(), reason="left out: ../shared/data/sensor_skab is not there")
def test_detector_beats_everything_anomalous_on_skab():
    """Pins F1 above the trivial one, on the first files, with false alarms on less than all rows."""
    files = [load_skab(path) for path in sorted((skab._DATA / "valve1").glob("*.csv"))[:4]]
    alarms = [skab.scores(values[:400], values[400:]) >= skab._THRESHOLD for values, _ in files]
    result = skab.summary(alarms, [truth[400:] for _, truth in files])
    trivial = skab.summary([np.ones_like(each) for each in alarms], [truth[400:] for _, truth in files])
    assert result["f1"] > trivial["f1"] + 0.03
    assert result["false_alarm_rate"] < 0.7


def test_alarms_of_a_stream_are_those_of_the_sweep():
    """Pins that the dead time that was measured is the one that the product has."""
    scores = np.random.default_rng(0).random(500)
    alarms = Alarms(0.9, 7)
    assert (
        np.flatnonzero([alarms.update(score) for score in scores]).tolist()
        == nab_score.alarm_rows(scores, 0.9, 0, 7).tolist()
    )
