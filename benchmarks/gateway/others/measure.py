"""LitServe, BentoML and Ray Serve, asked as mosec is: the MLP, 64 connections, the same request bytes. Run once.

    .venv/bin/python -m benchmarks.gateway.others.measure --environments /tmp/others --save benchmarks/results/others.json

Makes an environment for each under `--environments`, gigabytes in all. Each is set up as its documents advise: two
workers, batches of 32 where it can batch this kind of request. None was tuned as long as mosec was.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gateway.bench_gateway import describe, medians, need_programs, prepare
from benchmarks.gateway.contenders import Kit, MosecTuning, http_server
from benchmarks.gateway.models import MODELS
from fleet_console.broker import free_port

_HERE = Path(__file__).parent
_MODEL = "mlp"
_SETTINGS = MosecTuning(workers=2, batch=32, wait_ms=1)
_MODULE = "benchmarks.gateway.others.serve_"
# After the environment's bin folder; PORT stands for the port.
_COMMANDS = {
    "litserve": ("python", "-m", f"{_MODULE}litserve", "PORT"),
    "bentoml": ("bentoml", "serve", f"{_MODULE}bentoml:Inference", "--host", "127.0.0.1", "--port", "PORT"),
    "ray": ("python", "-m", f"{_MODULE}ray", "PORT"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure other servers of models once.")
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--cache", type=Path, default=_HERE.parent / ".cache")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    need_programs()
    folder = prepare(options.cache, [_MODEL])
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as logs:
        kit = Kit(MODELS[_MODEL], folder, folder / "native", Path(logs), Path(sys.executable))
        for name in _COMMANDS:
            environment = make_environment(name, options.environments)
            result[name] = measure_server(name, environment, kit, options.rounds, options.seconds)
    result["model"] = _MODEL
    result["machine"] = {"cores": os.cpu_count(), "arch": platform.machine(), "load_after": os.getloadavg()[0]}
    result["date"] = datetime.now(UTC).date().isoformat()
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def make_environment(name: str, environments: Path) -> Path:
    """Install a server where that has not been done; return the folder of its programs."""
    environment = environments / name
    requirements = _HERE / f"requirements-{name}.txt"
    stamp = environment / requirements.name
    if not stamp.exists() or stamp.read_bytes() != requirements.read_bytes():
        print(f"installing {name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([*pip, str(requirements)], check=True)
        stamp.write_bytes(requirements.read_bytes())
    return environment / "bin"


def measure_server(name: str, programs: Path, kit: Kit, rounds: int, seconds: float) -> dict[str, Any]:
    port = free_port()
    program, *arguments = (part.replace("PORT", str(port)) for part in _COMMANDS[name])
    command = [str(programs / program), *arguments]
    url = f"http://127.0.0.1:{port}/inference"
    with http_server(kit, command, kit.logs / f"{name}.log", url, _SETTINGS.environment(kit.onnx)) as server:
        runs = [server.run(seconds).as_dict() for _ in range(rounds)]
    print(f"{name}: {'; '.join(describe(run) for run in runs)}", flush=True)
    return {"median": medians([{name: run} for run in runs])[name], "rounds": runs}


if __name__ == "__main__":
    main()
