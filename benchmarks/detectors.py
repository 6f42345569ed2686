"""The detectors of the task `sensor` beside each other: on Shuttle, and on SKAB's pump with windows of several lengths.

    make bench-detectors                    (three minutes; SKAB needs ../shared/data)

Each is trained with several seeds on rows without an anomaly and scored by average precision on later ones: on Shuttle as the
task splits it, judged on the fleet's stream; on SKAB on the first 400 rows of each file, which its authors give for that, scaled
by them, judged on the rest of all files. float is torch's; int8 is the ONNX artefact in ONNX Runtime.

The last line is JSON: SET.DETECTOR.float and .int8, the mean over seeds, and `_range`, least and most.
"""

import argparse
import csv
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
from sklearn.metrics import average_precision_score
from torch import nn

from cloud.export import to_onnx
from cloud.gate import onnx_runner
from cloud.models.layers import fold_for_export
from cloud.quantize import calibration_rows, quantize_onnx
from cloud.tasks.base import LabelledSamples
from cloud.tasks.datasets import SHUTTLE_STREAM, shuttle_rows
from cloud.tasks.sensor import SensorTask, windows_of
from cloud.training import train
from shoal.scoring import scale, score_rows
from shoal.v1 import release_pb2 as pb

RESULTS = Path(__file__).parent / "results" / "detectors.json"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "sensor_skab"
WARM_UP = 400
WINDOWS = (1, 4, 8)
FARTHEST = 20.0


def skab_files(folder):
    """Yield readings and labels of each file with an anomaly."""
    for path in sorted(folder.rglob("*.csv")):
        with path.open(encoding="utf-8") as file:
            head, *rows = csv.reader(file, delimiter=";")
        if "anomaly" not in head:
            continue
        channels = [index for index, name in enumerate(head) if name not in {"datetime", "anomaly", "changepoint"}]
        x = np.array([[float(row[index]) for index in channels] for row in rows], np.float32)
        yield x, np.array([int(float(row[head.index("anomaly")])) for row in rows])


def skab(folder, window, scratch):
    """Write training rows where the task finds them; return its data and the rows to judge by."""
    parts = []
    for x, y in skab_files(folder):
        mean, std = x[:WARM_UP].mean(0), x[:WARM_UP].std(0) + 1e-6
        scaled = np.clip((x - mean) / std, -FARTHEST, FARTHEST).astype(np.float32)
        parts.append((LabelledSamples(scaled[:WARM_UP], y[:WARM_UP]), LabelledSamples(scaled[WARM_UP:], y[WARM_UP:])))
    train_rows, later = ([windows_of(part[side], window, 1) for part in parts] for side in (0, 1))
    x, y = np.concatenate([part.x for part in later]), np.concatenate([part.y for part in later])
    normal = np.concatenate([part.x[part.y == 0] for part in train_rows])
    # As single rows, each a window already.
    np.savez(scratch / "skab.npz", x=np.zeros((8, x.shape[-1]), np.float32), y=np.ones(8, np.int64))
    return normal, LabelledSamples(x, y)


class Skab(SensorTask):
    """The task on windows that were cut file by file, so that none spans two."""

    def __init__(self, parameters, base, normal):
        super().__init__("skab", parameters, base)
        self.shape = normal.shape[1:]
        self._train = LabelledSamples(normal, np.zeros(len(normal), np.int64))


def average_precision(task, data, module, test):
    """Of float and of int8."""
    rows = scale(test.x, data.schema())
    folded = fold_for_export(module)
    model = to_onnx(folded, task.shape)
    small = quantize_onnx(model, calibration_rows(scale(data.train.x, data.schema()), 256, 0))
    found = []
    for run in (lambda given: folded(torch.from_numpy(given)).detach().numpy(), onnx_runner(small)):
        scores = score_rows(task.score, rows, run(rows)).scores
        found.append(float(average_precision_score(test.y, scores)))
    return found


def measure(make_task, test, seeds):
    result = {}
    for detector in ("autoencoder", "cross_predictor"):
        task = make_task(detector)
        data = task.prepare(None)
        pairs = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                module: nn.Module = train(
                    task, pb.TIER_DEVICE, data, seed=seed, checkpoint=Path(folder) / "c", threads=2
                )
            pairs.append(average_precision(task, data, module, test))
        result[detector] = {}
        for name, values in zip(("float", "int8"), np.array(pairs).T, strict=True):
            result[detector] |= {
                name: round(values.mean(), 4),
                f"{name}_range": [round(v, 4) for v in (values.min(), values.max())],
            }
        print(f"  {detector:<16}", json.dumps(result[detector]), flush=True)
    return result


def parameters(detector, window, **more):
    """Give the autoencoder the widths that served it best: on windows a bottleneck of 3 is too narrow."""
    widths = [8] if detector == "cross_predictor" else [16, 3] if window == 1 else [32, 8]
    return more | {"device": {"detector": detector, "recall": 0.9, "widths": widths}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="SKAB's folder of CSV files (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()
    print("shuttle")
    test = shuttle_rows().take(SHUTTLE_STREAM)
    result = {
        "shuttle": measure(
            lambda name: SensorTask("s", parameters(name, 1, data="shuttle"), Path()), test, options.seeds
        )
    }
    if options.data.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            for window in WINDOWS:
                print(f"skab, windows of {window}")
                normal, test = skab(options.data, window, Path(folder))
                result[f"skab_{window}"] = measure(
                    lambda name, normal=normal, window=window: Skab(
                        parameters(name, window, data="skab.npz"), Path(folder), normal
                    ),
                    test,
                    options.seeds,
                )
    else:
        print(f"SKAB left out: {options.data} is not there")
    result["machine"] = {"cores": os.cpu_count(), "kind": platform.machine()}
    result["versions"] = {name: version(name) for name in ("torch", "onnxruntime", "numpy")}
    result["date"] = datetime.now(UTC).date().isoformat()
    if options.data == DATA:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
