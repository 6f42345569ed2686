"""The detector `cloud.detectors` on SKAB (a water pump's eight channels at 1 Hz), beside "everything is anomalous".

    make bench-skab                          (seconds; needs ../shared/data/sensor_skab)
    python benchmarks/skab.py --data FOLDER  (other folders; prints, writes nothing)

FOLDER has `anomaly-free/*.csv` and further folders of csv files (valve1, ...), separated by semicolons, with a column
`anomaly`. Here an anomaly is a state of minutes in which every row is labelled, so the detector does not learn after its
warm-up (`learns=False`), there is no dead time, and each row counts. The threshold is NAB's, rounded: nothing was chosen here.

- first_400: the warm-up is each file's first 400 rows, as in SKAB's own examples; the other rows are judged;
- anomaly_free: the warm-up is the recording without anomalies; the same rows are judged;
- f1, false_alarm_rate (false alarms / normal rows), missed_alarm_rate (missed / anomalous rows): all rows of all files
  together; intervals are 95 % percentile bootstrap over files;
- best_threshold: what first_400 could reach with the threshold that is best for these files: an upper bound, not a result;
- everything_anomalous: the same rows, every one an alarm. An F1 near its F1 says nothing.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.labelled_series import load_skab
from cloud.detectors.novelty import NoveltyConfig, NoveltyDetector

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results" / "skab.json"
_DATA = _ROOT.parent / "shared" / "data" / "sensor_skab"
_THRESHOLD = 2.3
_FIRST = 400
_RESAMPLES = 2000
_MEMORY = 10_000

Flags = NDArray[np.bool_]


def scores(warm_up: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score rows, (row, channel), by a detector that knows the warm-up and learns no more."""
    config = NoveltyConfig(channels=rows.shape[1], warm_up=len(warm_up), memory=_MEMORY, learns=False)
    detector = NoveltyDetector(config)
    for row in warm_up:
        detector.update(row)
    return np.array([detector.update(row) for row in rows])


def counts(alarms: Flags, truth: Flags) -> NDArray[np.int64]:
    """Return true alarms, false alarms, missed, rightly silent."""
    cells = (alarms & truth, alarms & ~truth, ~alarms & truth, ~alarms & ~truth)
    return np.array([cell.sum() for cell in cells], dtype=np.int64)


def rates(cells: NDArray[np.int64]) -> dict[str, Any]:
    """F1 and both error rates of counts, (..., 4); 0 where there is nothing to divide by."""
    found, false, missed, silent = np.moveaxis(cells, -1, 0)
    return {
        "f1": 2 * found / np.maximum(2 * found + false + missed, 1),
        "false_alarm_rate": false / np.maximum(false + silent, 1),
        "missed_alarm_rate": missed / np.maximum(missed + found, 1),
    }


def summary(alarms: Sequence[Flags], truths: Sequence[Flags]) -> dict[str, Any]:
    """Rates of all files together, with intervals over files."""
    cells = np.array([counts(*pair) for pair in zip(alarms, truths, strict=True)])
    picks = np.random.default_rng(1).integers(len(cells), size=(_RESAMPLES, len(cells)))
    drawn = rates(cells[picks].sum(1))
    result: dict[str, Any] = {name: round(float(value), 3) for name, value in rates(cells.sum(0)).items()}
    bounds = {name: np.percentile(values, [2.5, 97.5]).round(3).tolist() for name, values in drawn.items()}
    return result | {"intervals": bounds}


def measure(folder: Path, threshold: float) -> dict[str, Any]:
    recordings = [load_skab(path)[0] for path in sorted((folder / "anomaly-free").glob("*.csv"))]
    paths = sorted(path for path in folder.rglob("*.csv") if path.parent.name != "anomaly-free")
    if not paths:
        raise SystemExit(f"{folder}: no csv file outside anomaly-free")
    files = [load_skab(path) for path in paths]
    truths = [truth[_FIRST:] for _, truth in files]
    began = time.perf_counter()
    by_first = [scores(values[:_FIRST], values[_FIRST:]) for values, _ in files]
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {
        "threshold": threshold,
        "files": len(files),
        "rows": int(sum(map(len, truths))),
        "first_400": summary([score >= threshold for score in by_first], truths),
    }
    if recordings:
        known = np.concatenate(recordings)[-_MEMORY:]
        by_recording = [scores(known, values[_FIRST:]) for values, _ in files]
        result["anomaly_free"] = summary([score >= threshold for score in by_recording], truths)
    result["everything_anomalous"] = summary([np.ones(len(truth), dtype=np.bool_) for truth in truths], truths)
    levels = np.quantile(np.concatenate(by_first), np.linspace(0, 0.995, 200))
    reached = [
        rates(np.sum([counts(s >= level, t) for s, t in zip(by_first, truths, strict=True)], axis=0))
        for level in levels
    ]
    place = int(np.argmax([each["f1"] for each in reached]))
    result["best_threshold"] = {"threshold": round(float(levels[place]), 3)}
    result["best_threshold"] |= {name: round(float(value), 3) for name, value in reached[place].items()}
    result["us_per_point"] = round(1e6 * seconds / sum(len(values) for values, _ in files), 1)
    result["machine"] = {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()}
    result["versions"] = {"numpy": version("numpy")}
    result["date"] = datetime.now(UTC).date().isoformat()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge Shoal's detector row by row on files laid out like SKAB's.")
    parser.add_argument("--data", type=Path, default=_DATA, help="(default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=_THRESHOLD, help="(default: %(default)s)")
    options = parser.parse_args()
    result = measure(options.data, options.threshold)
    if options.data.resolve() == _DATA.resolve() and options.threshold == _THRESHOLD:
        _RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
