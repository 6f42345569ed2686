"""Figures from the journals, the wire and the store. Pure: lists in, numbers out."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from fleet_console.demo.observer import Seen
from shoal.delivery.ledger import Books, Row
from shoal.v1.node_pb2 import NodeState
from simulator.journal import Entry
from simulator.script import Phase

_ASKED = "asked."


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers on held-out images: no release was trained on them.

    `device` is the device's own answer to every reading; `cascade` is what the application has in the end, the
    gateway's answer where one was asked for.
    """

    device: float
    cascade: float
    readings: int


@dataclass(frozen=True, slots=True)
class AccuracyPoint:
    """Accuracy in one window of time, seconds since the first reading."""

    at_s: float
    device: float
    cascade: float
    readings: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened, seconds since the first reading."""

    at_s: float
    text: str


def reads(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.event == "read"]


def replies(entries: Iterable[Entry]) -> dict[Row, Entry]:
    return {Row(entry.device, entry.seq): entry for entry in entries if entry.event == "reply"}


def accuracy(entries: Sequence[Entry], phase: Phase) -> Accuracy:
    """Of one phase, on held-out readings that a device answered."""
    answered = replies(entries)
    scored = [entry for entry in reads(entries) if entry.phase == phase.value and _is_scored(entry)]
    return _accuracy(scored, answered)


def accuracy_by_release(entries: Sequence[Entry]) -> dict[tuple[int, str], Accuracy]:
    """By release and phase, for who looks on while it runs."""
    answered = replies(entries)
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in reads(entries):
        if _is_scored(entry):
            groups.setdefault((entry.release, entry.phase), []).append(entry)
    return {key: _accuracy(group, answered) for key, group in sorted(groups.items())}


def accuracy_over_time(entries: Sequence[Entry], window_s: float) -> list[AccuracyPoint]:
    """Windows without a held-out reading are left out."""
    answered = replies(entries)
    everything = reads(entries)
    start = everything[0].at if everything else 0.0
    windows: dict[int, list[Entry]] = {}
    for entry in everything:
        if _is_scored(entry):
            windows.setdefault(int((entry.at - start) / window_s), []).append(entry)
    points = []
    for index, group in sorted(windows.items()):
        right = _accuracy(group, answered)
        points.append(AccuracyPoint((index + 0.5) * window_s, right.device, right.cascade, right.readings))
    return points


def marks(entries: Sequence[Entry]) -> list[Mark]:
    """When the first reading drifted, and when each release first answered."""
    found: list[Mark] = []
    known: set[int] = set()
    everything = reads(entries)
    drifting = False
    for entry in everything:
        at_s = entry.at - everything[0].at
        if not drifting and entry.phase == Phase.AFTER_DRIFT.value:
            drifting = True
            found.append(Mark(at_s, "drift begins"))
        if entry.release and entry.release not in known:
            known.add(entry.release)
            found.append(Mark(at_s, f"release {entry.release}"))
    return found


@dataclass(frozen=True, slots=True)
class Uplink:
    """What the sensors cost and found.

    Attributes:
        recall: labelled anomalies that the cloud has, of all that the sensors read.
        precision: labelled anomalies among the samples that the cloud has.
        asked_share, uplink_share: readings asked about, and stored in the cloud, of all.
        bytes_sent: application payload of all infer and sample messages.
        bytes_all_json: every reading as the same SensorData message in protobuf's canonical JSON mapping.
        bytes_all_json_compact: every reading in the shortest JSON with device, number, time and values.
    """

    readings: int
    anomalies: int
    recall: float
    precision: float
    asked_share: float
    uplink_share: float
    bytes_sent: int
    bytes_all_json: int
    bytes_all_json_compact: int


def uplink(entries: Sequence[Entry], stored: AbstractSet[Row], seen: Seen) -> Uplink:
    everything = reads(entries)
    anomalies = {Row(entry.device, entry.seq) for entry in everything if entry.label == 1}
    there = {Row(entry.device, entry.seq) for entry in everything} & stored
    asked = sum(entry.reason.startswith(_ASKED) for entry in everything)
    return Uplink(
        readings=len(everything),
        anomalies=len(anomalies),
        recall=_share(len(anomalies & there), len(anomalies)),
        precision=_share(len(anomalies & there), len(there)),
        asked_share=_share(asked, len(everything)),
        uplink_share=_share(len(there), len(everything)),
        bytes_sent=seen.infer_bytes + round(seen.sample_bytes),
        bytes_all_json=sum(entry.bytes_json for entry in everything),
        bytes_all_json_compact=sum(entry.bytes_json_compact for entry in everything),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99; empty without values."""
    if not values:
        return {}
    points = np.percentile(np.asarray(values), [50, 90, 99])
    return {name: round(float(value), 3) for name, value in zip(("p50", "p90", "p99"), points, strict=True)}


def latencies_ms(entries: Iterable[Entry]) -> list[float]:
    """From a device's question to its reply."""
    return [entry.latency_ms for entry in entries if entry.event == "reply"]


def make_books(
    entries: Sequence[Entry],
    seen: Iterable[Seen],
    states: dict[str, NodeState],
    stored: Sequence[tuple[Row, str]],
    *,
    set_aside: int,
    expected: AbstractSet[tuple[str, str]],
) -> Books:
    """Lay the witnesses side by side. `states` are those of devices; `expected` names the rows of finite sources."""
    everything = reads(entries)
    witnesses = list(seen)
    finite = {device for device, _ in expected}
    produced = {Row(entry.device, entry.seq): entry.reference for entry in everything}
    # Endless sources expect what they yielded; only finite ones can fall short.
    rest = {(row.device, reference) for row, reference in produced.items() if row.device not in finite}
    return Books(
        produced=produced,
        wanted={Row(entry.device, entry.seq) for entry in everything if entry.reason.startswith(_ASKED)},
        counters={device: dict(state.counters) for device, state in states.items()},
        asked=set().union(*(witness.asked for witness in witnesses)),
        answered=set().union(*(witness.answered for witness in witnesses)),
        refused=set().union(*(witness.refused for witness in witnesses)),
        promised=set().union(*(witness.promised for witness in witnesses)),
        stored=stored,
        set_aside=set_aside,
        expected=expected | rest if expected else frozenset(),
    )


def _is_scored(entry: Entry) -> bool:
    return bool(entry.held_out) and entry.predicted is not None


def _accuracy(entries: Sequence[Entry], answered: dict[Row, Entry]) -> Accuracy:
    device = sum(entry.predicted == entry.label for entry in entries)
    final = (answered.get(Row(entry.device, entry.seq), entry) for entry in entries)
    cascade = sum(last.predicted == entry.label for entry, last in zip(entries, final, strict=True))
    return Accuracy(_share(device, len(entries)), _share(cascade, len(entries)), len(entries))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
