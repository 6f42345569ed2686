import json
from dataclasses import replace

import pytest

from fleet_console.demo.measure import Accuracy
from fleet_console.demo.report import check, make_report, timeline


@pytest.fixture
def right():
    return {
        "before_drift": Accuracy(1.0, 1.0, 10),
        "after_drift": Accuracy(0.4, 0.6, 10),
        "after_update": Accuracy(0.9, 0.9, 10),
    }


def _failed(checks):
    return [item.name for item in checks if not item.ok]


def test_closed_loop_passes_every_check(evidence, right):
    """Pins that the limits themselves are good enough: 0.9 accuracy passes."""
    assert _failed(check(evidence.account, evidence.sensors, right)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"holes": 1}, "no reading and no sample is missing"),
        ({"duplicates_stored": 1}, "nothing is stored twice"),
        ({"kept": 114}, "the ledger's sums are exact"),
        ({"answered": 14}, "the ledger's sums are exact"),
        ({"samples_stored": 4}, "the ledger's sums are exact"),
        ({"in_flight": 1, "answered": 14}, "nothing is still under way"),
        ({"kept": 114, "lost_before_accept": 1}, "nothing was lost before it was accepted"),
    ],
)
def test_ledger_that_does_not_close_fails_one_check(evidence, right, change, name):
    """Pins each figure of the ledger to the check that watches it."""
    assert _failed(check(replace(evidence.account, **change), evidence.sensors, right)) == [name]


@pytest.mark.parametrize(
    ("phase", "device", "names"),
    [
        ("after_update", 0.89, ["cameras recover"]),
        ("after_update", 0.6, ["cameras recover", "at least half of the fall is won back"]),
        # A fleet that never fell has nothing to win back: the drift was none.
        ("after_drift", 1.0, ["at least half of the fall is won back"]),
    ],
)
def test_fleet_that_does_not_recover_fails(evidence, right, phase, device, names):
    """Pins both conditions on accuracy, and that the device's own accuracy counts, not the cascade's."""
    right[phase] = replace(right[phase], device=device)
    assert _failed(check(evidence.account, evidence.sensors, right)) == names


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"recall": 0.95}, []),
        ({"recall": 0.949}, ["anomalies reach the cloud"]),
        ({"bytes_sent": 2000}, []),
        ({"bytes_sent": 2001}, ["uplink is small"]),
        ({"bytes_all_json": 0}, ["uplink is small"]),
    ],
)
def test_sensors_at_their_limits(evidence, right, change, names):
    """Pins both limits to the byte, and that nothing sent is not a small share of nothing."""
    assert _failed(check(evidence.account, replace(evidence.sensors, **change), right)) == names


def test_report_of_a_closed_loop(evidence):
    """Pins the document against figures counted by hand from the journals."""
    report = make_report(evidence)
    assert report["closed"] is True
    assert report["cameras"]["accuracy"] == {"before_drift": 1.0, "after_drift": 0.4, "after_update": 0.9}
    assert report["cameras"]["accuracy_cascade"] == {"before_drift": 1.0, "after_drift": 0.6, "after_update": 0.9}
    assert report["cameras"]["readings"] == 30
    assert report["sensors"]["recall"] == 1.0
    assert report["sensors"]["bytes_sent"] == 800
    assert report["sensors"]["bytes_all_json"] == 20_000
    # 10 + 10 .. 10 + 19 of cameras and 100, 120 .. 180 of sensors.
    assert report["latency_ms_by_fleet"]["cameras"]["p50"] == 24.5
    assert report["latency_ms_by_fleet"]["sensors"]["p50"] == 140.0
    assert report["run"]["seconds"] == 61.3
    assert report["ledger"]["holes"] == 0


def test_report_has_what_was_ordered(evidence):
    """Pins the names that readers of `report.json` rely on, and that it is JSON."""
    report = json.loads(json.dumps(make_report(evidence)))
    assert {"ledger", "cameras", "sensors", "models", "latency_ms", "broker"} <= report.keys()
    assert report["ledger"].keys() >= {
        *("produced", "kept", "lost_before_accept", "accepted", "answered", "dropped", "quarantined", "in_flight"),
        *("samples_promised", "samples_stored", "duplicates_stored", "holes"),
    }
    assert report["sensors"].keys() >= {"recall", "precision", "uplink_share", "bytes_sent", "bytes_all_json"}
    assert report["latency_ms"].keys() >= {"p50", "p99"}
    assert report["broker"] == {"name": "mosquitto", "version": "2.0.22"}
    (row,) = report["models"]
    assert row.keys() >= {
        *("model", "release", "tier", "runtime", "bytes_float", "bytes_int8"),
        *("metric_float", "metric_int8", "latency_float_us", "latency_int8_us"),
    }
    assert (row["release"], row["runtime"]) == (2, "LiteRT 9")


def test_report_of_nothing_is_a_loop_that_did_not_close(empty):
    """Pins that a run which ended early is reported, not a crash."""
    report = make_report(empty)
    assert report["closed"] is False
    assert report["latency_ms"] == {}
    assert json.dumps(report)


def test_timeline_begins_with_the_first_reading(cameras):
    """Pins that points and marks share one clock."""
    points, marks = timeline(cameras)
    assert [(mark.at_s, mark.text) for mark in marks] == [(0, "release 1"), (10, "drift begins"), (20, "release 2")]
    assert sum(point.readings for point in points) == 30
