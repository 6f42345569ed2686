"""What the demo found, as one JSON document. No number in it is typed: each comes from the run."""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import psutil

from cloud.pipelines.registry import ReleaseReport
from fleet_console.demo.measure import (
    Accuracy,
    AccuracyPoint,
    Mark,
    Uplink,
    accuracy,
    accuracy_over_time,
    latencies_ms,
    marks,
    percentiles,
    reads,
)
from shoal.delivery.ledger import Account
from simulator.journal import Entry
from simulator.script import Phase

_WINDOW_S = 3.0
_DIGITS = 4
# What the issue that ordered the demo calls a closed loop.
_MIN_ACCURACY = 0.9
_MIN_RECOVERED = 0.5
_MIN_RECALL = 0.95
_MAX_BYTES_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a report is made of."""

    seed: int
    quick: bool
    seconds: float
    account: Account
    sensors: Uplink
    sensor_entries: Sequence[Entry]
    camera_entries: Sequence[Entry]
    builds: Sequence[ReleaseReport]
    runtimes: dict[str, str]
    broker_name: str
    broker_version: str
    messages: dict[str, int]
    labels: int
    restarts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of a closed loop."""

    name: str
    ok: bool
    measured: str


def make_report(evidence: Evidence) -> dict[str, Any]:
    """Put the evidence into the document that `report.json` holds."""
    phases = (Phase.BEFORE_DRIFT, Phase.AFTER_DRIFT, Phase.AFTER_UPDATE)
    right = {phase.value: accuracy(evidence.camera_entries, phase) for phase in phases}
    fleet_restarted = any(name in evidence.restarts for name in ("sensors", "cameras"))
    checks = check(evidence.account, evidence.sensors, right, fleet_restarted=fleet_restarted)
    everything = [*evidence.sensor_entries, *evidence.camera_entries]
    return {
        "closed": all(item.ok for item in checks),
        "checks": [asdict(item) for item in checks],
        "ledger": asdict(evidence.account),
        "cameras": {
            "accuracy": {name: round(item.device, _DIGITS) for name, item in right.items()},
            "accuracy_cascade": {name: round(item.cascade, _DIGITS) for name, item in right.items()},
            "held_out_readings": {name: item.readings for name, item in right.items()},
            "readings": len(reads(evidence.camera_entries)),
            "labels": evidence.labels,
            "labels_from": "the data set, through the labelling command, as a stand-in for a human annotator",
            "events": [asdict(mark) for mark in marks(evidence.camera_entries)],
        },
        "sensors": asdict(evidence.sensors),
        "models": [row for build in evidence.builds for row in _model_rows(build, evidence.runtimes)],
        "latency_ms": percentiles(latencies_ms(everything)),
        "latency_ms_by_fleet": {
            "sensors": percentiles(latencies_ms(evidence.sensor_entries)),
            "cameras": percentiles(latencies_ms(evidence.camera_entries)),
        },
        "messages": evidence.messages,
        "broker": {"name": evidence.broker_name, "version": evidence.broker_version},
        "run": {
            "seed": evidence.seed,
            "quick": evidence.quick,
            "seconds": round(evidence.seconds, 1),
            "restarts": evidence.restarts,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "shoal": version("shoal"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": psutil.cpu_count(),
        },
    }


def check(
    account: Account, sensors: Uplink, right: dict[str, Accuracy], *, fleet_restarted: bool = False
) -> list[Check]:
    """Say whether the loop closed, condition by condition.

    Only a fleet process that was killed may have lost readings that its outbox had not accepted yet.
    """
    before, after = right["before_drift"].device, right["after_drift"].device
    updated = right["after_update"].device
    fall = before - after
    recovered = (updated - after) / fall if fall > 0 else 0.0
    settled = account.answered + account.dropped + account.quarantined + account.in_flight
    share = sensors.bytes_sent / sensors.bytes_all_json if sensors.bytes_all_json else 1.0
    sums = (
        account.produced == account.kept + account.lost_before_accept + account.accepted
        and account.accepted == settled
        and account.samples_stored + account.samples_set_aside >= account.samples_promised
    )
    return [
        Check("no reading and no sample is missing", account.holes == 0, f"{account.holes} holes"),
        Check("nothing is stored twice", account.duplicates_stored == 0, f"{account.duplicates_stored} duplicates"),
        Check("the ledger's sums are exact", sums, f"{account.produced:,} rows produced"),
        Check(
            "nothing was lost before it was accepted",
            account.lost_before_accept == 0 or fleet_restarted,
            f"{account.lost_before_accept} lost",
        ),
        Check("nothing is still under way", account.in_flight == 0, f"{account.in_flight} in flight"),
        Check("cameras recover", updated >= _MIN_ACCURACY, f"accuracy {updated:.3f}, at least {_MIN_ACCURACY}"),
        Check(
            "at least half of the fall is won back",
            fall > 0 and recovered >= _MIN_RECOVERED,
            f"fell from {before:.3f} to {after:.3f}, {recovered:.0%} won back",
        ),
        Check(
            "anomalies reach the cloud",
            sensors.recall >= _MIN_RECALL,
            f"recall {sensors.recall:.3f}, at least {_MIN_RECALL}",
        ),
        Check(
            "uplink is small",
            share <= _MAX_BYTES_SHARE,
            f"{share:.1%} of every reading as canonical JSON, at most {_MAX_BYTES_SHARE:.0%}",
        ),
    ]


def timeline(entries: Sequence[Entry]) -> tuple[list[AccuracyPoint], list[Mark]]:
    """What the first plot shows."""
    return accuracy_over_time(entries, _WINDOW_S), marks(entries)


def _model_rows(build: ReleaseReport, runtimes: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"model": build.model, "release": build.release, "tier": tier, "runtime": runtimes[tier], **figures}
        for tier, figures in build.tiers.items()
    ]
