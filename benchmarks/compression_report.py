"""The table and the picture of docs/compression.md, from the figures of `compression.py`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

_NETWORKS = {"autoencoder": "autoencoder", "cnn": "CNN", "resnet8": "ResNet-8", "resnet18": "ResNet-18"}
_RUNTIMES = {"onnx": "ONNX Runtime", "litert": "LiteRT", "tflite_runtime": "tflite-runtime"}
_HEAD = ("network", "runtime", "variant", "bytes", "zstd", "smaller", "faster", "metric", "drop, points")
_BARS = ("pruned", "int8", "pruned_int8")
_LABELS = {"pruned": "pruned", "int8": "int8", "pruned_int8": "pruned + int8"}


def table(result: dict[str, Any]) -> str:
    """All variants in all runtimes, as Markdown."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for network, title in _NETWORKS.items():
        for runtime, runs_in in _RUNTIMES.items():
            for variant, figures in result.get(network, {}).get(runtime, {}).get("variants", {}).items():
                lines.append("| " + " | ".join((title, runs_in, variant.replace("_", " + "), *_cells(figures))) + " |")
    return "\n".join(lines)


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    low, high = figures["speed_ratio_ci"]
    least, most = (100 * end for end in figures["metric_drop_ci"])
    packed = figures["zstd_bytes"]
    return (
        f"{figures['bytes']:,}",
        "not measured" if packed is None else f"{packed:,}",
        f"{figures['size_ratio']:.2f}x",
        f"{figures['speed_ratio']:.2f}x ({low:.2f} to {high:.2f})",
        f"{figures['metric']:.4f}",
        f"{100 * figures['metric_drop']:.2f} ({least:.2f} to {most:.2f})",
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Size and speed against float, a group of bars for each network and runtime."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "shoal",
        "font.size": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 5.2), layout=ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96)))  # above its note
        sizes, speeds = figure.subplots(2, 1, sharex=True)
        for axes, name, title in ((sizes, "size_ratio", "times smaller"), (speeds, "speed_ratio", "times faster")):
            _bars(axes, result, name)
            axes.axhline(1, color="0.3", linewidth=1)
            axes.set_ylabel(title)
            axes.grid(visible=False, axis="x")
        sizes.legend(loc="upper left", ncols=len(_BARS))
        note = f"{result['machine']['cores']} cores {result['machine']['kind']}, one thread, batch 1, {result['date']}"
        figure.text(0.995, 0.005, note, ha="right", fontsize=7, color="0.5")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _bars(axes: Any, result: dict[str, Any], name: str) -> None:
    groups = [
        (f"{title}\n{runs_in}", result[network][runtime]["variants"])
        for network, title in _NETWORKS.items()
        for runtime, runs_in in _RUNTIMES.items()
        if "variants" in result.get(network, {}).get(runtime, {})
    ]
    width = 0.8 / len(_BARS)
    for number, variant in enumerate(_BARS):
        places = [index + (number - 1) * width for index in range(len(groups))]
        values = [figures[variant][name] for _, figures in groups]
        ends = [figures[variant][f"{name}_ci"] for _, figures in groups]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        ]
        axes.bar(places, values, width, yerr=errors, color=f"C{number}", ecolor="0.2", label=_LABELS[variant])
    axes.set_xticks(range(len(groups)), [label for label, _ in groups], rotation=60, ha="right", fontsize=7)
