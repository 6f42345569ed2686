"""What a person sees while the demo runs: a picture on a terminal, one plain line at a time anywhere else."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fleet_console.demo.measure import Accuracy
from simulator.script import Phase

# How often a log that nobody watches gets a line.
_PLAIN_INTERVAL_S = 5.0
_WIDE_BAR = 20
_NARROW_BAR = 12
_WIDE_COLUMNS = 100
_NOTHING = "not yet"
_PHASES = [phase.value for phase in Phase]

_Facts = Sequence[tuple[str, str | Text]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a run.

    Attributes:
        messages: seen so far, by kind.
        uplink_share, asked_share: of the sensors' readings, stored in the cloud and asked about; None before the first.
        accuracy: on held-out images, by release and phase.
        nodes_by_release: for each model, how many nodes run which release.
        labels: images labelled so far.
        builds: the releases built so far.
        restarts: how often each process was started again.
        notes: what happened lately, oldest first.
    """

    elapsed_s: float
    stage: str
    devices_online: int
    devices_total: int
    messages: Mapping[str, int]
    messages_per_s: float
    uplink_share: float | None
    asked_share: float | None
    accuracy: Mapping[tuple[int, str], Accuracy]
    nodes_by_release: Mapping[str, Mapping[int, int]]
    labels: int
    builds: Sequence[str]
    restarts: Mapping[str, int]
    notes: Sequence[str]


class LiveView:
    """Shows snapshots. Never reads a clock and starts no thread: it draws when it is told to.

    Use it with `with`: leaving gives the terminal back however the run ended, the last picture stays.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._stage = ""
        self._next_line_s = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal and not os.environ.get("CI"):
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, snapshot: Snapshot) -> None:
        if self._live is not None:
            self._live.update(picture(snapshot, self._console.width), refresh=True)
            return
        if snapshot.stage != self._stage or snapshot.elapsed_s >= self._next_line_s:
            self._stage = snapshot.stage
            self._next_line_s = snapshot.elapsed_s + _PLAIN_INTERVAL_S
            self._console.print(status_line(snapshot), soft_wrap=True, highlight=False, markup=False)


def status_line(snapshot: Snapshot) -> str:
    """Everything that matters, in one line."""
    parts = [
        f"{snapshot.elapsed_s:6.1f} s",
        snapshot.stage,
        f"devices {snapshot.devices_online}/{snapshot.devices_total}",
        f"messages {sum(snapshot.messages.values()):,}",
    ]
    if snapshot.uplink_share is not None:
        parts.append(f"uplink {snapshot.uplink_share:.1%}")
    if snapshot.accuracy:
        release, phase, right = _by_story(snapshot)[-1]
        parts.append(f"release {release} {_words(phase)} {right.device:.1%}")
    parts += [f"{name} restarted {times}" for name, times in snapshot.restarts.items()]
    return "  ".join(parts)


def picture(snapshot: Snapshot, width: int) -> RenderableType:
    """The whole view for a terminal of `width` columns."""
    fleet, messages, models = (
        _panel(title, _facts(rows))
        for title, rows in (
            ("Fleet", _fleet(snapshot)),
            ("Messages", _messages(snapshot)),
            ("Models", _models(snapshot)),
        )
    )
    accuracy = _panel("Camera accuracy, held-out images", _accuracy(snapshot, wide=width >= _WIDE_COLUMNS))
    events = _panel("Events", _events(snapshot))
    header = Table.grid(expand=True)
    header.add_column(ratio=1)
    header.add_column(justify="right")
    header.add_row(
        Text.assemble(("Shoal demo  ", "bold"), (snapshot.stage, "bold cyan")),
        Text(f"{int(snapshot.elapsed_s) // 60}:{int(snapshot.elapsed_s) % 60:02d}", "bold"),
    )
    if width < _WIDE_COLUMNS:
        return Group(header, _side_by_side(fleet, messages), models, accuracy, events)
    return Group(header, _side_by_side(fleet, messages, models), accuracy, events)


def print_summary(console: Console, report: Mapping[str, Any]) -> None:
    """Say how it ended: the checks, and the figures that people ask for."""
    checks = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    checks.add_column("Result")
    checks.add_column("Asked")
    checks.add_column("Measured")
    for item in report["checks"]:
        mark = Text("ok", "green") if item["ok"] else Text("FAILED", "bold red")
        checks.add_row(mark, Text(item["name"]), Text(item["measured"]))
    sensors, right, latency = report["sensors"], report["cameras"]["accuracy"], report["latency_ms"]
    uplink = (
        f"{sensors['bytes_sent']:,} bytes; compact JSON {sensors['bytes_all_json_compact']:,}, "
        f"canonical JSON {sensors['bytes_all_json']:,}"
    )
    figures = Table.grid(padding=(0, 2))
    for name, text in (
        ("Cameras", " > ".join(f"{share:.1%} {_words(phase)}" for phase, share in right.items())),
        (
            "Sensors",
            f"{sensors['recall']:.1%} of anomalies in the cloud with {sensors['uplink_share']:.1%} of the readings",
        ),
        ("Uplink", uplink),
        ("Latency", ", ".join(f"{name} {value:,.1f} ms" for name, value in latency.items()) or "no reply"),
        ("Models", ", ".join(_releases(report["models"])) or "none"),
    ):
        figures.add_row(Text(name, "dim"), Text(text))
    closed = report["closed"]
    verdict = Text("The loop closed.", "bold green") if closed else Text("The loop did not close.", "bold red")
    console.print()
    console.print(checks)
    console.print()
    console.print(figures)
    console.print()
    console.print(verdict, Text(f"{report['run']['seconds']:,} s, seed {report['run']['seed']}", "dim"))


# -- panels ----------------------------------------------------------------------------------------------------------


def _panel(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim", box=box.ROUNDED)


def _side_by_side(*panels: Panel) -> Table:
    grid = Table.grid(expand=True)
    for panel in panels:
        grid.add_column(ratio=1)
        panel.height = max(_height(other) for other in panels)
    grid.add_row(*panels)
    return grid


def _height(panel: Panel) -> int:
    return panel.renderable.row_count + 2 if isinstance(panel.renderable, Table) else 3


def _facts(rows: _Facts) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1, style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _fleet(snapshot: Snapshot) -> _Facts:
    online = f"{snapshot.devices_online} of {snapshot.devices_total}"
    everybody = snapshot.devices_online == snapshot.devices_total
    return [
        ("devices online", Text(online, "green" if everybody else "yellow")),
        ("sensor rows asked", _share(snapshot.asked_share)),
        ("sensor rows stored", _share(snapshot.uplink_share)),
        ("images labelled", f"{snapshot.labels:,}"),
        *((f"{name} restarted", Text(f"{times}", "yellow")) for name, times in snapshot.restarts.items()),
    ]


def _messages(snapshot: Snapshot) -> _Facts:
    counts = ((kind, f"{count:,}") for kind, count in sorted(snapshot.messages.items()))
    return [("per second", f"{snapshot.messages_per_s:,.0f}"), *counts]


def _models(snapshot: Snapshot) -> _Facts:
    running = (
        (f"{model} {release}", f"{nodes} node{'' if nodes == 1 else 's'}")
        for model, releases in sorted(snapshot.nodes_by_release.items())
        for release, nodes in sorted(releases.items())
    )
    return [("releases built", f"{len(snapshot.builds)}"), *running]


def _accuracy(snapshot: Snapshot, *, wide: bool) -> RenderableType:
    """A row for each release and phase, with a bar for the device alone and one for what the application has."""
    if not snapshot.accuracy:
        return Text(_NOTHING, "dim")
    cells = _WIDE_BAR if wide else _NARROW_BAR
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for title in ("release", "phase", "device alone", "", "with gateway", ""):
        table.add_column(title, no_wrap=True)
    table.add_column("readings", justify="right", no_wrap=True)
    for release, phase, right in _by_story(snapshot):
        bars = (*_bar(right.device, cells, "blue"), *_bar(right.cascade, cells, "yellow"))
        table.add_row(f"{release}", Text(_words(phase)), *bars, f"{right.readings:,}")
    return table


def _by_story(snapshot: Snapshot) -> list[tuple[int, str, Accuracy]]:
    """Releases and phases as they follow each other; the newest is the last."""
    rows = [(release, phase, right) for (release, phase), right in snapshot.accuracy.items()]
    return sorted(rows, key=lambda row: (row[0], _PHASES.index(row[1])))


def _bar(share: float, cells: int, style: str) -> tuple[Text, Text]:
    full = round(share * cells)
    bar = Text.assemble(("━" * full, style), ("━" * (cells - full), "bright_black"))
    return bar, Text(f"{share:6.1%}", style)


def _events(snapshot: Snapshot) -> Text:
    return Text("\n".join(snapshot.notes) or _NOTHING, "" if snapshot.notes else "dim")


def _share(share: float | None) -> str:
    return _NOTHING if share is None else f"{share:.1%}"


def _words(phase: str) -> str:
    return phase.replace("_", " ")


def _releases(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f"{row['model']} {row['release']}" for row in models))
