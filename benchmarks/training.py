"""Samples a second of a ResNet-18 through the trainer as users run it, beside a bare loop over data already on the device.

    make bench-training                     (a GPU where there is one; on a CPU two minutes, with small batches, and it says so)

Both train the same network on the same random pictures with the same optimizer. The trainer is `cloud.training.train`: order,
augmentation, schedule, checkpoints, progress. The bare loop takes one batch again and again, with nothing but forward, loss,
backward and step. They take turns; a ratio is of the medians of their rounds' rates, its interval a bootstrap over rounds.

Figures: SIZE.PRECISION.trainer and .bare, samples a second; .ratio, trainer / bare, with `ratio_ci`; .utilisation of the GPU,
null without one; `augmented_ratio`: the same with the task's augmentation on. The last line is JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cloud.compute import Device, Precision
from cloud.hardware import choose_hardware
from cloud.measure import metric_interval
from cloud.tasks.base import TrainingPlan
from cloud.tasks.vision import VisionTask
from cloud.training import train
from cloud.usage import find_gpu, measured_usage
from shoal.v1 import release_pb2 as pb

RESULTS = Path(__file__).parent / "results" / "training.json"
CLASSES = 10
# side: (batch, steps of a round) on a GPU and on a CPU.
SIZES = {32: ((1024, 40), (64, 6)), 224: ((256, 20), (4, 4))}


def make_task(side, batch, steps, folder, *, augment):
    rng = np.random.default_rng(side)
    count = batch * steps
    # A fifth is held out by content: enough is made that an epoch has as many batches as a round has steps.
    x = rng.integers(0, 256, (count * 5 // 4 + batch, side, side, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", x=x, y=rng.integers(CLASSES, size=len(x)))
    tier = {"network": "resnet18", "asks": 0.1, "batch_rows": batch, "steps": steps, "learning_rate": 1e-3}
    return VisionTask("resnet18", {"data": "x.npz", "gateway": tier, "augment": augment}, folder)


def trainer_rate(task, data, batch, hardware, threads, folder):
    """Samples a second from the first epoch's end to the last's, so that the network's making is left out."""
    ends = []

    def note(*_):
        hardware.synchronize()
        ends.append(time.perf_counter())

    rows = len(data.train)
    epochs = 3
    plan = TrainingPlan(steps=epochs * -(-rows // batch), batch_rows=batch, learning_rate=1e-3)
    checkpoint = folder / "t.ckpt"
    checkpoint.unlink(missing_ok=True)
    train(
        task,
        pb.TIER_GATEWAY,
        data,
        seed=0,
        checkpoint=checkpoint,
        plan=plan,
        threads=threads,
        hardware=hardware,
        on_epoch=note,
    )
    return rows * (len(ends) - 1) / (ends[-1] - ends[0])


def bare_rate(task, data, batch, steps, hardware, threads):
    torch.set_num_threads(threads)
    module = task.build_model(pb.TIER_GATEWAY).to(hardware.device).train()
    if hardware.mixed:
        module = module.to(memory_format=torch.channels_last)
    rows = torch.from_numpy(data.train.x[:batch]).to(hardware.device) / 255
    labels = torch.from_numpy(data.train.y[:batch]).to(hardware.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def step():
        with hardware.products():
            outputs = module(rows)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    hardware.synchronize()
    began = time.perf_counter()
    for _ in range(2 * steps):
        step()
    hardware.synchronize()
    return 2 * steps * batch / (time.perf_counter() - began)


def measure(side, precision, rounds, threads):
    hardware = choose_hardware(Device.AUTO, precision)
    batch, steps = SIZES[side][hardware.device == "cpu"]
    rates = {"trainer": [], "bare": [], "augmented": []}
    with tempfile.TemporaryDirectory() as name, measured_usage(find_gpu()) as usage:
        folder = Path(name)
        plain = make_task(side, batch, steps, folder, augment=False)
        varied = make_task(side, batch, steps, folder, augment=True)
        data = plain.prepare(None)
        for _ in range(rounds):
            rates["bare"].append(bare_rate(plain, data, batch, steps, hardware, threads))
            rates["trainer"].append(trainer_rate(plain, data, batch, hardware, threads, folder))
            rates["augmented"].append(trainer_rate(varied, data, batch, hardware, threads, folder))
    taken = {key: np.array(values) for key, values in rates.items()}

    def ratio(chosen, of="trainer"):
        return float(np.median(taken[of][chosen]) / np.median(taken["bare"][chosen]))

    found = metric_interval(ratio, rounds, 0)
    return {
        "batch": batch,
        "trainer": round(float(np.median(taken["trainer"])), 1),
        "bare": round(float(np.median(taken["bare"])), 1),
        "ratio": round(found.value, 3),
        "ratio_ci": [round(found.low, 3), round(found.high, 3)],
        "augmented_ratio": round(ratio(np.arange(rounds), "augmented"), 3),
        "utilisation": round(usage.gpu_utilisation, 3) if usage.gpu else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on a CPU (default: all)")
    parser.add_argument("--sides", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="(default: all)")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else f"CPU, {options.threads} threads"
    print(f"on {device}" + ("" if has_gpu else ": no GPU here, so batches are small and nothing is said of one"))
    result = {"device": device}
    for side in options.sides:
        result[f"{side}x{side}"] = {}
        for precision in (Precision.FLOAT32, Precision.BFLOAT16):
            found = measure(side, precision, options.rounds, options.threads)
            result[f"{side}x{side}"][precision.value] = found
            print(f"  {side}x{side} {precision.value}:", json.dumps(found), flush=True)
    result["machine"] = {"cores": os.cpu_count(), "kind": platform.machine()}
    result["versions"] = {name: version(name) for name in ("torch", "numpy")}
    result["date"] = datetime.now(UTC).date().isoformat()
    if options.sides == list(SIZES):
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
