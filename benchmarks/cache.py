"""What the gateway's answer cache saves where inputs repeat, and costs where they do not.

    make bench-cache

The whole request path of the real gateway, without a network: 64 packets are in the socket at once, each is parsed,
checked, looked up, batched by 32, run by ONNX Runtime, and answered with a packet of its own. Two gateways, one with the
cache as shipped and one without, get the same questions in turns of 1,024, so that a slow moment of the machine hits
both; who goes first changes. A round is 41,024 questions: one window in which the cache looks, and all of the time for
which it then steps aside. Each turn of a round counts with its median over the rounds.

  repeats   half of the questions repeat the input of one of the last 500 different ones
  unique    no two questions of a round have the same input

`model_share` is the share of requests that the model ran, of the gateway with the cache. `rps_ratio` is requests a
second of processor time (one thread does all of it) with the cache over those without; `cost` is 1 minus it. The cases are `mlp_uint8` with inputs of 3 KB,
`mlp_float32` with 12 KB, which is the worst that can happen, for that model takes a third of the time of a request and the
key is long, `cnn_uint8` with 64 bytes, and `wide_uint8`, an MLP that costs several lookups. Where a row costs the model less
than some 15 us the cache about breaks even on repeats; where it costs more, throughput rises. `unique` at the top level is
the worst of all cases, `repeats` that of `wide_uint8`. The last line is all of it as JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edge_gateway.cache import CacheConfig
from edge_gateway.deploy import local_model
from edge_gateway.inference import ServedModel
from edge_gateway.lanes import LaneConfig
from edge_gateway.rehearsal import Rehearsal, packet_of
from shoal.tensors import to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import SensorData

_DEVICES = 64
_DRAINED = 64
_BATCH = 32
_TURN = 1024
# A window and what it is bypassed for, in whole batches of packets.
_ROUND = -(-(CacheConfig().window + CacheConfig().bypass) // _DRAINED) * _DRAINED
_REPEAT_SHARE = 0.5
_RECENT = 500
_SEED = 3
_CASES = {
    "mlp_uint8": ("mlp", np.dtype(np.uint8)),
    "mlp_float32": ("mlp", np.dtype(np.float32)),
    "cnn_uint8": ("cnn", np.dtype(np.uint8)),
    "wide_uint8": ("wide", np.dtype(np.uint8)),
}
_WIDTHS = (3072, 384, 10)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the gateway's answer cache.")
    parser.add_argument("--rounds", type=int, default=11, help="(default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "gateway" / ".cache")
    options = parser.parse_args()
    result: dict[str, dict] = {}
    for case, (model, dtype) in _CASES.items():
        served = local_model(model, model_file(options.cache, model))
        distinct = distinct_inputs(served.values, dtype)
        result[case] = {
            name: measure(model, served, packets(model, distinct, dtype, trace), options.rounds)
            for name, trace in (("repeats", repeating(len(distinct))), ("unique", unique(len(distinct))))
        }
        print(f"{case}: {json.dumps(result[case])}", flush=True)
    result["repeats"] = result["wide_uint8"]["repeats"]
    result["unique"] = max((result[case]["unique"] for case in _CASES), key=lambda figures: figures["cost"])
    result["machine"] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    result["date"] = datetime.now(UTC).date().isoformat()
    print(json.dumps(result))
    return 0


def model_file(cache: Path, model: str) -> Path:
    """A model of `make bench-gateway`, built where it is not there yet."""
    path = cache / "alone" / f"{model}.onnx"
    if model == "wide":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wide(path)
    elif not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.gateway.build_models", str(path.parent), model]
        root = Path(__file__).parent.parent
        paths = {"PYTHONPATH": f"{root}:{root / 'proto'}"}
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, **paths})
    return path


def write_wide(path: Path) -> None:
    """An MLP with three times the hidden units of `mlp`: its call costs several lookups."""
    rng = np.random.default_rng(_SEED)
    weights = [
        helper.make_tensor(f"w{index}", TensorProto.FLOAT, pair, rng.normal(0, 0.02, pair).astype(np.float32).ravel())
        for index, pair in enumerate(pairwise(_WIDTHS))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w])
        for n, w in (("x", _WIDTHS[0]), ("y", _WIDTHS[-1]))
    ]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def distinct_inputs(values: int, dtype: np.dtype) -> list[bytes]:
    """More than twice what the cache holds: when they come round again, in order, an LRU cache has forgotten them."""
    rng = np.random.default_rng(_SEED)
    count = min(_ROUND, 2 * CacheConfig().max_bytes // (values * dtype.itemsize))
    return [rng.integers(0, 256, values, dtype=np.uint8).astype(dtype).tobytes() for _ in range(count)]


def unique(distinct: int) -> list[int]:
    return [index % distinct for index in range(_ROUND)]


def repeating(distinct: int, share: float = _REPEAT_SHARE) -> list[int]:
    rng = random.Random(_SEED)
    trace: list[int] = []
    fresh = 0
    for _ in range(_ROUND):
        if fresh and rng.random() < share:
            trace.append((fresh - 1 - rng.randrange(min(fresh, _RECENT))) % distinct)
        else:
            trace.append(fresh % distinct)
            fresh += 1
    return trace


def packets(model: str, distinct: Sequence[bytes], dtype: np.dtype, trace: Sequence[int]) -> list[bytes]:
    """One question for each place of the trace."""
    tensors = {index: to_tensor(np.frombuffer(distinct[index], dtype)) for index in set(trace)}
    made = []
    for place, index in enumerate(trace):
        row = pb.InferenceRow(reading=SensorData(seq=place + 1, tensor=tensors[index]), reason=pb.ASK_REASON_SCORE)
        device = f"cam{place % _DEVICES:02d}"
        made.append(packet_of(pb.InferenceRequest(device=device, epoch=b"e" * 16, model=model, rows=[row])))
    return made


def measure(model: str, served: ServedModel, asked: list[bytes], rounds: int) -> dict[str, Any]:
    """The same questions to a gateway with the cache and one without, turn by turn."""
    configs = {
        "with": LaneConfig(max_batch_size=_BATCH),
        "without": LaneConfig(max_batch_size=_BATCH, cache=CacheConfig(max_bytes=0)),
    }
    shares: list[float] = []
    rounds_of: list[dict[str, list[float]]] = []
    for _ in range(rounds):
        # New ones for each round: what an earlier one left in the cache would answer everything.
        with Rehearsal(model, served, configs["with"]) as one, Rehearsal(model, served, configs["without"]) as other:
            rounds_of.append(run_round({"with": one, "without": other}, asked))
            counters = one.gateway.counters
            shares.append(counters["rows.inferred"] / counters["requests"])
    spent = {
        name: sum(statistics.median(turn) for turn in zip(*(each[name] for each in rounds_of), strict=True))
        for name in configs
    }
    ratio = spent["without"] / spent["with"]
    return {
        "model_share": round(statistics.median(shares), 4),
        "rps_ratio": round(ratio, 4),
        "cost": round(1 - ratio, 4),
        "us": {name: round(1e6 * seconds / len(asked), 2) for name, seconds in spent.items()},
        "cost_rounds": [round(1 - sum(each["without"]) / sum(each["with"]), 4) for each in rounds_of],
    }


def run_round(sides: dict[str, Rehearsal], asked: list[bytes]) -> dict[str, list[float]]:
    """Seconds of processor time that each took for each turn."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number, start in enumerate(range(0, len(asked), _TURN)):
        turn = asked[start : start + _TURN]
        for name in list(sides)[:: 1 if number % 2 else -1]:
            ask = sides[name].ask
            began = time.thread_time()
            sent = sum(len(ask(turn[first : first + _DRAINED])) for first in range(0, len(turn), _DRAINED))
            spent[name].append(time.thread_time() - began)
            if sent != 2 * len(turn):
                raise RuntimeError(f"{sent} packets for {len(turn)} questions, expected a reply and a PUBACK each")
    for name, side in sides.items():
        counters = side.gateway.counters
        if counters["rows.ok"] != counters["requests"]:
            raise RuntimeError(f"{name}: {dict(counters)}")
    return spent


if __name__ == "__main__":
    sys.exit(main())
