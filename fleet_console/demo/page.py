"""The report as one HTML page that needs nothing else: no network, no script, no font of its own."""

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloud.build import BuildReport
from fleet_console.demo import charts
from fleet_console.demo.charts import Frame, Scores, milliseconds
from fleet_console.demo.measure import latencies_ms, reads
from fleet_console.demo.plan import CAMERAS, SENSORS
from fleet_console.demo.report import Evidence, timeline
from simulator.journal import Entry
from simulator.script import Phase

# A chart is drawn once for wide pages and once for phones, whose text would be too small otherwise.
_FULL_PX = 1000
_HALF_PX = 476
_PHONE_PX = 336
_PPM = 1_000_000
_PHASES = {
    Phase.BEFORE_DRIFT: "Before the drift",
    Phase.AFTER_DRIFT: "After the drift",
    Phase.AFTER_UPDATE: "After the update",
}
_LEDGER = (
    ("produced", "readings that the sources gave to devices"),
    ("kept", "settled on the device by its own model"),
    ("lost_before_accept", "gone with a killed process before its outbox had them"),
    ("accepted", "questions that devices put into their outboxes"),
    ("answered", "questions that came back with an answer"),
    ("dropped", "questions that a full outbox let go, with a reason"),
    ("quarantined", "questions that no gateway can answer"),
    ("in_flight", "questions still open at the end"),
    ("samples_promised", "rows that a reply promised to the cloud"),
    ("samples_stored", "rows that the cloud's store holds"),
    ("duplicates_stored", "rows that it holds twice"),
    ("holes", "rows that the witnesses do not agree about"),
)


def write_html(path: Path, report: dict[str, Any], evidence: Evidence, thresholds: Mapping[str, float]) -> None:
    """Write the page. `thresholds` are what devices of the newest release compare with, by model."""
    body = "\n".join(
        (
            _verdict(report),
            _headline(report),
            _checks(report),
            _pictures(report, evidence, thresholds),
            _models(evidence),
            _ledger(report["ledger"]),
            _run(report),
            _notes(report),
        )
    )
    path.write_text(_PAGE.format(css=_css(), body=body), encoding="utf-8")


# -- sections --------------------------------------------------------------------------------------------------------


def _verdict(report: dict[str, Any]) -> str:
    run, checks = report["run"], report["checks"]
    passed = sum(item["ok"] for item in checks)
    closed = report["closed"]
    title = "The loop closed" if closed else "The loop did not close"
    lead = (
        "Two fleets of simulated devices, a gateway and the cloud's services ran as separate processes that share "
        "nothing but MQTT topics. The cameras drifted, the cloud learned from what they asked about, and a signed "
        "release went back to them."
        if closed
        else "Two fleets of simulated devices, a gateway and the cloud's services ran as separate processes that share "
        "nothing but MQTT topics. The checks below say where the run fell short."
    )
    return f"""<header>
<p class="over">Shoal demo · seed {_e(run["seed"])} · {_e(run["finished_at"])}</p>
<h1><span class="badge {"good" if closed else "bad"}" aria-hidden="true">{"✓" if closed else "✗"}</span>{title}</h1>
<p class="lead">{lead} {passed} of {len(checks)} checks passed.</p>
</header>"""


def _headline(report: dict[str, Any]) -> str:
    right, sensors, ledger = report["cameras"]["accuracy"], report["sensors"], report["ledger"]
    cards = (
        (
            _percent(right["after_update"]),
            "camera accuracy after the update",
            f"{_percent(right['before_drift'])} before the drift, {_percent(right['after_drift'])} after it",
        ),
        (
            _percent(sensors["recall"]),
            "of anomalies reached the cloud",
            f"with {_percent(sensors['uplink_share'])} of the sensors' readings",
        ),
        (
            _ratio(sensors["bytes_all_json"], sensors["bytes_sent"]),
            "fewer bytes than canonical JSON",
            f"{_ratio(sensors['bytes_all_json_compact'], sensors['bytes_sent'])} fewer than the shortest JSON",
        ),
        (
            f"{ledger['holes']:,}",
            f"holes in {ledger['produced']:,} readings",
            f"{ledger['samples_stored']:,} samples stored, {ledger['duplicates_stored']:,} of them twice",
        ),
    )
    items = "".join(
        f'<div class="card"><p class="figure">{_e(figure)}</p><p class="what">{_e(what)}</p><p>{_e(more)}</p></div>'
        for figure, what, more in cards
    )
    return f'<section class="cards" aria-label="Key figures">{items}</section>'


def _checks(report: dict[str, Any]) -> str:
    rows = [[_state(item["ok"]), _e(item["name"]), _e(item["measured"])] for item in report["checks"]]
    return _section("What was asked of this run", _table(("Result", "Asked", "Measured"), rows, css="checks"))


def _pictures(report: dict[str, Any], evidence: Evidence, thresholds: Mapping[str, float]) -> str:
    device, cascade = report["cameras"]["accuracy"], report["cameras"]["accuracy_cascade"]
    points, marks = timeline(evidence.camera_entries)
    classes = _sensor_classes(evidence, thresholds)
    phases = _camera_phases(evidence, thresholds)
    fleets = {"sensors": latencies_ms(evidence.sensor_entries), "cameras": latencies_ms(evidence.camera_entries)}
    above = [_percent(_share_above(group)) for group in classes]
    uncertain = ", ".join(f"{_percent(_share_above(phase))} {phase.name.lower()}" for phase in phases)
    latency = report["latency_ms"]
    figures = (
        _figure(
            "accuracy",
            "The cameras drift, and recover",
            f"The device alone is right on {_percent(device['before_drift'])} of the images before the drift, "
            f"{_percent(device['after_drift'])} after it and {_percent(device['after_update'])} after the update. While "
            f"the update is made, the gateway's answers hold the application at {_percent(cascade['after_drift'])}. "
            "Each point is one short window of held-out images.",
            lambda frame: charts.accuracy_chart(points, marks, frame),
            (330, 300),
            full=True,
        ),
        _figure(
            "bytes",
            "What goes up the link",
            "Payload of every question and every sample of the sensors, repetitions included, against each reading "
            "sent as JSON. Compact is the shortest JSON with device, number, time and values; canonical is protobuf's "
            "own JSON form of the same message.",
            lambda frame: charts.bytes_chart(evidence.sensors, frame),
            (300, 240),
        ),
        _figure(
            "latency",
            "From question to reply",
            f"Over both fleets half of the replies come within {_milliseconds(latency, 'p50')} and 99 % within "
            f"{_milliseconds(latency, 'p99')}. The time that a question waits on the device for company in one message "
            "is part of it.",
            lambda frame: charts.latency_chart(fleets, frame),
            (300, 300),
        ),
        _figure(
            "sensor-scores",
            "Sensors: most readings never leave",
            f"Right of the line a device asks: {above[0]} of the normal readings and {above[1]} of the labelled "
            "anomalies. Shares are of each class, which differ much in size.",
            lambda frame: charts.sensor_scores_chart(classes, frame),
            (340, 300),
        ),
        _figure(
            "camera-scores",
            "Cameras: drift shows as doubt",
            f"Above its release's threshold a device asks: {uncertain}. What it asks about is what the next release "
            "learns from.",
            lambda frame: charts.camera_scores_chart(phases, frame),
            (340, 340),
        ),
        _figure(
            "ledger",
            "Every reading is accounted for",
            "Bars share one scale and begin at the same reading. A promise of the gateway that the cloud could not "
            "keep would show as a difference between the last two, and as a hole.",
            lambda frame: charts.ledger_chart(evidence.account, frame),
            (310, 300),
            full=True,
        ),
    )
    return f'<section class="pictures" aria-label="Pictures">{"".join(figures)}</section>'


def _models(evidence: Evidence) -> str:
    head = ("Model", "Tier", "Runtime", "Metric", "float", "int8", "Parent", "Size, kB", "", "Call, µs", "", "Ships")
    rows = []
    for build in evidence.builds:
        for tier, found in build.tiers.items():
            ships = str(found["ships"])
            pairs = [
                _pair(found, name, ships, form)
                for name, form in (("metric", _three_digits), ("bytes", _kilobytes), ("latency", _microseconds))
            ]
            parent = found.get("metric_parent")
            rows.append(
                [
                    f"{_e(build.model)} {build.release}",
                    _e(tier),
                    _e(evidence.runtimes.get(tier, "")),
                    _e(_metric_name(build, tier)),
                    *pairs[0],
                    "–" if parent is None else _three_digits(float(parent)),
                    *pairs[1],
                    *pairs[2],
                    f'<strong>{_e(ships)}</strong><br><span class="quiet">{_e(found["reason"])}</span>',
                ]
            )
    text = (
        "Both precisions of each release, measured in the runtime that ships, on rows that the release was not trained "
        "on; what ships is in bold. Parent is the release before, on the same rows."
    )
    return _section("Models", f"<p>{text}</p>{_table(head, rows, css='models')}")


def _ledger(ledger: Mapping[str, Any]) -> str:
    rows = [[_e(name.replace("_", " ")), f"{ledger[name]:,}", _e(meaning)] for name, meaning in _LEDGER]
    equations = _equation(ledger, "produced", ("kept", "lost_before_accept", "accepted")) + _equation(
        ledger, "accepted", ("answered", "dropped", "quarantined", "in_flight")
    )
    named = "".join(f"<li>{_e(hole)}</li>" for hole in ledger.get("named_holes", ()))
    holes = f'<p>The first holes:</p><ul class="holes">{named}</ul>' if named else ""
    text = (
        "Three witnesses are laid side by side: the sources' own rows, the messages seen on the wire with the "
        "devices' counters, and the cloud's store."
    )
    table = _table(("", "Rows", "What they are"), rows, css="ledger")
    return _section("Ledger", f"<p>{text}</p>{equations}{holes}{table}")


def _run(report: dict[str, Any]) -> str:
    run, broker, cameras = report["run"], report["broker"], report["cameras"]
    restarts = ", ".join(f"{name} {times} times" for name, times in run["restarts"].items()) or "none"
    messages = ", ".join(f"{name} {count:,}" for name, count in sorted(report["messages"].items()))
    facts = {
        "Command": f"shoal demo {'--quick ' if run['quick'] else ''}--seed {run['seed']}",
        "Duration": f"{run['seconds']:,} s",
        "Broker": f"{broker['name']} {broker['version']}",
        "Shoal": run["shoal"],
        "Python": run["python"],
        "Machine": f"{run['machine']}, {run['cores']} cores",
        "Messages seen": messages or "none",
        "Readings": f"{report['sensors']['readings']:,} of sensors, {cameras['readings']:,} of cameras",
        "Labels": f"{cameras['labels']:,}",
        "Processes started again": restarts,
    }
    items = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(value)}</dd></div>" for name, value in facts.items())
    return _section("This run", f'<dl class="facts">{items}</dl>')


def _notes(report: dict[str, Any]) -> str:
    held_out = sum(report["cameras"]["held_out_readings"].values())
    notes = (
        f"Labels come from {report['cameras']['labels_from']}, with a delay.",
        f"Accuracy is measured on {held_out:,} readings of held-out images. No release was trained on these images.",
        "The devices are simulated; readings, models, runtimes, broker and messages are real. The drift is a real "
        "transformation of the images: rotation, blur, exposure and noise.",
        "JSON sizes are counted, not sent: for every reading of the sensors the same message is written in protobuf's "
        "canonical JSON form, and in the shortest JSON that carries device, number, time and values. Topic names and "
        "protocol headers are left out on both sides.",
        "Everything ran on one machine over the loopback interface: latencies have no radio or network in them.",
    )
    return _section("Read with care", f"<ul>{''.join(f'<li>{_e(note)}</li>' for note in notes)}</ul>")


# -- figures of the pictures -----------------------------------------------------------------------------------------


def _sensor_classes(evidence: Evidence, thresholds: Mapping[str, float]) -> list[Scores]:
    everything = reads(evidence.sensor_entries)
    threshold = thresholds.get(SENSORS)
    return [
        Scores(name, [entry.score for entry in everything if entry.label == label], threshold)
        for label, name in ((0, "normal"), (1, "labelled anomaly"))
    ]


def _camera_phases(evidence: Evidence, thresholds: Mapping[str, float]) -> list[Scores]:
    """Each phase with the threshold of the release that answered most of it."""
    of_release = {build.release: build.thresholds.get("device") for build in evidence.builds if build.model == CAMERAS}
    phases = []
    for phase, name in _PHASES.items():
        entries: list[Entry] = [entry for entry in reads(evidence.camera_entries) if entry.phase == phase.value]
        common = Counter(entry.release for entry in entries).most_common(1)
        threshold = of_release.get(common[0][0]) if common else None
        scores = [entry.score for entry in entries]
        phases.append(Scores(name, scores, thresholds.get(CAMERAS) if threshold is None else threshold))
    return phases


def _share_above(group: Scores) -> float:
    if group.threshold is None or not group.scores:
        return 0.0
    return sum(score > group.threshold for score in group.scores) / len(group.scores)


def _metric_name(build: BuildReport, tier: str) -> str:
    """The release's name for what it measured: that figure of the tier which equals the shipped one's."""
    shipped = round(float(build.tiers[tier][f"metric_{build.tiers[tier]['ships']}"] or 0) * _PPM)
    names = [name for name, value in build.metrics_ppm.items() if name.startswith(f"{tier}_") and value == shipped]
    return names[0].removeprefix(f"{tier}_").replace("_", " ") if names else ""
