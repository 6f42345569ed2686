"""The report's pictures, as SVG to set into a page.

Each function draws from figures and returns text; nothing is kept between calls. Colours are CSS variables with the
light page's value to fall back on, so that one drawing serves light and dark pages and stands alone as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fleet_console.demo.measure import AccuracyPoint, Mark, Uplink
from fleet_console.drawing import (
    CLOUD,
    DEVICE,
    FONT_PX,
    GATEWAY,
    INK,
    MUTED,
    PLAIN,
    PX_PER_INCH,
    ROW_PX,
    RULE,
    SMALL_PX,
    Frame,
    add_legend,
    new_axes,
    new_figure,
    to_svg,
)
from shoal.delivery.ledger import Account

_BINS = 44
_MAX_CURVE_POINTS = 400
_MEGABYTE = 1_000_000
# Above it a fraction of a millisecond says nothing.
_COARSE_MS = 10
_POINTS = (("p50", 50), ("p90", 90), ("p99", 99))


@dataclass(frozen=True, slots=True)
class Scores:
    """One class of readings and the scores that devices gave them.

    Attributes:
        threshold: above it a device asks; None where it is not known.
    """

    name: str
    scores: Sequence[float]
    threshold: float | None


def accuracy_chart(points: Sequence[AccuracyPoint], marks: Sequence[Mark], frame: Frame) -> str:
    """Draw the device's and the cascade's accuracy over time; drift and releases are labelled lines."""
    figure = new_figure(frame)
    last = max([point.at_s for point in points] + [mark.at_s for mark in marks], default=1.0)
    rows = _label_rows([(mark.at_s, mark.text) for mark in marks], last, frame.width_px - 46 - 14)
    axes = new_axes(figure, frame, left=46, right=14, top=14 + ROW_PX * (max(rows, default=0) + 2), bottom=42)
    axes.set_xlim(0, last * 1.01)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("seconds since the first camera reading")
    for mark, row in zip(marks, rows, strict=True):
        _mark_line(axes, mark, row, last)
    at = [point.at_s for point in points]
    for name, values, colour, marker in (
        ("with the gateway's answers", [point.cascade for point in points], GATEWAY, "s"),
        ("device alone", [point.device for point in points], DEVICE, "o"),
    ):
        axes.plot(at, values, marker=marker, markersize=4, linewidth=2, color=colour, label=name, clip_on=False)
    add_legend(figure, axes, frame, reverse=True)
    return to_svg(figure, frame, "Accuracy of the cameras over time")


def bytes_chart(uplink: Uplink, frame: Frame) -> str:
    """Draw what the sensors sent against every reading as JSON."""
    rows = [
        ("Shoal: questions and samples", uplink.bytes_sent, DEVICE),
        ("Every reading, compact JSON", uplink.bytes_all_json_compact, PLAIN),
        ("Every reading, canonical JSON", uplink.bytes_all_json, PLAIN),
    ]
    figure = new_figure(frame)
    axes = new_axes(figure, frame, left=6, right=28, top=8, bottom=42)
    unit, divisor = _byte_unit(max(size for _, size, _ in rows))
    for index, (name, size, colour) in enumerate(rows):
        axes.barh(index, size / divisor, height=0.4, color=colour)
        ratio = (
            "" if index == 0 or not uplink.bytes_sent else f" · {size / uplink.bytes_sent:.1f}\N{MULTIPLICATION SIGN}"
        )
        _row_label(axes, index, 0.3, name, f"{size / divisor:.3g} {unit}{ratio}")
    _bar_rows(axes, len(rows), f"payload of all sensors, {unit} (1 {unit} = {divisor:,} bytes)")
    return to_svg(figure, frame, "Uplink bytes of the sensors against sending everything as JSON")


def sensor_scores_chart(classes: Sequence[Scores], frame: Frame) -> str:
    """Draw the scores of normal and anomalous readings over each other, on a log axis."""
    figure = new_figure(frame)
    axes = new_axes(figure, frame, left=46, right=14, top=20 + ROW_PX * 2, bottom=42)
    edges = _log_edges([score for group in classes for score in group.scores])
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    for group, colour in zip(classes, (DEVICE, GATEWAY), strict=False):
        label = f"{group.name}, {len(group.scores):,} readings"
        _histogram(axes, group.scores, edges, colour, label)
    _percent_axis(axes)
    axes.set_xlabel("score on the device: mean squared error (log)")
    _plain_log_ticks(axes)
    _threshold_line(axes, next((group.threshold for group in classes), None))
    add_legend(figure, axes, frame, columns=1)
    return to_svg(figure, frame, "Scores of normal and anomalous readings")


def camera_scores_chart(phases: Sequence[Scores], frame: Frame) -> str:
    """Draw the uncertainty in each phase, one row under the other on one scale."""
    figure = new_figure(frame)
    edges = np.linspace(0, 1, _BINS + 1)
    height = (frame.height_px - 42) / max(1, len(phases))
    for index, (phase, colour) in enumerate(zip(phases, (DEVICE, GATEWAY, CLOUD), strict=False)):
        bottom = 42 + (len(phases) - 1 - index) * height
        axes = new_axes(figure, frame, left=46, right=14, top=frame.height_px - bottom - height + 28, bottom=bottom)
        axes.set_xlim(0, 1)
        _histogram(axes, phase.scores, edges, colour, phase.name)
        _percent_axis(axes, ticks=2)
        _threshold_line(axes, phase.threshold)
        axes.text(0, 1.0, _asked_text(phase), transform=axes.transAxes, va="bottom", color=INK, fontsize=SMALL_PX)
        if index == len(phases) - 1:
            axes.set_xlabel("uncertainty of the device, 0 = certain")
        else:
            axes.tick_params(labelbottom=False)
    return to_svg(figure, frame, "Uncertainty of the cameras before the drift, after it and after the update")


def latency_chart(fleets: Mapping[str, Sequence[float]], frame: Frame) -> str:
    """Draw the share of replies that had come after so many milliseconds, for each fleet."""
    measured = {name: np.asarray(values) for name, values in fleets.items() if len(values)}
    figure = new_figure(frame)
    axes = new_axes(figure, frame, left=46, right=14, top=14 + ROW_PX * 2, bottom=42)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("from a device's question to its reply, ms (log)")
    if measured:
        everything = np.concatenate(list(measured.values())).clip(min=1e-3)
        axes.set_xlim(everything.min() / 3, everything.max() * 2.5)
    by_speed = sorted(measured, key=lambda name: float(np.median(measured[name])))
    for name, values in measured.items():
        colour = DEVICE if name == next(iter(fleets)) else GATEWAY
        shares = np.linspace(0, 1, min(len(values), _MAX_CURVE_POINTS))
        axes.plot(
            np.quantile(values, shares), shares, color=colour, linewidth=2, label=f"{name}, {len(values):,} replies"
        )
        left = len(by_speed) > 1 and name == by_speed[0]
        for label, percent in _POINTS:
            at = float(np.percentile(values, percent))
            axes.plot([at], [percent / 100], marker="o", markersize=6, color=colour)
            axes.annotate(
                f"{label} {milliseconds(at)}",
                (at, percent / 100),
                xytext=(-8, 4) if left else (8, -4),
                textcoords="offset points",
                ha="right" if left else "left",
                va="bottom" if left else "top",
                color=INK,
                fontsize=SMALL_PX,
            )
    _plain_log_ticks(axes)
    add_legend(figure, axes, frame, columns=1)
    return to_svg(figure, frame, "Latency from question to reply")


def ledger_chart(account: Account, frame: Frame) -> str:
    """Draw where the readings went, as bars that all begin at the same reading."""
    unanswered = account.dropped + account.quarantined + account.in_flight
    rows: list[tuple[str, list[tuple[int, str]], str]] = [
        ("Produced by the sources", [(account.produced, PLAIN)], ""),
        ("Asked of the gateway", [(account.accepted, DEVICE), (account.kept, RULE)], f"{account.kept:,} kept"),
        ("Answered", [(account.answered, GATEWAY), (unanswered, RULE)], f"{unanswered:,} unanswered"),
        ("Promised to the cloud", [(account.samples_promised, CLOUD)], ""),
        ("Stored in the cloud", [(account.samples_stored, CLOUD)], f"{account.holes:,} holes"),
    ]
    figure = new_figure(frame)
    axes = new_axes(figure, frame, left=6, right=28, top=8, bottom=42)
    for index, (name, parts, note) in enumerate(rows):
        start = 0
        for size, colour in parts:
            axes.barh(index, size, left=start, height=0.4, color=colour)
            start += size
        _row_label(axes, index, 0.3, name, f"{parts[0][0]:,}" + (f" · {note}" if note else ""))
    _bar_rows(axes, len(rows), "readings of both fleets")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return to_svg(figure, frame, "From reading to stored sample")


# -- drawing ---------------------------------------------------------------------------------------------------------


def _histogram(axes: Axes, scores: Sequence[float], edges: NDArray[np.float64], colour: str, label: str) -> None:
    """Shares of the class in each bin; what lies outside is counted into the outermost."""
    counts, _ = np.histogram(np.clip(np.asarray(scores, dtype=np.float64), edges[0], edges[-1]), edges)
    shares = counts / max(1, len(scores))
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.45, linewidth=0, label=label)
    axes.stairs(shares, edges, color=colour, linewidth=1.5)


def _threshold_line(axes: Axes, threshold: float | None) -> None:
    """A dashed line, labelled to its right: scores crowd to its left."""
    if threshold is None:
        return
    axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"asks above {threshold:.3g}",
        (threshold, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -2),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=SMALL_PX,
    )


def _mark_line(axes: Axes, mark: Mark, row: int, last: float) -> None:
    """A vertical line that reaches up to its label."""
    release = mark.text.startswith("release")
    lift = 6 + row * ROW_PX
    leans_left = mark.at_s > last / 2
    style = "-" if release else (0, (4, 3))
    reach = 1 + row * ROW_PX / axes.get_window_extent().height * axes.figure.dpi / PX_PER_INCH
    axes.axvline(mark.at_s, 0, reach, clip_on=False, color=CLOUD if release else INK, linewidth=1.2, linestyle=style)
    axes.annotate(
        mark.text,
        (mark.at_s, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2 if leans_left else -2, lift),
        textcoords="offset points",
        ha="right" if leans_left else "left",
        color=INK,
        fontsize=SMALL_PX,
    )


def _label_rows(labels: Sequence[tuple[float, str]], last: float, width_px: float) -> list[int]:
    """The lowest row above the axes in which each label touches no other; labels lean towards the middle."""
    taken: list[list[tuple[float, float]]] = []
    rows = []
    for at, text in labels:
        x, size = at / last * width_px if last else 0.0, len(text) * SMALL_PX * 0.62 + 10
        start, end = (x - size, x) if at > last / 2 else (x, x + size)
        row = next(
            (i for i, row in enumerate(taken) if all(end <= left or start >= right for left, right in row)), len(taken)
        )
        if row == len(taken):
            taken.append([])
        taken[row].append((start, end))
        rows.append(row)
    return rows


def _row_label(axes: Axes, index: int, above: float, name: str, value: str) -> None:
    """The name of a bar and what it measures, over the bar."""
    axes.annotate(name, (0, index - above), va="bottom", color=MUTED, fontsize=SMALL_PX)
    axes.annotate(
        value,
        (1, index - above),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=INK,
        fontsize=FONT_PX,
    )


def _bar_rows(axes: Axes, rows: int, label: str) -> None:
    axes.grid(visible=False, axis="y")
    axes.set_yticks([])
    axes.set_ylim(rows - 0.6, -0.9)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def _percent_axis(axes: Axes, ticks: int = 4) -> None:
    # The room at the top is the threshold label's.
    axes.set_ylim(0, axes.dataLim.y1 * 1.3 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _plain_log_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _asked_text(phase: Scores) -> str:
    if phase.threshold is None or not phase.scores:
        return f"{phase.name}, {len(phase.scores):,} readings"
    above = sum(score > phase.threshold for score in phase.scores) / len(phase.scores)
    return f"{phase.name}: {above:.0%} of {len(phase.scores):,} uncertain"


def _log_edges(scores: Sequence[float]) -> NDArray[np.float64]:
    positive = [score for score in scores if score > 0] or [0.1, 1.0]
    low, high = min(positive), max(positive)
    return np.geomspace(low, high if high > low else low * 10, _BINS + 1)


def _byte_unit(largest: int) -> tuple[str, int]:
    return ("MB", _MEGABYTE) if largest >= _MEGABYTE else ("kB", 1_000)


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if round(value) >= _COARSE_MS else f"{value:.1f} ms"
