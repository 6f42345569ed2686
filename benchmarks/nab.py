"""The detector `cloud.detectors` on the Numenta Anomaly Benchmark, standard profile, beside the detectors NAB published.

    make bench-nab                                           (half a minute; needs ../shared/data/sensor_nab)
    python benchmarks/nab.py --data FOLDER --threshold 2.2   (other files, everything frozen; prints, writes nothing)
    python benchmarks/nab.py --draw                          (only the picture)

FOLDER has `data/**.csv` and `combined_windows.json`, as NAB has. Each file is run from its first row to its last, once: the
first rows (NAB's probation, 15 % of a file, at most 750) are the warm-up, and a reading's score is made before the next is
looked at. No setting differs between files, except that two follow from the length of probation, which NAB tells every
detector: the warm-up, and the dead time after an alarm, a sixth of it (2.5 % of a file, a quarter of all its windows).

Figures:
- score: all files together at one threshold: the one given, or, as NAB does for every detector, the best for these files;
- interval: 95 % percentile bootstrap over files, at that threshold. Few files: it is wide;
- leave_one_out: each file at the threshold that is best for the others, all together; its own interval likewise;
- plateau: the thresholds around the best where the score stays within 5 points of it;
- baselines: the same probation, dead time and sweep round a Gaussian of all readings so far (distance in deviations), and
  round random numbers. They say how much of the score is the sweep's and the dead time's;
- published: `at_nab_threshold` is summed from the folder's published/*_standard_scores.csv, each detector at the threshold
  that NAB chose for it on all 58 of its files; `same_sweep` was computed by Shoal's maintainers from NAB's published scores
  of each row with the threshold swept on the eight files alone. These rows are not in the folder: it is quoted;
- files: raw score (at most 1 a window), windows found and missed, false alarms; leave_one_out is the raw score there;
- us_per_point: time of one update, one core, all files.
"""

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks import nab_score
from benchmarks.labelled_series import Series, load_nab
from cloud.detectors.novelty import NoveltyConfig, NoveltyDetector

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results" / "nab.json"
_PICTURE = _ROOT / "docs" / "img" / "detectors-nab.svg"
_DATA = _ROOT.parent / "shared" / "data" / "sensor_nab"
_SAME_SWEEP = {"ARTime": 89.0, "contextOSE": 85.0, "windowedGaussian": 83.4, "randomCutForest": 81.3, "numenta": 79.2}
_DEAD_SHARE = 6
_LEVELS = 300
_NEAR_BEST = 5.0
_LEAST_WARM_UP = 72

Scorer = Callable[[Series], NDArray[np.float64]]


def novelty(series: Series) -> NDArray[np.float64]:
    """Score each row by the detector under test."""
    warm_up = max(series.labels.probation, _LEAST_WARM_UP)
    detector = NoveltyDetector(NoveltyConfig(channels=series.values.shape[1], warm_up=warm_up))
    return np.array([detector.update(row) for row in series.values])


def gaussian(series: Series) -> NDArray[np.float64]:
    """Distance from the mean of all rows before, in their deviations, the largest of the channels."""
    rows = series.values - series.values[0]
    seen = np.arange(1, len(rows))[:, None]
    mean = np.cumsum(rows, axis=0)[:-1] / seen
    spread = np.sqrt(np.maximum(np.cumsum(rows * rows, axis=0)[:-1] / seen - mean * mean, 0.0))
    away = np.abs(rows[1:] - mean) / np.maximum(spread, 1e-9)
    return np.concatenate([[0.0], away.max(axis=1)])


def at_random(series: Series) -> NDArray[np.float64]:
    return np.random.default_rng(len(series.values)).random(len(series.values))


@dataclass(frozen=True)
class Run:
    """All files under one scorer: `raw` is (file, level)."""

    series: Sequence[Series]
    scores: Sequence[NDArray[np.float64]]
    judges: Sequence[nab_score.Judge]
    levels: NDArray[np.float64]
    raw: NDArray[np.float64]

    @property
    def windows(self) -> list[int]:
        return [judge.windows for judge in self.judges]

    def alarms(self, place: int, threshold: float) -> NDArray[np.int64]:
        probation = self.series[place].labels.probation
        return nab_score.alarm_rows(self.scores[place], threshold, probation, probation // _DEAD_SHARE)

    def raw_at(self, threshold: float) -> list[float]:
        return [judge.raw(self.alarms(place, threshold)) for place, judge in enumerate(self.judges)]

    def total(self, raw: Sequence[float]) -> float:
        return nab_score.scaled(float(np.sum(raw)), sum(self.windows))


def sweep(series: Sequence[Series], scorer: Scorer) -> Run:
    scores = [scorer(each) for each in series]
    judged = np.concatenate([score[each.labels.probation :] for each, score in zip(series, scores, strict=True)])
    # Thresholds lie close where alarms are rare: from one in five rows to none.
    levels = np.unique(np.quantile(judged, 1.0 - np.geomspace(1e-5, 0.2, _LEVELS)))
    levels = np.append(levels, np.nextafter(judged.max(), np.inf))
    run = Run(series, scores, [nab_score.Judge(each.labels) for each in series], levels, np.empty((0, 0)))
    raw = np.array([run.raw_at(level) for level in levels]).T
    return Run(series, scores, run.judges, levels, raw)


def best(run: Run) -> float:
    return float(run.levels[np.argmax(run.raw.sum(0))])


def summary(run: Run, threshold: float) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    raw = run.raw_at(threshold)
    left_out = run.raw[np.arange(len(run.series)), nab_score.leave_one_out(run.raw)].tolist()
    totals = np.array([run.total(column) for column in run.raw.T])
    good = run.levels[_around(totals >= totals.max() - _NEAR_BEST, int(totals.argmax()))]
    return {
        "score": round(run.total(raw), 1),
        "interval": _rounded(nab_score.bootstrap(raw, run.windows, rng)),
        "leave_one_out": round(run.total(left_out), 1),
        "leave_one_out_interval": _rounded(nab_score.bootstrap(left_out, run.windows, rng)),
        "threshold": round(threshold, 4),
        "swept": {"score": round(float(totals.max()), 1), "threshold": round(best(run), 4)},
        "plateau": [round(float(good[0]), 3), round(float(good[-1]), 3)],
        "files": {
            each.name: _file(run, place, threshold) | {"leave_one_out": round(left_out[place], 3)}
            for place, each in enumerate(run.series)
        },
    }


def _around(flags: NDArray[np.bool_], place: int) -> slice:
    """Return the run of true flags that holds `place`."""
    gaps = np.flatnonzero(~flags)
    after = np.searchsorted(gaps, place)
    return slice(gaps[after - 1] + 1 if after else 0, gaps[after] if after < len(gaps) else len(flags))


def _file(run: Run, place: int, threshold: float) -> dict[str, Any]:
    alarms = run.alarms(place, threshold)
    found, false_alarms = run.judges[place].tell(alarms)
    return {
        "raw": round(run.judges[place].raw(alarms), 3),
        "windows": len(found),
        "found": sum(row is not None for row in found),
        "false_alarms": len(false_alarms),
    }


def _rounded(pair: tuple[float, float]) -> list[float]:
    return [round(value, 1) for value in pair]


def published(folder: Path, series: Sequence[Series]) -> dict[str, dict[str, float]]:
    """What NAB's own detectors reach on just these files; nothing where the folder does not say."""
    names, found = {each.name for each in series}, {}
    windows = sum(nab_score.Judge(each.labels).windows for each in series)
    for path in sorted((folder / "published").glob("*_standard_scores.csv")):
        with path.open(newline="") as file:
            raw = {row["File"]: float(row["Score"]) for row in csv.DictReader(file) if row["File"] in names}
        if len(raw) == len(names):
            detector = path.name.removesuffix("_standard_scores.csv")
            found[detector] = {"at_nab_threshold": round(nab_score.scaled(sum(raw.values()), windows), 1)}
    if found and folder.resolve() == _DATA.resolve():
        for detector, score in _SAME_SWEEP.items():
            found.setdefault(detector, {})["same_sweep"] = score
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def measure(folder: Path, threshold: float | None) -> tuple[dict[str, Any], Run]:
    series = load_nab(folder)
    began = time.perf_counter()
    run = sweep(series, _timed := _Timed(novelty))
    print(f"{len(series)} files, {_timed.rows} rows, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    result = summary(run, best(run) if threshold is None else threshold)
    result["baselines"] = {
        name: {key: figures[key] for key in ("score", "interval", "leave_one_out", "threshold")}
        for name, scorer in (("gaussian_of_all_so_far", gaussian), ("random", at_random))
        for other in [sweep(series, scorer)]
        for figures in [summary(other, best(other))]
    }
    result["published"] = published(folder, series)
    result["us_per_point"] = round(1e6 * _timed.seconds / _timed.rows, 1)
    result["machine"] = {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()}
    result["versions"] = {"numpy": version("numpy")}
    result["date"] = datetime.now(UTC).date().isoformat()
    return result, run


class _Timed:
    """Counts a scorer's rows and seconds."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.rows = 0
        self.seconds = 0.0

    def __call__(self, series: Series) -> NDArray[np.float64]:
        began = time.perf_counter()
        scores = self._scorer(series)
        self.seconds += time.perf_counter() - began
        self.rows += len(scores)
        return scores


def draw(run: Run, threshold: float, path: Path) -> None:
    """One row for each file: readings, labelled windows, alarms."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shoal", "font.size": 7})
    figure = Figure(figsize=(8, 1.1 * len(run.series)), layout="constrained")
    for place, (axes, each) in enumerate(zip(np.ravel(figure.subplots(len(run.series), 1)), run.series, strict=True)):
        values = each.values[:, 0]
        at, shown = _thinned(values)
        axes.plot(at, shown, linewidth=0.4, color="0.4")
        axes.axvspan(0, each.labels.probation, color="0.9", linewidth=0)
        for first, last in each.labels.windows:
            axes.axvspan(first, last, color="C2", alpha=0.3, linewidth=0)
        alarms = run.alarms(place, threshold)
        axes.plot(alarms, values[alarms], "v", color="C3", markersize=4)
        axes.set_title(Path(each.name).stem, loc="left", pad=2, fontsize=7)
        axes.set_xlim(0, len(values))
    figure.savefig(path, metadata={"Date": None})


def _thinned(values: NDArray[np.float64], bins: int = 500) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The least and greatest value of each bin: a line of them looks the same."""
    parts = np.array_split(np.arange(len(values)), min(bins, len(values)))
    at = np.array([row for part in parts for row in sorted({part[values[part].argmin()], part[values[part].argmax()]})])
    return at, values[at]


def main() -> int:
    parser = argparse.ArgumentParser(description="Score Shoal's detector on files laid out like NAB's.")
    parser.add_argument("--data", type=Path, default=_DATA, help="(default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="alarm from here on, chosen elsewhere (default: the best here)")
    parser.add_argument("--draw", action="store_true", help="draw docs/img/detectors-nab.svg")
    options = parser.parse_args()
    result, run = measure(options.data, options.threshold)
    if options.data.resolve() == _DATA.resolve() and options.threshold is None:
        _RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if options.draw:
        draw(run, result["threshold"], _PICTURE)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
