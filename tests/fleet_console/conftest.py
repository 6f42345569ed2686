from dataclasses import replace

import pytest

from cloud.pipelines.registry import ReleaseReport
from fleet_console.demo.measure import uplink
from fleet_console.demo.observer import Seen
from fleet_console.demo.report import Evidence
from shoal.delivery.ledger import Account, Row
from simulator.journal import Entry

READ = Entry(
    at=100.0,
    event="read",
    device="cam-00",
    seq=0,
    reference="",
    phase="before_drift",
    label=3,
    held_out=1,
    reason="kept.below_threshold",
    release=1,
    score=0.1,
    predicted=3,
    latency_ms=0.0,
    bytes_json=200,
    bytes_json_compact=80,
)
REPLY = replace(READ, event="reply", phase="", reason="answered", latency_ms=20.0, bytes_json=0, bytes_json_compact=0)


@pytest.fixture
def read():
    """Make a reading; what a test does not name is a camera's right answer to a held-out image."""

    def make(seq, **fields):
        return replace(READ, **{"seq": seq, "at": 100.0 + seq, "reference": f"row/{seq}", **fields})

    return make


@pytest.fixture
def reply():
    """Make the gateway's reply to the reading of that number."""

    def make(seq, **fields):
        return replace(REPLY, **{"seq": seq, "at": 100.5 + seq, "reference": f"row/{seq}", **fields})

    return make


@pytest.fixture
def cameras(read, reply):
    """Ten readings in each phase: all right, then 4 of 10, then 9 of 10; the gateway mends two after the drift."""
    return [
        *(read(seq, score=0.05 + seq / 100) for seq in range(10)),
        *(
            read(seq, phase="after_drift", predicted=3 if seq < 14 else 8, reason="asked.score", score=0.6)
            for seq in range(10, 20)
        ),
        *(reply(seq, predicted=3 if seq < 16 else 8, latency_ms=10.0 + seq) for seq in range(10, 20)),
        *(read(seq, phase="after_update", release=2, predicted=8 if seq == 20 else 3) for seq in range(20, 30)),
    ]


@pytest.fixture
def sensors(read, reply):
    """A hundred readings with five anomalies, all of them asked about and stored."""
    rows = [
        read(
            seq,
            device="sensor-00",
            label=int(seq % 20 == 0),
            held_out=0,
            predicted=None,
            reason="asked.score" if seq % 20 == 0 else "kept.below_threshold",
            score=5.0 if seq % 20 == 0 else 0.001 * (seq + 1),
        )
        for seq in range(100)
    ]
    return rows + [reply(seq, device="sensor-00", latency_ms=100.0 + seq) for seq in range(0, 100, 20)]


@pytest.fixture
def build():
    return ReleaseReport(
        model="digits",
        release=2,
        parent=1,
        labelled=312,
        created_at_us=1,
        tiers={
            "device": {
                "bytes_float": 17952,
                "bytes_int8": 8064,
                "metric_float": 0.98,
                "metric_int8": 0.985,
                "latency_float_us": 4.5,
                "latency_int8_us": 4.2,
                "ships": "int8",
                "reason": "int8: metric +0.0050",
                "metric_parent": 0.804,
            }
        },
        thresholds={"device": 0.2},
        metrics_ppm={"device_asked_share": 100000, "device_accuracy": 985000},
    )


@pytest.fixture
def evidence(cameras, sensors, build):
    """Evidence of a loop that closed."""
    return Evidence(
        seed=7,
        quick=True,
        seconds=61.26,
        account=Account(130, 115, 0, 15, 15, 0, 0, 0, 5, 5, 0, 0, 0),
        sensors=uplink(sensors, {Row("sensor-00", seq) for seq in range(0, 100, 20)}, Seen(500, 300.4)),
        sensor_entries=sensors,
        camera_entries=cameras,
        builds=[build],
        runtimes={"device": "LiteRT 9", "gateway": "ONNX Runtime 9"},
        broker_name="mosquitto",
        broker_version="2.0.22",
        messages={"infer": 12, "reply": 15},
        labels=9,
        restarts={},
    )


@pytest.fixture
def empty(evidence):
    """Evidence of a run that ended before its first reading."""
    return replace(
        evidence,
        account=Account(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        sensors=uplink([], set(), Seen()),
        sensor_entries=[],
        camera_entries=[],
        builds=[],
        messages={},
        labels=0,
    )
