"""Shoal's gateway over Mosquitto beside mosec over HTTP: the same file, the same request bytes, one machine, one run.

    make bench-gateway ARGS="--rounds 5 --seconds 5 --save benchmarks/results/gateway.json"
    make bench-gateway ARGS="--rounds 1 --seconds 2 --models mlp"       (about a minute, for development)

In each round, for each model, in an order that turns from round to round:

  gateway   64 devices, 64 questions under way, QoS 1, through Mosquitto to the gateway and back; mqtt_load asks
  mosec     64 connections, over HTTP; wrk asks
  qos0      gateway and echo once more at QoS 0, which promises what HTTP does: an answer, or a connection that ended
  echo      as `gateway`, but a C program answers at once with the same bytes: what broker and devices cost
  paced     gateway and echo again, at 1,000 questions a second, latency from when each was due
  ort       onnxruntime alone, at the gateway's batch size, all cores, two ways, the better

A ratio is the median over the rounds of the ratio within a round, so that a slow minute of the machine hits both sides:
`rps_ratio` and `p99_ratio` are over mosec, `echo_ratio` over the echo's rps, `p50_ratio` over the echo's p50 when
paced, `ort_ratio` over onnxruntime's rows a second. `cpu_us` is processor time a request, for broker, server (the
gateway, the echo, or mosec with its workers) and generator. The last line is all of it as JSON.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gateway import contenders, native
from benchmarks.gateway.contenders import OUTSTANDING, Kit, MosecTuning
from benchmarks.gateway.models import MODELS
from benchmarks.gateway.payloads import typical_reply, write_payloads
from benchmarks.gateway.processes import Measured, environment
from fleet_console.broker import BrokerKind, RunningBroker, find_mosquitto, start_broker

_HERE = Path(__file__).parent
_CONTENDERS = ("gateway", "mosec", "echo", "ort")
MOSEC = {
    "mlp": MosecTuning(workers=1, batch=32, wait_ms=1),
    "cnn": MosecTuning(workers=2, batch=32, wait_ms=1),
    "resnet18": MosecTuning(workers=2, batch=8, wait_ms=10),
}
# Ratios over these runs of the same round: name, run above, run below, figure.
_RATIOS = (
    ("rps_ratio", "gateway", "mosec", "rps"),
    ("p99_ratio", "gateway", "mosec", "p99_us"),
    ("echo_ratio", "gateway", "echo", "rps"),
    ("p50_ratio", "gateway_paced", "echo_paced", "p50_us"),
    ("ort_ratio", "gateway", "ort", "rps"),
    ("qos0.rps_ratio", "gateway_qos0", "mosec", "rps"),
    ("qos0.p99_ratio", "gateway_qos0", "mosec", "p99_us"),
    ("qos0.echo_ratio", "gateway_qos0", "echo_qos0", "rps"),
)
_BAD = ("errors", "unanswered", "strays", "unsent")

Round = dict[str, dict[str, Any]]


def main() -> int:
    options = parse_arguments()
    need_programs()
    folder = prepare(options.cache, options.models)
    logs = Path(tempfile.mkdtemp(prefix="bench-gateway-"))
    load_before = os.getloadavg()[0]
    models: dict[str, Any] = {}
    with start_broker(logs / "broker", BrokerKind.MOSQUITTO) as broker:
        for name in options.models:
            kit = Kit(MODELS[name], folder, folder / "native", logs, options.mosec_python)
            rounds = run_rounds(kit, broker, options)
            models[name] = {**ratios(rounds), "medians": medians(rounds), "rounds": rounds}
            print(f"{name}: {json.dumps(ratios(rounds))}", flush=True)
        result = {**models, **circumstances(broker, options, load_before)}
    shutil.rmtree(logs)
    bad = [f"{name}: {line}" for name in models for line in bad_runs(models[name]["rounds"])]
    for line in bad:
        print(f"BAD {line}")
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if bad else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the gateway beside mosec, the echo and onnxruntime.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run (default: %(default)s)")
    parser.add_argument("--models", type=_names(tuple(MODELS)), default=list(MODELS), help="default: all")
    parser.add_argument("--only", type=_names(_CONTENDERS), default=list(_CONTENDERS), help="default: all contenders")
    parser.add_argument("--save", type=Path, help="write the JSON here too")
    parser.add_argument("--cache", type=Path, default=_HERE / ".cache", help="where models and programs are built")
    parser.add_argument("--mosec-python", type=Path, default=_HERE / ".venv" / "bin" / "python")
    return parser.parse_args()


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = set(names) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return names

    return parse


def need_programs() -> None:
    missing = [
        package for package, found in (("mosquitto", find_mosquitto()), ("wrk", shutil.which("wrk"))) if not found
    ]
    if missing:
        sys.exit(f"missing: apt-get install {' '.join(missing)}")


def prepare(cache: Path, names: list[str]) -> Path:
    """Build what is not there yet. The folder is named after what made it, so that nothing stale is measured."""
    makers = b"".join((_HERE / name).read_bytes() for name in ("models.py", "build_models.py", "payloads.py"))
    folder = cache / hashlib.sha256(makers).hexdigest()[:12]
    native.build(folder / "native")
    missing = [name for name in names if not (folder / f"{name}.onnx").exists()]
    for model in (MODELS[name] for name in missing):
        write_payloads(folder / f"{model.name}.requests", model.name, model.shape)
        (folder / f"{model.name}.reply").write_bytes(typical_reply(model.name))
    if missing:
        print(f"building {', '.join(missing)}", flush=True)
        command = [sys.executable, "-m", "benchmarks.gateway.build_models", str(folder), *missing]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
    return folder


def run_rounds(kit: Kit, broker: RunningBroker, options: argparse.Namespace) -> list[Round]:
    """All servers stand for all rounds of a model; the one that is not asked does nothing."""
    with contextlib.ExitStack() as stack:
        runs: list[tuple[str, Callable[[], Measured]]] = []
        seconds, paced_rps = options.seconds, kit.model.paced_rps
        if "gateway" in options.only:
            gateway = stack.enter_context(contenders.gateway(kit, broker))
            runs.append(("gateway", lambda: gateway.run(seconds)))
            runs.append(("gateway_qos0", lambda: gateway.run(seconds, qos=0)))
        if "mosec" in options.only:
            mosec = stack.enter_context(contenders.mosec(kit, MOSEC[kit.model.name]))
            runs.append(("mosec", lambda: mosec.run(seconds)))
        if "echo" in options.only:
            echo = stack.enter_context(contenders.echo(kit, broker))
            runs.append(("echo", lambda: echo.run(seconds)))
            runs.append(("echo_qos0", lambda: echo.run(seconds, qos=0)))
            if paced_rps and "gateway" in options.only:
                runs.append(("gateway_paced", lambda: gateway.run(seconds, paced_rps)))
                runs.append(("echo_paced", lambda: echo.run(seconds, paced_rps)))
        if "ort" in options.only:
            runs.append(("ort", lambda: contenders.ort_alone(kit, seconds)))
        return [run_round(kit.model.name, number, runs) for number in range(options.rounds)]


def run_round(model: str, number: int, runs: list[tuple[str, Callable[[], Measured]]]) -> Round:
    """One run of each, starting with another one each time."""
    first = number % len(runs)
    measured: Round = {}
    for name, run in runs[first:] + runs[:first]:
        measured[name] = run().as_dict()
        print(f"{model} round {number + 1} {name}: {describe(measured[name])}", flush=True)
    return measured


def describe(run: dict[str, Any]) -> str:
    latency = f", p50 {run['p50_us']:.0f} p99 {run['p99_us']:.0f} us" if "p50_us" in run else ""
    cpu = ", ".join(f"{name} {spent:.1f}" for name, spent in run["cpu_us"].items())
    return f"{run['rps']:.0f} requests/s{latency}; CPU us a request: {cpu}"


def ratios(rounds: list[Round]) -> dict[str, Any]:
    """The median over the rounds of each ratio that was measured; a dot in its name nests it."""
    found: dict[str, Any] = {}
    for name, above, below, figure in _RATIOS:
        if all(above in one and below in one for one in rounds):
            *outer, last = name.split(".")
            place = found.setdefault(outer[0], {}) if outer else found
            place[last] = round(statistics.median(one[above][figure] / one[below][figure] for one in rounds), 3)
    return found


def medians(rounds: list[Round]) -> dict[str, dict[str, Any]]:
    """The median over the rounds of each figure of each run."""
    return {name: _median_of([one[name] for one in rounds]) for name in sorted(rounds[0])}


def _median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    return {
        key: _median_of([run[key] for run in runs])
        if isinstance(first[key], dict)
        else round(statistics.median(run[key] for run in runs), 2)
        for key in first
    }


def bad_runs(rounds: list[Round]) -> list[str]:
    """Runs in which a question was answered wrongly, twice or not at all: their figures mean nothing."""
    return [
        f"round {number + 1} {name}: {', '.join(f'{key} {run[key]}' for key in _BAD if run.get(key))}"
        for number, one in enumerate(rounds)
        for name, run in one.items()
        if any(run.get(key) for key in _BAD)
    ]


def circumstances(broker: RunningBroker, options: argparse.Namespace, load_before: float) -> dict[str, Any]:
    listed = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"wrk (\S+)", listed)
    return {
        "settings": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "outstanding": OUTSTANDING,
            "gateway_batch": {name: MODELS[name].batch for name in options.models},
            "mosec": {name: MOSEC[name].environment(Path(f"{name}.onnx")) for name in options.models},
        },
        "machine": {
            "cores": os.cpu_count(),
            "arch": platform.machine(),
            "python": platform.python_version(),
            # Of others, before the first run: far from 0, only ratios mean something.
            "load_before": load_before,
        },
        "versions": {
            "mosquitto": broker.version,
            "wrk": found[1] if found else "unknown",
            "onnxruntime": version("onnxruntime"),
            "mosec": _pinned_mosec(),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }


def _pinned_mosec() -> str:
    found = re.search(r"mosec==(\S+)", (_HERE / "requirements-mosec.txt").read_text())
    return found[1] if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
