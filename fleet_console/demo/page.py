"""The report as one HTML page that needs nothing else: no network, no script, no font of its own."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloud.pipelines.registry import ReleaseReport
from fleet_console.demo import charts
from fleet_console.demo.charts import Scores, milliseconds
from fleet_console.demo.measure import latencies_ms, reads
from fleet_console.demo.plan import CAMERAS, SENSORS
from fleet_console.demo.report import Evidence, timeline
from fleet_console.html_page import escape, figure, page, section, table
from simulator.journal import Entry
from simulator.script import Phase

_PPM = 1_000_000
_NOTHING = "n/a"
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
    ("samples_set_aside", "samples that the cloud refused and keeps for people"),
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
    path.write_text(page("Shoal demo report", body), encoding="utf-8")


# -- sections --------------------------------------------------------------------------------------------------------


def _verdict(report: dict[str, Any]) -> str:
    run, checks = report["run"], report["checks"]
    passed = sum(item["ok"] for item in checks)
    closed = report["closed"]
    title = "The loop closed" if closed else "The loop did not close"
    lead = (
        "The cameras drifted, the cloud learned from what they asked about, and a signed release went back to them."
        if closed
        else "The checks below say where the run fell short."
    )
    return f"""<header>
<p class="over">Shoal demo · seed {escape(run["seed"])} · {escape(run["finished_at"])}</p>
<h1><span class="badge {"good" if closed else "bad"}" aria-hidden="true">{"✓" if closed else "✗"}</span>{title}</h1>
<p class="lead">Two fleets of simulated devices, a gateway and the cloud's services ran as processes that share nothing
but MQTT topics. {lead} {passed} of {len(checks)} checks passed.</p>
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
            "fewer bytes than as canonical JSON",
            f"{_ratio(sensors['bytes_all_json_compact'], sensors['bytes_sent'])} fewer than as the shortest JSON",
        ),
        (
            f"{ledger['holes']:,}",
            f"holes in {ledger['produced']:,} readings",
            f"{ledger['samples_stored']:,} samples in the cloud, {ledger['duplicates_stored']:,} of them twice",
        ),
    )
    items = "".join(
        f'<div class="card"><p class="figure">{escape(number)}</p><p class="what">{escape(what)}</p>'
        f"<p>{escape(more)}</p></div>"
        for number, what, more in cards
    )
    return f'<section class="cards" aria-label="Key figures">{items}</section>'


def _checks(report: dict[str, Any]) -> str:
    rows = [
        [_state(item["ok"]), escape(_sentence(item["name"])), escape(item["measured"])] for item in report["checks"]
    ]
    return section("What was asked of this run", table(("Result", "Asked", "Measured"), rows, css="checks"))


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
        figure(
            "accuracy",
            "Camera accuracy through the drift",
            f"The device alone is right on {_percent(device['before_drift'])} of the images before the drift, "
            f"{_percent(device['after_drift'])} after it and {_percent(device['after_update'])} after the update. "
            f"Between the two the gateway's answers hold the application at {_percent(cascade['after_drift'])}. "
            "Each point is one short window of held-out images.",
            lambda frame: charts.accuracy_chart(points, marks, frame),
            (330, 300),
            full=True,
        ),
        figure(
            "bytes",
            "What goes up the link",
            "Payload of every question and every sample of the sensors, repetitions included, against each reading "
            "sent as JSON. Compact is the shortest JSON with device, number, time and values; canonical is protobuf's "
            "own JSON form of the same message.",
            lambda frame: charts.bytes_chart(evidence.sensors, frame),
            (300, 240),
        ),
        figure(
            "latency",
            "From question to reply",
            f"Over both fleets half of the replies come within {milliseconds(latency.get('p50', 0))} and 99% within "
            f"{milliseconds(latency.get('p99', 0))}.",
            lambda frame: charts.latency_chart(fleets, frame),
            (300, 300),
        ),
        figure(
            "sensor-scores",
            "Sensors: what stays on the device",
            f"Right of the line a device asks: {above[0]} of the normal readings and {above[1]} of the labelled "
            "anomalies. Shares are of each class, which differ much in size.",
            lambda frame: charts.sensor_scores_chart(classes, frame),
            (340, 300),
        ),
        figure(
            "camera-scores",
            "Cameras: drift as the device feels it",
            f"Above its release's threshold a device asks: {uncertain}. What it asks about is what the next release "
            "learns from.",
            lambda frame: charts.camera_scores_chart(phases, frame),
            (340, 340),
        ),
        figure(
            "ledger",
            "Where every reading went",
            "Bars share one scale and begin at the same reading. A promise of the gateway that the cloud could not "
            "keep would show as a difference between the last two, and as a hole.",
            lambda frame: charts.ledger_chart(evidence.account, frame),
            (310, 300),
            full=True,
        ),
    )
    return f'<section class="pictures" aria-label="Pictures">{"".join(figures)}</section>'


def _models(evidence: Evidence) -> str:
    head = ("Release", "Tier", "Runtime", "Metric", "float / int8", "Parent", "Size, kB", "Call, µs", "Ships")
    rows = []
    for build in evidence.builds:
        for tier, found in build.tiers.items():
            parent = found.get("metric_parent")
            rows.append(
                [
                    escape(f"{build.model} {build.release}"),
                    escape(tier),
                    escape(evidence.runtimes.get(tier, "")),
                    escape(_metric_name(build, tier)),
                    _pair(build, tier, "metric", lambda value: f"{value:.3f}"),
                    _NOTHING if parent is None else f"{float(parent):.3f}",
                    _pair(build, tier, "bytes", lambda value: f"{value / 1000:.1f}"),
                    _pair(build, tier, "latency", lambda value: f"{value:.1f}"),
                    _choice(found["ships"], found["reason"]),
                ]
            )
    text = (
        "Both precisions of each release, float / int8, measured in the runtime that ships on rows that the release "
        "was not trained on. What ships is in bold. Parent is the release before it, on the same rows."
    )
    return section("Models", f"<p>{text}</p>{table(head, rows, css='models')}")


def _ledger(ledger: Mapping[str, Any]) -> str:
    rows = [[escape(name.replace("_", " ")), f"{ledger[name]:,}", escape(meaning)] for name, meaning in _LEDGER]
    equations = _equation(ledger, "produced", ("kept", "lost_before_accept", "accepted")) + _equation(
        ledger, "accepted", ("answered", "dropped", "quarantined", "in_flight")
    )
    named = "".join(f"<li>{escape(hole)}</li>" for hole in ledger.get("named_holes", ()))
    holes = f'<p>The first holes:</p><ul class="holes">{named}</ul>' if named else ""
    text = (
        "Three witnesses are laid side by side: the sources' own rows, the messages seen on the wire with the "
        "devices' counters, and the cloud's store."
    )
    listed = table(("", "Rows", "What they are"), rows, css="ledger")
    return section("Ledger", f"<p>{text}</p>{equations}{holes}{listed}")


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
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return section("This run", f'<dl class="facts">{items}</dl>')


def _notes(report: dict[str, Any]) -> str:
    held_out = sum(report["cameras"]["held_out_readings"].values())
    notes = (
        f"Labels come from {report['cameras']['labels_from']}, with a delay.",
        f"Accuracy is measured on {held_out:,} readings of held-out images. No release was trained on these images.",
        "The devices are simulated; readings, models, runtimes, broker and messages are real.",
        "The drift is a real transformation of the images: rotation, blur, exposure and noise.",
        "JSON sizes are counted, not sent: each reading is also written in both JSON forms and measured.",
        "Bytes are of payloads; topics, properties and protocol headers count on neither side.",
        "Everything ran on one machine over the loopback interface: latencies have no radio or network in them.",
    )
    return section("Read with care", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")


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


def _choice(ships: object, reason: object) -> str:
    return f'<strong>{escape(ships)}</strong><br><span class="quiet">{escape(reason)}</span>'


def _metric_name(build: ReleaseReport, tier: str) -> str:
    """The release's name for what it measured: that figure of the tier which equals the shipped one's."""
    shipped = round(float(build.tiers[tier][f"metric_{build.tiers[tier]['ships']}"] or 0) * _PPM)
    names = [name for name, value in build.metrics_ppm.items() if name.startswith(f"{tier}_") and value == shipped]
    return names[0].removeprefix(f"{tier}_").replace("_", " ") if names else ""


# -- HTML ------------------------------------------------------------------------------------------------------------


def _equation(ledger: Mapping[str, Any], whole: str, parts: Sequence[str]) -> str:
    holds = ledger[whole] == sum(ledger[part] for part in parts)
    names = " + ".join(part.replace("_", " ") for part in parts)
    numbers = " + ".join(f"{ledger[part]:,}" for part in parts)
    return (
        f'<p class="equation">{_state(holds)}<span>{whole} = {names}</span>'
        f"<span>{ledger[whole]:,} = {numbers}</span></p>"
    )


def _state(ok: bool) -> str:  # noqa: FBT001  the state is the argument
    return '<span class="state good">✓ ok</span>' if ok else '<span class="state bad">✗ failed</span>'


def _pair(build: ReleaseReport, tier: str, name: str, form: Callable[[float], str]) -> str:
    """Float and int8, the one that ships in bold."""
    found = build.tiers[tier]
    unit = "_us" if name == "latency" else ""
    cells = []
    for precision in ("float", "int8"):
        text = form(float(found[f"{name}_{precision}{unit}"] or 0))
        cells.append(f"<strong>{text}</strong>" if found["ships"] == precision else text)
    return " / ".join(cells)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _ratio(large: float, small: float) -> str:
    return f"{large / small:.1f}\N{MULTIPLICATION SIGN}" if small else _NOTHING
