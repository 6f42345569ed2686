"""How mosec's settings in `bench_gateway.MOSEC` were found: every combination, each pass in another order.

    .venv/bin/python -m benchmarks.gateway.tune_mosec --model mlp --passes 2 --seconds 3

Prints the median of each, the fastest first, and as the last line JSON. Compare with `make bench-gateway`'s figures: a
setting that wins here by a hair may lose on another machine.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gateway import contenders
from benchmarks.gateway.bench_gateway import need_programs, prepare
from benchmarks.gateway.contenders import Kit, MosecTuning
from benchmarks.gateway.models import MODELS

_HERE = Path(__file__).parent
_SEED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Search mosec's settings for one model.")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--workers", type=_numbers, default=[1, 2, 3])
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 16, 32, 64])
    parser.add_argument("--waits-ms", type=_numbers, default=[1, 2, 5])
    parser.add_argument("--threads", type=_numbers, default=[1])
    parser.add_argument("--cache", type=Path, default=_HERE / ".cache")
    parser.add_argument("--mosec-python", type=Path, default=_HERE / ".venv" / "bin" / "python")
    options = parser.parse_args()
    need_programs()
    grid = [
        MosecTuning(*values)
        for values in itertools.product(options.workers, options.batches, options.waits_ms, options.threads)
        # Alone in its batch, a question waits for nobody.
        if values[1] > 1 or values[2] == options.waits_ms[0]
    ]
    folder = prepare(options.cache, [options.model])
    runs: dict[MosecTuning, list[dict[str, Any]]] = {tuning: [] for tuning in grid}
    with tempfile.TemporaryDirectory() as logs:
        kit = Kit(MODELS[options.model], folder, folder / "native", Path(logs), options.mosec_python)
        for _ in range(options.passes):
            for tuning in random.Random(_SEED).sample(grid, len(grid)):
                with contenders.mosec(kit, tuning) as server:
                    runs[tuning].append(server.run(options.seconds).as_dict())
                print(".", end="", file=sys.stderr, flush=True)
    found = sorted((_summary(tuning, measured) for tuning, measured in runs.items()), key=lambda one: -one["rps"])
    print("\nworkers batch wait_ms threads       rps   p99_us  CPU us a request")
    for one in found:
        shape = f"{one['workers']:7d} {one['batch']:5d} {one['wait_ms']:7d} {one['threads']:7d}"
        print(f"{shape} {one['rps']:9.0f} {one['p99_us']:8.0f} {one['cpu_us']:17.1f}")
    print(json.dumps({"model": options.model, "found": found}))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _summary(tuning: MosecTuning, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "workers": tuning.workers,
        "batch": tuning.batch,
        "wait_ms": tuning.wait_ms,
        "threads": tuning.threads,
        "rps": statistics.median(run["rps"] for run in runs),
        "p99_us": statistics.median(run["p99_us"] for run in runs),
        "cpu_us": statistics.median(run["cpu_us"]["server"] for run in runs),
    }


if __name__ == "__main__":
    main()
