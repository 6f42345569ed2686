"""What one device that floods does to the others of its gateway, over a real Mosquitto.

    make bench-flood ARGS="--rounds 13 --save flood.json"

One gateway process with default settings and the MLP of `make bench-gateway`. All load is open loop, so that a stall is
charged to every question that it delays. Each round begins with what the gateway can do at the moment: the highest of some
rates at which 99 of 100 answers come within 20 ms. Then `--devices` devices ask at their share, all together `--load` of
that: once as it is (`calm`), and once while one more device asks at `--times` its share (`flood`), in an order that turns.
The flood comes from a process of its own, begins before the others and ends after them.

`p99_ms` are medians over the rounds of what the well-behaved devices see, `flood.p99_ratio` the median of the ratio
within a round. `flood.answered` and `flood.resource_exhausted` are what the flooder got, of all rounds. `busy` is in cores:
where `generator` is near 1, mqtt_load itself was the bottleneck. The last line is all of it as JSON.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gateway.bench_gateway import prepare
from benchmarks.gateway.models import MODELS
from benchmarks.gateway.payloads import PREFIX, SITE, write_payloads
from benchmarks.gateway.processes import environment, measure, running
from edge_gateway.lanes import LaneConfig
from fleet_console.broker import BrokerKind, RunningBroker, find_mosquitto, start_broker

_HERE = Path(__file__).parent
_MODEL = MODELS["mlp"]
_FLOOD = "flood"
_OUTSTANDING = 64
_CALIBRATION_S = 0.7
# Of what it answers with 64 questions under way, which come and go in batches: less is possible where they come one by one.
_STEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_KEEPS_UP_US = 20_000
# The flood begins so long before the others ask, and ends so long after them.
_MARGIN_S = 0.5
_GRACE_S = 30.0
_BAD = ("errors", "unanswered", "strays", "unsent")


@dataclass(slots=True)
class Flooder:
    """What the device that floods got, of all rounds."""

    asked: int = 0
    answered: int = 0
    resource_exhausted: int = 0
    other_errors: int = 0
    unanswered: int = 0
    unsent: int = 0

    def add(self, figures: dict[str, Any]) -> None:
        self.asked += figures["requests"]
        self.answered += figures["answered"] - figures["errors"]
        self.resource_exhausted += figures["exhausted"]
        self.other_errors += figures["errors"] - figures["exhausted"]
        self.unanswered += figures["unanswered"]
        self.unsent += figures["unsent"]

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Stand:
    """One broker, one gateway, and the fleets that ask it."""

    options: argparse.Namespace
    programs: Path
    folder: Path
    broker: RunningBroker
    gateway_pid: int
    flooder: Flooder = field(default_factory=Flooder)

    def ask(self, seconds: float, *options: str) -> dict[str, Any]:
        """The well-behaved devices' figures, with the cores that all who took part used meanwhile."""
        servers = {"broker": self.broker.process.pid, "gateway": self.gateway_pid}
        measured = measure(self._command(PREFIX, self.options.devices, seconds, *options), servers, seconds)
        figures = dict(measured.figures)
        spent_s = {name: us * figures["requests"] / 1e6 for name, us in measured.cpu_us.items()}
        figures["busy"] = {name: round(spent / figures["seconds"], 3) for name, spent in spent_s.items()}
        return figures

    def capacity(self) -> float:
        """Requests a second that are answered here and now: other work on the machine changes it from round to round."""
        most = float(self.ask(_CALIBRATION_S, "--outstanding", str(_OUTSTANDING))["rps"])
        for rate in (most * step for step in _STEPS):
            if self.ask(_CALIBRATION_S, "--rate", f"{rate:.3f}")["p99_us"] < _KEEPS_UP_US:
                return rate
        raise RuntimeError(
            f"{most:.0f} requests/s in batches, and not a fifth of it one by one: the machine is too busy"
        )

    def run(self, rate: float, *, is_flooded: bool) -> dict[str, Any]:
        seconds = self.options.seconds
        if not is_flooded:
            return self.ask(seconds, "--rate", f"{rate:.3f}")
        share = rate / self.options.devices
        with self.flooding(share * self.options.times, seconds + 2 * _MARGIN_S) as heard:
            figures = self.ask(seconds, "--rate", f"{rate:.3f}")
        self.flooder.add(heard)
        return {**figures, "flooder": heard}

    @contextlib.contextmanager
    def flooding(self, rate: float, seconds: float) -> Iterator[dict[str, Any]]:
        """Flood while the block runs, from a while before; what the flooder got is there when the block is over."""
        command = self._command(_FLOOD, 1, seconds, "--rate", f"{rate:.3f}")
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        heard: dict[str, Any] = {}
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_MARGIN_S)
            yield heard
            output, _ = process.communicate(timeout=seconds + _GRACE_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            raise RuntimeError(f"{command[0]}: exit status {process.returncode}")
        heard.update(json.loads(output.splitlines()[-1]))

    def _command(self, prefix: str, devices: int, seconds: float, *options: str) -> list[str]:
        command = [str(self.programs / "mqtt_load"), "--port", str(self.broker.port), "--site", SITE]
        command += ["--prefix", prefix, "--devices", str(devices), "--seconds", str(seconds)]
        return [*command, "--payloads", str(self.folder / prefix), *options]


def main() -> int:
    options = parse_arguments()
    if find_mosquitto() is None:
        sys.exit("missing: apt-get install mosquitto")
    built = prepare(options.cache, [_MODEL.name])
    load_before = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="bench-flood-"))
    try:
        write_payloads(folder / PREFIX, _MODEL.name, _MODEL.shape, devices=options.devices)
        write_payloads(folder / _FLOOD, _MODEL.name, _MODEL.shape, prefix=_FLOOD, devices=1)
        with start_broker(folder / "broker", BrokerKind.MOSQUITTO) as broker:
            command = [sys.executable, "-m", "benchmarks.gateway.serve_gateway"]
            command += [str(built / f"{_MODEL.name}.onnx"), broker.url, str(LaneConfig().max_batch_size)]
            with running(command, folder / "gateway.log", ready="ready") as pid:
                result = run_rounds(Stand(options, built / "native", folder, broker, pid))
            result |= circumstances(options, broker, load_before)
    finally:
        shutil.rmtree(folder)
    bad = [name for name in _BAD if any(each[kind][name] for each in result["rounds"] for kind in ("calm", "flood"))]
    if bad:
        print(f"BAD: well-behaved devices have {', '.join(bad)}")
    if options.save is not None:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}))
    return 1 if bad else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a device that floods does to the others.")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one run (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=64, help="that behave well (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.5, help="of the capacity, by these (default: %(default)s)")
    parser.add_argument("--times", type=float, default=10.0, help="a flooder's share (default: %(default)s)")
    parser.add_argument("--note", default="", help="on the circumstances, for the JSON")
    parser.add_argument("--save", type=Path, help="write the JSON here too, with all rounds")
    parser.add_argument("--cache", type=Path, default=_HERE / "gateway" / ".cache")
    return parser.parse_args()


def run_rounds(stand: Stand) -> dict[str, Any]:
    stand.capacity()  # warm
    rounds: list[dict[str, Any]] = []
    for number in range(stand.options.rounds):
        capacity = stand.capacity()
        rate = capacity * stand.options.load
        kinds = ("calm", "flood") if number % 2 == 0 else ("flood", "calm")
        measured = {kind: stand.run(rate, is_flooded=kind == "flood") for kind in kinds}
        rounds.append({"capacity_rps": round(capacity), "asked_rps": round(rate), **measured})
        seen = ", ".join(f"{kind} p99 {rounds[-1][kind]['p99_us'] / 1000:.2f} ms" for kind in ("calm", "flood"))
        asked = f"{rate:.0f} of {capacity:.0f} requests/s"
        print(f"round {number + 1}: {asked}, {seen}, flooder {describe(measured['flood']['flooder'])}", flush=True)
    ratios = [each["flood"]["p99_us"] / each["calm"]["p99_us"] for each in rounds]
    return {
        **{
            f"p{share}_ms": {kind: median_ms(rounds, kind, f"p{share}_us") for kind in ("calm", "flood")}
            for share in (50, 99)
        },
        "flood": {
            "p99_ratio": round(statistics.median(ratios), 3),
            "p99_ratios": [round(ratio, 3) for ratio in ratios],
            **stand.flooder.as_dict(),
        },
        "rps": {
            "capacity": round(statistics.median(each["capacity_rps"] for each in rounds)),
            "well_behaved": round(statistics.median(each["asked_rps"] for each in rounds)),
            "flooder": round(statistics.median(each["flood"]["flooder"]["rps"] for each in rounds)),
        },
        "busy": {kind: median_busy(rounds, kind) for kind in ("calm", "flood")},
        "rounds": rounds,
    }


def describe(heard: dict[str, Any]) -> str:
    return f"{heard['answered'] - heard['errors']} answers, {heard['exhausted']} times told to ask again"


def median_ms(rounds: list[dict[str, Any]], kind: str, figure: str) -> float:
    return round(statistics.median(each[kind][figure] for each in rounds) / 1000, 3)


def median_busy(rounds: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Of the flooder's own process too, over its own time."""
    found = {
        name: round(statistics.median(each[kind]["busy"][name] for each in rounds), 3)
        for name in rounds[0][kind]["busy"]
    }
    if kind == "flood":
        own = [each["flood"]["flooder"] for each in rounds]
        found["flooder"] = round(statistics.median(each["cpu_s"] / each["seconds"] for each in own), 3)
    return found


def circumstances(options: argparse.Namespace, broker: RunningBroker, load_before: float) -> dict[str, Any]:
    return {
        "settings": {name: getattr(options, name) for name in ("rounds", "seconds", "devices", "load", "times")},
        "machine": {
            "cores": os.cpu_count(),
            "arch": platform.machine(),
            "python": platform.python_version(),
            # Of others, before the first run: far from 0, only ratios mean something.
            "load_before": round(load_before, 2),
        },
        "versions": {"mosquitto": broker.version, "onnxruntime": version("onnxruntime")},
        **({"note": options.note} if options.note else {}),
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
