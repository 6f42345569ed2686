"""The report's pictures, as SVG to set into a page.

Each function draws from figures and returns text; nothing is kept between calls. Colours are CSS variables with the
light page's value to fall back on, so that one drawing serves light and dark pages and stands alone as well.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fleet_console.demo.measure import AccuracyPoint, Mark, Uplink
from shoal.delivery.ledger import Account

# Name of the CSS variable: colour on a light page, colour on a dark one. The hues are those of Okabe and Ito, which
# people with any colour vision tell apart; each has at least 3:1 against its page.
PALETTE: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b2530", "#e8ecf1"),
    "muted": ("#5a6674", "#9caab9"),
    "rule": ("#e1e6ec", "#2b3542"),
    "device": ("#0072b2", "#56b4e9"),
    "gateway": ("#d55e00", "#f28c3c"),
    "cloud": ("#007f5f", "#2cc295"),
    "plain": ("#8b97a5", "#7c8a9a"),
}
_INK, _MUTED, _RULE, _DEVICE, _GATEWAY, _CLOUD, _PLAIN = (light for light, _ in PALETTE.values())

_FONT_PX = 13
_SMALL_PX = 12
_ROW_PX = 19
# matplotlib's SVG unit is a point of 1/72 inch; at this size it is one pixel of the page.
_PX_PER_INCH = 72
_BINS = 44
_MAX_CURVE_POINTS = 400
_MEGABYTE = 1_000_000
# Above it a fraction of a millisecond says nothing.
_COARSE_MS = 10
_POINTS = (("p50", 50), ("p90", 90), ("p99", 99))


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart goes.

    Attributes:
        name: unique in its page: every id of the chart begins with it.
    """

    name: str
    width_px: int
    height_px: int


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
    figure = _figure(frame)
    last = max([point.at_s for point in points] + [mark.at_s for mark in marks], default=1.0)
    rows = _label_rows([(mark.at_s, mark.text) for mark in marks], last, frame.width_px - 46 - 14)
    axes = _axes(figure, frame, left=46, right=14, top=14 + _ROW_PX * (max(rows, default=0) + 2), bottom=42)
    axes.set_xlim(0, last * 1.01)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("seconds since the first camera reading")
    for mark, row in zip(marks, rows, strict=True):
        _mark_line(axes, mark, row, last)
    at = [point.at_s for point in points]
    for name, values, colour, marker in (
        ("with the gateway's answers", [point.cascade for point in points], _GATEWAY, "s"),
        ("device alone", [point.device for point in points], _DEVICE, "o"),
    ):
        axes.plot(at, values, marker=marker, markersize=4, linewidth=2, color=colour, label=name, clip_on=False)
    _legend(figure, axes, frame, reverse=True)
    return _svg(figure, frame, "Accuracy of the cameras over time")


def bytes_chart(uplink: Uplink, frame: Frame) -> str:
    """Draw what the sensors sent against every reading as JSON."""
    rows = [
        ("Shoal: questions and samples", uplink.bytes_sent, _DEVICE),
        ("Every reading, compact JSON", uplink.bytes_all_json_compact, _PLAIN),
        ("Every reading, canonical JSON", uplink.bytes_all_json, _PLAIN),
    ]
    figure = _figure(frame)
    axes = _axes(figure, frame, left=6, right=28, top=8, bottom=42)
    unit, divisor = _byte_unit(max(size for _, size, _ in rows))
    for index, (name, size, colour) in enumerate(rows):
        axes.barh(index, size / divisor, height=0.4, color=colour)
        ratio = (
            "" if index == 0 or not uplink.bytes_sent else f" · {size / uplink.bytes_sent:.1f}\N{MULTIPLICATION SIGN}"
        )
        _row_label(axes, index, 0.3, name, f"{size / divisor:.3g} {unit}{ratio}")
    _bar_rows(axes, len(rows), f"payload of all sensors, {unit} (1 {unit} = {divisor:,} bytes)")
    return _svg(figure, frame, "Uplink bytes of the sensors against sending everything as JSON")


def sensor_scores_chart(classes: Sequence[Scores], frame: Frame) -> str:
    """Draw the scores of normal and anomalous readings over each other, on a log axis."""
    figure = _figure(frame)
    axes = _axes(figure, frame, left=46, right=14, top=20 + _ROW_PX * 2, bottom=42)
    edges = _log_edges([score for group in classes for score in group.scores])
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    for group, colour in zip(classes, (_DEVICE, _GATEWAY), strict=False):
        label = f"{group.name}, {len(group.scores):,} readings"
        _histogram(axes, group.scores, edges, colour, label)
    _percent_axis(axes)
    axes.set_xlabel("score on the device: mean squared error (log)")
    _plain_log_ticks(axes)
    _threshold_line(axes, next((group.threshold for group in classes), None))
    _legend(figure, axes, frame, columns=1)
    return _svg(figure, frame, "Scores of normal and anomalous readings")


def camera_scores_chart(phases: Sequence[Scores], frame: Frame) -> str:
    """Draw the uncertainty in each phase, one row under the other on one scale."""
    figure = _figure(frame)
    edges = np.linspace(0, 1, _BINS + 1)
    height = (frame.height_px - 42) / max(1, len(phases))
    for index, (phase, colour) in enumerate(zip(phases, (_DEVICE, _GATEWAY, _CLOUD), strict=False)):
        bottom = 42 + (len(phases) - 1 - index) * height
        axes = _axes(figure, frame, left=46, right=14, top=frame.height_px - bottom - height + 28, bottom=bottom)
        axes.set_xlim(0, 1)
        _histogram(axes, phase.scores, edges, colour, phase.name)
        _percent_axis(axes, ticks=2)
        _threshold_line(axes, phase.threshold)
        axes.text(0, 1.0, _asked_text(phase), transform=axes.transAxes, va="bottom", color=_INK, fontsize=_SMALL_PX)
        if index == len(phases) - 1:
            axes.set_xlabel("uncertainty of the device, 0 = certain")
        else:
            axes.tick_params(labelbottom=False)
    return _svg(figure, frame, "Uncertainty of the cameras before the drift, after it and after the update")


def latency_chart(fleets: Mapping[str, Sequence[float]], frame: Frame) -> str:
    """Draw the share of replies that had come after so many milliseconds, for each fleet."""
    measured = {name: np.asarray(values) for name, values in fleets.items() if len(values)}
    figure = _figure(frame)
    axes = _axes(figure, frame, left=46, right=14, top=14 + _ROW_PX * 2, bottom=42)
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
        colour = _DEVICE if name == next(iter(fleets)) else _GATEWAY
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
                color=_INK,
                fontsize=_SMALL_PX,
            )
    _plain_log_ticks(axes)
    _legend(figure, axes, frame, columns=1)
    return _svg(figure, frame, "Latency from question to reply")


def ledger_chart(account: Account, frame: Frame) -> str:
    """Draw where the readings went, as bars that all begin at the same reading."""
    unanswered = account.dropped + account.quarantined + account.in_flight
    rows: list[tuple[str, list[tuple[int, str]], str]] = [
        ("Produced by the sources", [(account.produced, _PLAIN)], ""),
        ("Asked of the gateway", [(account.accepted, _DEVICE), (account.kept, _RULE)], f"{account.kept:,} kept"),
        ("Answered", [(account.answered, _GATEWAY), (unanswered, _RULE)], f"{unanswered:,} unanswered"),
        ("Promised to the cloud", [(account.samples_promised, _CLOUD)], ""),
        ("Stored in the cloud", [(account.samples_stored, _CLOUD)], f"{account.holes:,} holes"),
    ]
    figure = _figure(frame)
    axes = _axes(figure, frame, left=6, right=28, top=8, bottom=42)
    for index, (name, parts, note) in enumerate(rows):
        start = 0
        for size, colour in parts:
            axes.barh(index, size, left=start, height=0.4, color=colour)
            start += size
        _row_label(axes, index, 0.3, name, f"{parts[0][0]:,}" + (f" · {note}" if note else ""))
    _bar_rows(axes, len(rows), "readings of both fleets")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return _svg(figure, frame, "From reading to stored sample")


# -- drawing ---------------------------------------------------------------------------------------------------------


def _figure(frame: Frame) -> Figure:
    return Figure(figsize=(frame.width_px / _PX_PER_INCH, frame.height_px / _PX_PER_INCH))


def _axes(figure: Figure, frame: Frame, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes with margins in pixels: a horizontal grid and no box."""
    width, height = frame.width_px, frame.height_px
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_RULE, linewidth=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(which="both", colors=_MUTED, labelsize=_SMALL_PX, length=0, pad=6)
    axes.tick_params(axis="x", which="major", length=4)
    axes.xaxis.label.set(color=_MUTED, fontsize=_SMALL_PX)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, width // 90), steps=[1, 2, 5, 10]))
    return axes


def _legend(figure: Figure, axes: Axes, frame: Frame, *, columns: int = 2, reverse: bool = False) -> None:
    """Above the axes, at the left edge of the picture."""
    figure.legend(
        *(items[:: -1 if reverse else 1] for items in axes.get_legend_handles_labels()),
        loc="upper left",
        bbox_to_anchor=(0, 1 - 2 / frame.height_px),
        ncols=columns,
        frameon=False,
        fontsize=_FONT_PX,
        labelcolor=_INK,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.35,
    )


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
    axes.axvline(threshold, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"asks above {threshold:.3g}",
        (threshold, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -2),
        textcoords="offset points",
        va="top",
        color=_INK,
        fontsize=_SMALL_PX,
    )


def _mark_line(axes: Axes, mark: Mark, row: int, last: float) -> None:
    """A vertical line that reaches up to its label."""
    release = mark.text.startswith("release")
    lift = 6 + row * _ROW_PX
    leans_left = mark.at_s > last / 2
    style = "-" if release else (0, (4, 3))
    reach = 1 + row * _ROW_PX / axes.get_window_extent().height * axes.figure.dpi / _PX_PER_INCH
    axes.axvline(mark.at_s, 0, reach, clip_on=False, color=_CLOUD if release else _INK, linewidth=1.2, linestyle=style)
    axes.annotate(
        mark.text,
        (mark.at_s, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2 if leans_left else -2, lift),
        textcoords="offset points",
        ha="right" if leans_left else "left",
        color=_INK,
        fontsize=_SMALL_PX,
    )


def _label_rows(labels: Sequence[tuple[float, str]], last: float, width_px: float) -> list[int]:
    """The lowest row above the axes in which each label touches no other; labels lean towards the middle."""
    taken: list[list[tuple[float, float]]] = []
    rows = []
    for at, text in labels:
        x, size = at / last * width_px if last else 0.0, len(text) * _SMALL_PX * 0.62 + 10
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
    axes.annotate(name, (0, index - above), va="bottom", color=_MUTED, fontsize=_SMALL_PX)
    axes.annotate(
        value,
        (1, index - above),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=_INK,
        fontsize=_FONT_PX,
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


# -- SVG -------------------------------------------------------------------------------------------------------------


def _svg(figure: Figure, frame: Frame, title: str) -> str:
    """Turn a figure into SVG for the inside of a page: no prologue, ids of its own, colours as CSS variables."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": frame.name}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = re.sub(r"<!--.*?-->\s*|<style.*?</style>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\1{frame.name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name}, {light})")
    body = text[text.index("<svg") :].partition(">")[2]
    caption = html.escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{caption}" viewBox="0 0 {frame.width_px} {frame.height_px}" '
        f'style="stroke-linejoin: round; font-family: system-ui, sans-serif"><title>{caption}</title>{body}'
    )
