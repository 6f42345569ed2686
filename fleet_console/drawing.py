"""What all pictures share: colours, axes and SVG to set into a page.

Colours are CSS variables with the light page's value to fall back on, so that one drawing serves light and dark pages
and stands alone as well.
"""

import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
INK, MUTED, RULE, DEVICE, GATEWAY, CLOUD, PLAIN = (light for light, _ in PALETTE.values())


FONT_PX = 13
SMALL_PX = 12
ROW_PX = 19
# matplotlib's SVG unit is a point of 1/72 inch; at this size it is one pixel of the page.
PX_PER_INCH = 72


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart goes.

    Attributes:
        name: unique in its page: every id of the chart begins with it.
    """

    name: str
    width_px: int
    height_px: int


def new_figure(frame: Frame) -> Figure:
    return Figure(figsize=(frame.width_px / PX_PER_INCH, frame.height_px / PX_PER_INCH))


def new_axes(figure: Figure, frame: Frame, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes with margins in pixels: a horizontal grid and no box."""
    width, height = frame.width_px, frame.height_px
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=RULE, linewidth=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=SMALL_PX, length=0, pad=6)
    axes.tick_params(axis="x", which="major", length=4)
    axes.xaxis.label.set(color=MUTED, fontsize=SMALL_PX)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, width // 90), steps=[1, 2, 5, 10]))
    return axes


def add_legend(figure: Figure, axes: Axes, frame: Frame, *, columns: int = 2, reverse: bool = False) -> None:
    """Above the axes, at the left edge of the picture."""
    figure.legend(
        *(items[:: -1 if reverse else 1] for items in axes.get_legend_handles_labels()),
        loc="upper left",
        bbox_to_anchor=(0, 1 - 2 / frame.height_px),
        ncols=columns,
        frameon=False,
        fontsize=FONT_PX,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.35,
    )


def to_svg(figure: Figure, frame: Frame, title: str) -> str:
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
