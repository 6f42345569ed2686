"""What a fleet forgets when it learns what is new, and what mixing old samples in keeps.

    make bench-replay                       (a minute)

The device's network of the task `vision` on digits, when cameras are knocked askew (`simulator.drift`) and 300 drifted samples come
back with labels. Three ways to make the next release: `before`, none; `new_only`, from those 300 alone; `replay`, what a pipeline
does: the field's samples, classes balanced, mixed with the initial set. Accuracy on the 797 pictures of the fleet's stream that
nobody was trained on, as they were (`old`) and drifted (`new`); mean of the seeds, least and most. The last line is JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from cloud.tasks.base import LabelledSamples, TrainingData
from cloud.tasks.datasets import digits_images, digits_stream
from cloud.tasks.vision import VisionTask
from cloud.training import train
from shoal.scoring import scale
from shoal.v1 import release_pb2 as pb
from simulator.drift import Drift

RESULTS = Path(__file__).parent / "results" / "replay.json"
LABELLED = 300


def accuracy(module, data, samples):
    with torch.no_grad():
        logits = module(torch.from_numpy(scale(samples.x, data.schema())))
    return float((logits.argmax(1).numpy() == samples.y).mean())


def measure(seed):
    task = VisionTask("digits", {"data": "digits"}, Path())
    rng, drift = np.random.default_rng(seed), Drift()
    stream = digits_images().take(digits_stream())
    drifted = LabelledSamples(np.stack([drift.apply(image, rng) for image in stream.x]), stream.y)
    field = drifted.take(slice(LABELLED))
    plain, mixed = task.prepare(None), task.prepare(field)
    ways = {"before": plain, "new_only": TrainingData(field, plain.holdout, plain.mean, plain.std), "replay": mixed}
    found = {}
    for way, data in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            module = train(task, pb.TIER_DEVICE, data, seed=seed, checkpoint=Path(folder) / "c", threads=2)
        rest = slice(LABELLED, None)
        found[way] = [accuracy(module, data, stream.take(rest)), accuracy(module, data, drifted.take(rest))]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()
    runs = [measure(seed) for seed in range(options.seeds)]
    result = {}
    for way in runs[0]:
        result[way] = {}
        for index, name in enumerate(("old", "new")):
            values = [run[way][index] for run in runs]
            result[way] |= {
                name: round(float(np.mean(values)), 3),
                f"{name}_range": [round(min(values), 3), round(max(values), 3)],
            }
        print(f"  {way:<9}", json.dumps(result[way]))
    result["machine"] = {"cores": os.cpu_count(), "kind": platform.machine()}
    result["versions"] = {name: version(name) for name in ("torch", "numpy")}
    result["date"] = datetime.now(UTC).date().isoformat()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
