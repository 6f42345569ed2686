"""The curves of docs/gateway.md: measured over Mosquitto, kept as JSON, drawn as SVG.

    python -m benchmarks.gateway.gateway_curves             (about eight minutes; needs Mosquitto and gcc)
    python -m benchmarks.gateway.gateway_curves --draw      (only the pictures, from the JSON that is there)

Devices are played by mqtt_load, 64 of them, on the same machine as the broker and the gateway. All gateways of a picture
stand at once, each for a site of its own, and take turns for a second or so in every round; a point is the median of the
rounds. Only the cache's picture is measured in one process, see `measure_cache`. So points of one picture can be compared; points of two pictures, or of two machines, cannot.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks import cache
from benchmarks.gateway.bench_gateway import prepare
from benchmarks.gateway.contenders import OUTSTANDING
from benchmarks.gateway.models import MODELS
from benchmarks.gateway.payloads import DEVICES
from benchmarks.gateway.processes import measure, running
from edge_gateway.deploy import local_model
from fleet_console.broker import BrokerKind, RunningBroker, start_broker

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_RESULTS = _ROOT / "benchmarks" / "results" / "gateway_curves.json"
_PICTURES = _ROOT / "docs" / "img"
SIZES = (1, 2, 4, 8, 16, 32, 64)
DELAYS_MS = (0, 1, 5)
RATES = (250, 500, 1000, 2000, 4000, 6000)
REPEATS = (0, 25, 50, 75, 90)
_CACHE_QUESTIONS = 20_480
_WARM_UP_S = 0.5
_STEPS = ("batch", "delay", "cache", "workers")

Point = dict[str, Any]


class Stand:
    """One broker, the models, and gateways with whatever settings, each for a site of its own."""

    def __init__(self, folder: Path, logs: Path, broker: RunningBroker) -> None:
        self.folder = folder
        self.logs = logs
        self.broker = broker
        self._sites = 0

    @contextlib.contextmanager
    def gateway(self, model: str, batch: int, **options: object) -> Iterator[str]:
        """Serve a model; yields the site."""
        self._sites += 1
        site = f"curve-{self._sites}"
        settings = json.dumps({"site": site, "name": f"gw-{self._sites}", **options})
        command = [sys.executable, "-m", "benchmarks.gateway.serve_gateway", str(self.folder / f"{model}.onnx")]
        command += [self.broker.url, str(batch), settings]
        with running(command, self.logs / f"{site}.log", ready="ready"):
            yield site

    def ask(self, site: str, payloads: Path, seconds: float, rate: int = 0) -> Point:
        """`rate` 0 keeps 64 questions under way."""
        command = [str(self.folder / "native" / "mqtt_load"), "--port", str(self.broker.port), "--site", site]
        command += ["--payloads", str(payloads), "--devices", str(DEVICES), "--seconds", str(seconds), "--qos", "1"]
        command += ["--rate", str(rate)] if rate else ["--outstanding", str(OUTSTANDING)]
        return dict(measure(command, {}, seconds).figures)

    def payloads(self, model: str) -> Path:
        return self.folder / f"{model}.requests"


Ask = Callable[[], Point]


def in_turns(runs: dict[str, Ask], rounds: int) -> dict[str, Point]:
    """All runs once in each round, in an order that turns; medians."""
    found: defaultdict[str, list[Point]] = defaultdict(list)
    names = list(runs)
    for number in range(rounds):
        first = number * len(names) // rounds
        for name in names[first:] + names[:first]:
            found[name].append(runs[name]())
    figures = ("rps", "p50_us", "p99_us")
    return {
        name: {key: round(statistics.median(each[key] for each in points), 1) for key in figures}
        for name, points in found.items()
    }


def measure_batches(stand: Stand, model: str, sizes: tuple[int, ...], seconds: float, rounds: int, **options) -> Any:
    with contextlib.ExitStack() as stack:
        runs: dict[str, Ask] = {}
        for size in sizes:
            site = stack.enter_context(stand.gateway(model, size, **options))
            runs[str(size)] = lambda site=site: stand.ask(site, stand.payloads(model), seconds)
            stand.ask(site, stand.payloads(model), _WARM_UP_S)
        return in_turns(runs, rounds)


def measure_delays(stand: Stand, seconds: float, rounds: int) -> Any:
    with contextlib.ExitStack() as stack:
        runs: dict[str, Ask] = {}
        for delay_ms in DELAYS_MS:
            site = stack.enter_context(stand.gateway("mlp", 32, max_delay_ms=delay_ms))
            stand.ask(site, stand.payloads("mlp"), _WARM_UP_S)
            for rate in RATES:
                ask = lambda site=site, rate=rate: stand.ask(site, stand.payloads("mlp"), seconds, rate)  # noqa: E731
                runs[f"{delay_ms} {rate}"] = ask
        return in_turns(runs, rounds)


def measure_cache(folder: Path, model: str, rounds: int) -> Any:
    """In one process and in its processor time, as `make bench-cache`: over a broker the difference drowns in noise."""
    served = local_model(model, folder / f"{model}.onnx")
    dtype = np.dtype(np.float32)
    inputs = cache.distinct_inputs(served.values, dtype)
    found = {}
    for percent in REPEATS:
        trace = cache.repeating(len(inputs), percent / 100)[:_CACHE_QUESTIONS]
        measured = cache.measure(model, served, cache.packets(model, inputs, dtype, trace), rounds)
        found[str(percent)] = {key: measured[key] for key in ("rps_ratio", "model_share")}
    return found


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    folder = prepare(options.cache, list(MODELS))
    seconds, rounds = options.seconds, options.rounds
    result: dict[str, Any] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        with start_broker(logs / "broker", BrokerKind.MOSQUITTO) as broker:
            stand = Stand(folder, logs, broker)
            steps: dict[str, Callable[[], Any]] = {
                "batch": lambda: {
                    model: measure_batches(stand, model, SIZES, seconds, rounds) for model in ("mlp", "cnn")
                },
                "delay": lambda: measure_delays(stand, seconds, rounds),
                "cache": lambda: {"mlp": measure_cache(folder, "mlp", rounds)},
                "workers": lambda: {
                    # Few questions fit a run: without the cache none is known from the run before.
                    str(workers): measure_batches(
                        stand, "resnet18", SIZES[:4], 3 * seconds, rounds, workers=workers, cache_bytes=0
                    )
                    for workers in (1, 2)
                },
            }
            for name in options.only:
                result[name] = steps[name]()
                print(f"{name}: {json.dumps(result[name])}", flush=True)
    result["machine"] = f"{os.cpu_count()} cores {platform.machine()}, shared with other work"
    result["date"] = datetime.now(UTC).date().isoformat()
    return result


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_all(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Text as text: small files, in the reader's own font; and the same bytes for the same figures.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shoal", "font.size": 9, "axes.grid": True})
    for name, draw in (("batch", _batch), ("delay", _delay), ("cache", _cache), ("workers", _workers)):
        figure = Figure(figsize=(8, 3.2), layout=ConstrainedLayoutEngine(rect=(0, 0.06, 1, 0.94)))  # above its caption
        draw(figure, result[name])
        figure.text(0.995, 0.005, f"{result['machine']}, {result['date']}", ha="right", fontsize=7, color="0.5")
        figure.savefig(folder / f"gateway-{name}.svg", metadata={"Date": None})


def _batch(figure: Figure, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for number, (model, points) in enumerate(data.items()):
        sizes = [int(size) for size in points]
        left.plot(sizes, [point["rps"] for point in points.values()], "o-", color=f"C{number}", label=model)
        for key, line in (("p50_us", "o-"), ("p99_us", "o:")):
            values = [point[key] / 1000 for point in points.values()]
            right.plot(sizes, values, line, color=f"C{number}", label=f"{model} {key[:3]}")
    _label(left, "max_batch_size", "requests/s, 64 under way", SIZES)
    _label(right, "max_batch_size", "ms", SIZES)


def _delay(figure: Figure, data: dict[str, Any]) -> None:
    for axes, key in zip(figure.subplots(1, 2), ("p50_us", "p99_us"), strict=True):
        for delay_ms in DELAYS_MS:
            values = [data[f"{delay_ms} {rate}"][key] / 1000 for rate in RATES]
            axes.plot(RATES, values, "o-", label=f"max_delay_ms = {delay_ms}")
        axes.set_yscale("log")
        _label(axes, "requests/s offered to the MLP", f"{key[:3]}, ms", RATES)
        axes.tick_params(axis="x", labelrotation=45)


def _cache(figure: Figure, data: dict[str, Any]) -> None:
    axes = figure.subplots(1, 1)
    for model, points in data.items():
        axes.plot(REPEATS, [points[str(percent)]["rps_ratio"] for percent in REPEATS], "o-", label=model)
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_xlabel("% of questions that repeat a recent input")
    axes.set_ylabel("requests/s with the cache / without")
    axes.set_ylim(bottom=0)
    axes.legend()


def _workers(figure: Figure, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for workers, points in data.items():
        sizes = [int(size) for size in points]
        left.plot(sizes, [point["rps"] for point in points.values()], "o-", label=f"workers = {workers}")
        right.plot(sizes, [point["p50_us"] / 1000 for point in points.values()], "o-", label=f"workers = {workers}")
    _label(left, "max_batch_size", "ResNet-18 requests/s, 64 under way", SIZES[:4])
    _label(right, "max_batch_size", "p50, ms", SIZES[:4])


def _label(axes, across: str, up: str, ticks) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.legend()


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure and draw the curves of docs/gateway.md.")
    parser.add_argument("--only", nargs="+", choices=_STEPS, default=_STEPS, help="measure these again, keep the rest")
    parser.add_argument("--draw", action="store_true", help="only draw, from the JSON that is there")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=_HERE / ".cache", help="where models and programs are built")
    options = parser.parse_args()
    if not options.draw:
        _RESULTS.write_text(json.dumps(measure_all(options), indent=1) + "\n")
    draw_all(json.loads(_RESULTS.read_text()), _PICTURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
