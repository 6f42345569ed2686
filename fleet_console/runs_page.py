"""One run as a page: what it was made from, what it made, and the pictures that a person would ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cloud.pipelines.registry import MetricRow, ReleaseReport, Run, StepRow
from fleet_console.drawing import (
    DEVICE,
    GATEWAY,
    INK,
    MUTED,
    SMALL_PX,
    Frame,
    add_legend,
    new_axes,
    new_figure,
    to_svg,
)
from fleet_console.html_page import escape, figure, page, section, table

_SHORT = 12
_COLOURS: Mapping[str, str] = {"device": DEVICE, "gateway": GATEWAY}
_PRECISIONS = ("float", "int8", "mixed")
_NOTHING = "n/a"

Tiers = Mapping[str, Mapping[str, Any]]
Curve = Sequence[tuple[int, float]]


def write_page(
    path: Path, run: Run, steps: Sequence[StepRow], metrics: Sequence[MetricRow], releases: Sequence[ReleaseReport]
) -> None:
    """Write the page.

    Args:
        path: where.
        run: which.
        steps: of the run.
        metrics: over time, of the run and of the earlier ones that made what it found unchanged.
        releases: of the model, oldest first.
    """
    tiers: Tiers = next((step.figures["tiers"] for step in steps if "tiers" in step.figures), {})
    body = "\n".join(
        (
            _headline(run),
            _steps(steps),
            f'<section class="pictures">{_pictures(metrics, tiers, releases)}</section>',
            _decisions(tiers),
            _origin(run),
        )
    )
    path.write_text(page(f"Run {run.id[:_SHORT]} of {run.model}", body), encoding="utf-8")


def _headline(run: Run) -> str:
    said = f"release {run.release} of {run.model}" if run.release else f"{run.model}: {run.error or 'nothing deployed'}"
    return (
        f'<header><p class="over">run {escape(run.id)}</p><h1>{escape(run.status)}</h1>'
        f'<p class="lead">{escape(said)}</p></header>'
    )


def _steps(steps: Sequence[StepRow]) -> str:
    rows = [
        [*map(escape, (step.name, step.status, f"{step.seconds:.1f}", step.output_name)), _code(step.output_digest)]
        for step in steps
    ]
    return section("Steps", table(("Step", "Status", "Seconds", "Makes", "Digest"), rows, css="steps"))


def _pictures(metrics: Sequence[MetricRow], tiers: Tiers, releases: Sequence[ReleaseReport]) -> str:
    drawn = []
    for step in dict.fromkeys(metric.step for metric in metrics):
        losses = [metric for metric in metrics if (metric.step, metric.name) == (step, "loss")]
        curves = {
            series: [(metric.x, metric.value) for metric in losses if metric.series == series]
            for series in dict.fromkeys(metric.series for metric in losses)
        }
        text = "Mean loss of each epoch. A curve that still falls at its end was stopped early."
        drawn.append(figure(step, f"Loss in {step}", text, partial(loss_chart, curves), (260, 240)))
    if tiers:
        text = "Bytes of each artefact, and the time of one call in the runtime that it ships to; float is 100 %."
        drawn.append(figure("cost", "What int8 saves", text, partial(cost_chart, tiers), (260, 240)))
        text = "On rows that training never saw. The line is the release in the field, on the same rows."
        drawn.append(figure("metric", "What int8 costs", text, partial(metric_chart, tiers), (260, 240)))
    if len(releases) > 1:
        text = "Of the artefacts that shipped, each on the held-out rows of its own day."
        drawn.append(figure("history", "Metric of every release", text, partial(history_chart, releases), (260, 240)))
    return "".join(drawn)


def loss_chart(curves: Mapping[str, Curve], frame: Frame) -> str:
    """Draw a curve for each series, by epoch."""
    drawing = new_figure(frame)
    axes = new_axes(drawing, frame, left=52, right=12, top=34, bottom=42)
    for series, points in curves.items():
        epochs, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(epochs, losses, color=_COLOURS.get(series, INK), linewidth=1.8, label=series)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("epoch")
    add_legend(drawing, axes, frame)
    return to_svg(drawing, frame, "Loss by epoch")


@dataclass(frozen=True, slots=True)
class _Share:
    """How much of float's bytes or time one precision takes."""

    tier: str
    what: str
    precision: str
    share: float
    ships: bool


def cost_chart(tiers: Tiers, frame: Frame) -> str:
    """Draw bytes and latency of each precision as a share of float's."""
    """Draw bytes and latency of each precision as a share of float's."""
    rows = [
        _Share(tier, what, precision, report[made] / report[base], ships=report["ships"] == precision)
        for tier, report in tiers.items()
        for precision in _measured(report)
        if precision != "float"
        for what, made, base in (
            ("bytes", f"bytes_{precision}", "bytes_float"),
            ("time", f"latency_{precision}_us", "latency_float_us"),
        )
    ]
    drawing = new_figure(frame)
    axes = new_axes(drawing, frame, left=8, right=16, top=10, bottom=42)
    for index, row in enumerate(rows):
        axes.barh(index, row.share, height=0.42, color=_COLOURS.get(row.tier, INK), alpha=1 if row.ships else 0.45)
        label = f"{row.tier}, {row.what}, {row.precision}: {row.share:.0%}" + ("" if row.ships else " (does not ship)")
        axes.annotate(label, (0, index - 0.3), va="bottom", color=MUTED, fontsize=SMALL_PX)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.grid(visible=False, axis="y")
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.6, -0.9)
    axes.set_xlim(0, max([1.1, *(row.share * 1.05 for row in rows)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("of float")
    return to_svg(drawing, frame, "Bytes and latency of each precision")


def metric_chart(tiers: Tiers, frame: Frame) -> str:
    """Draw the metric of each precision, with the parent's as a line."""
    rows = [(tier, precision, report) for tier, report in tiers.items() for precision in _measured(report)]
    values = [report[f"metric_{precision}"] for _, precision, report in rows]
    values += [report["metric_parent"] for report in tiers.values() if report["metric_parent"] is not None]
    drawing = new_figure(frame)
    axes = new_axes(drawing, frame, left=52, right=12, top=12, bottom=42)
    for index, (tier, precision, report) in enumerate(rows):
        ships = report["ships"] == precision
        axes.bar(
            index, report[f"metric_{precision}"], width=0.6, color=_COLOURS.get(tier, INK), alpha=1 if ships else 0.45
        )
        parent = report["metric_parent"]
        if parent is not None:
            axes.plot((index - 0.36, index + 0.36), (parent, parent), color=INK, linewidth=1.6)
    low = min(values, default=0.0)
    axes.set_ylim(max(0.0, low - max(0.02, (1 - low) * 0.6)), 1.0)
    axes.set_xticks(range(len(rows)), [f"{tier}\n{precision}" for tier, precision, _ in rows])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return to_svg(drawing, frame, "Metric of each precision")


def history_chart(releases: Sequence[ReleaseReport], frame: Frame) -> str:
    """Draw what shipped, release after release."""
    drawing = new_figure(frame)
    axes = new_axes(drawing, frame, left=52, right=12, top=34, bottom=42)
    for tier, colour in _COLOURS.items():
        points = [(each.release, shipped_metric(each.tiers[tier])) for each in releases if tier in each.tiers]
        numbers, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(numbers, values, color=colour, marker="o", markersize=5, linewidth=1.8, label=tier)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("release")
    add_legend(drawing, axes, frame)
    return to_svg(drawing, frame, "Metric of every release")


def shipped_metric(report: Mapping[str, Any]) -> float:
    """Return the metric of the precision that shipped."""
    return float(report[f"metric_{report['ships']}"])


def _measured(report: Mapping[str, Any]) -> list[str]:
    return [precision for precision in _PRECISIONS if report.get(f"metric_{precision}") is not None]


def _decisions(tiers: Tiers) -> str:
    if not tiers:
        return ""
    rows = [
        [
            escape(tier),
            f"<strong>{escape(report['ships'])}</strong>",
            escape(report["reason"]),
            _NOTHING if report["metric_parent"] is None else f"{report['metric_parent']:.4f}",
        ]
        for tier, report in tiers.items()
    ]
    return section("What ships, and why", table(("Tier", "Ships", "Because", "Field's metric"), rows, css="decisions"))


def _origin(run: Run) -> str:
    versions: dict[str, str] = msgspec.json.decode(run.versions)
    rows = [
        ["reason", escape(run.reason)],
        ["pipeline", f"{escape(run.pipeline)} {_code(run.pipeline_digest)}"],
        ["samples", f"{_code(run.samples_digest)}, {run.labelled} labelled"],
        ["field", _code(run.field_digest)],
        ["seed, threads, machine", f"{run.seed}, {run.threads}, {escape(run.machine)}"],
        ["versions", escape(", ".join(f"{name} {version}" for name, version in versions.items()))],
    ]
    return section("Made from", table(("", ""), rows, css="origin"))


def _code(digest: str) -> str:
    return f"<code>{escape(digest[:_SHORT])}</code>" if digest else ""
