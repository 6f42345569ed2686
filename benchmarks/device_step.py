"""What the agent adds to a model call: microseconds a reading, beside the bare interpreter, in one run.

    make bench-device-step

Readings of the Statlog Shuttle data go through a real `Device` (change detector, pre-processing, inference, scoring,
policy, counters) with its outbox on disk. Its link is never connected, and nothing is asked: what a question costs is
its commit's business, and thousands of devices share one. Rounds of the device and of the bare `invoke()` of the same
file take turns; each figure is the median of the rounds. `own_us` is the whole step less the bare call with its two
tensor copies; `invoke_us` is `invoke()` alone. The model is Shuttle's own device architecture with random weights,
static int8 and float32: what it answers costs the same.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np

from device_agent import runtime
from device_agent.config import DeviceConfig
from device_agent.device import Device
from device_agent.policy import PolicyConfig
from device_agent.readings import Reading
from shoal.delivery.outbox import Outbox
from shoal.link_config import node_identity
from shoal.v1.release_pb2 import SCORE_KIND_RECONSTRUCTION, Artefact, InputSchema, ReleaseSpec, Tier

_CHANNELS = 9
_MAKE = """
import sys, numpy as np, torch
from cloud.export import to_tflite
from cloud.quantize import quantize_tflite
from cloud.models.detectors import autoencoder
torch.manual_seed(5)
data = to_tflite(autoencoder((9,), (16, 3)), (9,))
open(sys.argv[1] + "/float32.tflite", "wb").write(data)
open(sys.argv[1] + "/int8.tflite", "wb").write(quantize_tflite(data, np.random.default_rng(5).normal(size=(64, 9)).astype("f4")))
"""


class SilentLink:
    """A link that never connects."""

    def __init__(self) -> None:
        self.identity = node_identity("bench", "dev", "device")
        self.connected = False
        self.is_idle = True
        self.counters: Counter[str] = Counter()

    def subscribe(self, *_args: object, **_segments: object) -> None:
        """Nobody sends."""

    def on_connect(self, _hook: object) -> None:
        """It never comes."""

    def publish(self, *_args: object, **_fields: object) -> bool:
        return False

    def room(self) -> int:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--readings", type=int, default=2000, help="of each round (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        subprocess.run([sys.executable, "-c", _MAKE, folder], check=True, capture_output=True)
        figures = {name: measure(directory, name, options) for name in ("int8", "float32")}
    distribution = runtime.runtime_name().partition(" ")[0]
    result = {
        **figures["int8"],
        "float32": figures["float32"],
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "versions": {distribution: version(distribution), "numpy": version("numpy")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(result))


def measure(directory: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    path = directory / f"{name}.tflite"
    rows = np.random.default_rng(3).normal(size=(options.readings, _CHANNELS)).astype(np.float32)
    readings = [Reading(row, 17, "row") for row in rows]
    outbox = Outbox(directory / f"{name}.sqlite")
    device = make_device(outbox, path)
    bare = make_bare(path)
    whole, call, invoke = [], [], []
    for _ in range(options.rounds):
        began = time.process_time()
        for reading in readings:
            device.read(reading, 1.0)
        whole.append(time.process_time() - began)
        call.append(bare(rows, copies=True))
        invoke.append(bare(rows, copies=False))
    asked = outbox.in_flight
    outbox.close()
    if asked:
        raise SystemExit(f"{asked} readings were asked: this measures readings that stay")
    per_reading = 1e6 / options.readings
    step_us, call_us, invoke_us = (statistics.median(taken) * per_reading for taken in (whole, call, invoke))
    own_us = statistics.median(a - b for a, b in zip(whole, call, strict=True)) * per_reading
    print(f"{name}: {step_us:.1f} us a reading, of it {call_us:.1f} the bare call (invoke() alone {invoke_us:.1f})")
    return {"own_us": round(own_us, 1), "invoke_us": round(invoke_us, 1), "step_us": round(step_us, 1)}


def make_device(outbox: Outbox, path: Path) -> Device:
    config = DeviceConfig("bench", "dev", "shuttle", policy=PolicyConfig(audit_share=0.0))
    device = Device(config, SilentLink(), outbox, rng=random.Random(7), clock=lambda: 1.0)
    schema = InputSchema(shape=[_CHANNELS], mean=[0.5] * _CHANNELS, std=[2.0] * _CHANNELS)
    artefact = Artefact(tier=Tier.TIER_DEVICE, threshold=1e30)
    device.activate(
        "shuttle",
        ReleaseSpec(release=1, input=schema, score=SCORE_KIND_RECONSTRUCTION, artefacts=[artefact]),
        path,
    )
    return device


def make_bare(path: Path):
    """The interpreter by itself, with or without what any caller must copy in and out."""
    interpreter = import_module(f"{runtime._installed().name}.interpreter").Interpreter(
        model_path=str(path), num_threads=1
    )
    interpreter.allocate_tensors()
    entry, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(rows: np.ndarray, *, copies: bool) -> float:
        inputs = [row[None].astype(entry["dtype"]) for row in rows]
        interpreter.set_tensor(entry["index"], inputs[0])
        began = time.process_time()
        for row in inputs:
            if copies:
                interpreter.set_tensor(entry["index"], row)
            interpreter.invoke()
            if copies:
                interpreter.get_tensor(result["index"])
        return time.process_time() - began

    return run


if __name__ == "__main__":
    main()
