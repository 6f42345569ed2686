"""Writes a folder laid out like NAB's, of series made up by kind: what a threshold chosen on NAB's eight does elsewhere.

    python benchmarks/nab_synthetic.py --out FOLDER && python benchmarks/nab.py --data FOLDER --threshold 2.3

Made up by the detector's own author, so it shows where the detector fails rather than how good it is: servers, queues,
machines and seasons with spikes, steps, stops and missing periods, and four series without an anomaly, in which every alarm
is a false one. Windows share a tenth of a file and lie around what was put in, as NAB's do.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator
Made = tuple[NDArray[np.float64], list[int]]
_ROWS = 4032
_DAY = 288
_START = np.datetime64("2024-01-01T00:00:00")


def _working_day(rng: Rng) -> NDArray[np.float64]:
    phase = np.arange(_ROWS) % _DAY / _DAY
    return 40.0 + 3.0 * rng.random(_ROWS) + np.where((phase > 0.35) & (phase < 0.75), 40.0, 0.0)


def missing_day(rng: Rng) -> Made:
    values = _working_day(rng)
    values[11 * _DAY : 12 * _DAY] = 40.0 + 3.0 * rng.random(_DAY)
    return values, [11 * _DAY + 144]


def high_day(rng: Rng) -> Made:
    values = _working_day(rng)
    values[10 * _DAY + 100 : 10 * _DAY + 216] += 40.0
    return values, [10 * _DAY + 158]


def denser_pulses(rng: Rng) -> Made:  # noqa: ARG001 - as the others
    values = np.zeros(_ROWS)
    values[::24] = 20.0
    values[2700:3000:6] = 20.0
    return values, [2850]


def idle_server(rng: Rng) -> Made:
    values = 0.1 + 0.02 * rng.normal(size=_ROWS)
    values[rng.choice(_ROWS, 60, replace=False)] += rng.exponential(0.8, 60)
    values[2500] += 2.5
    values[3500:] += 0.15
    return values, [2500, 3500]


def busy_server(rng: Rng) -> Made:
    values = 45.0 + 3.0 * rng.normal(size=_ROWS)
    values[1500] = 98.0
    values[2900:] -= 20.0
    return values, [1500, 2900]


def disk(rng: Rng) -> Made:
    values = 1e6 * rng.exponential(1.0, _ROWS) ** 2
    values[3000:3030] += 6e7
    return values, [3000]


def requests(rng: Rng) -> Made:
    values = 60.0 * (1 + np.sin(2 * np.pi * np.arange(_ROWS) / _DAY)) * rng.gamma(3, 1 / 3, _ROWS)
    values[1800:1812] *= 5.0
    values[3300:3310] += 450.0
    return values, [1800, 3300]


def machine(rng: Rng) -> Made:
    steps = rng.normal(size=8000)
    for row in range(1, 8000):
        steps[row] += 0.995 * steps[row - 1]
    values = 85.0 + 0.6 * steps
    values[4000:4120] -= np.interp(np.arange(120), [0, 60, 119], [0.0, 45.0, 0.0])
    values[6500:6600] -= 30.0
    return values, [4050, 6550]


def taxis(rng: Rng) -> Made:
    at = np.arange(6000)
    daily = 8000 * np.sin(2 * np.pi * at / 48 - 2) + 4000 * np.sin(4 * np.pi * at / 48)
    values = 15000 + daily + 2000 * np.sin(2 * np.pi * at / 336) + 600 * rng.normal(size=6000)
    values[3000:3048] *= 0.6
    values[4400:4424] *= 1.5
    values[5200:5300] *= 0.55
    return values, [3024, 4412, 5250]


def mentions(rng: Rng) -> Made:
    rate = 20 * (1.2 + np.sin(2 * np.pi * np.arange(8000) / _DAY))
    values = rng.poisson(rate * rng.gamma(2, 0.5, 8000)).astype(np.float64)
    values[rng.choice(8000, 15, replace=False)] += rng.exponential(150, 15)
    for start in (3000, 5000, 6500):
        values[start : start + 30] += np.linspace(900, 50, 30)
    return values, [3000, 5000, 6500]


def latency(rng: Rng) -> Made:
    values = 45.0 + 2.0 * rng.normal(size=_ROWS) + rng.exponential(1.0, _ROWS)
    values[1700], values[2700] = 70.0, 90.0
    values[3600:3700] += 12.0
    return values, [1700, 2700, 3650]


def faster_wave(rng: Rng) -> Made:
    at = np.arange(_ROWS)
    values = np.sin(2 * np.pi * at / 60)
    values[2500:2620] = np.sin(2 * np.pi * at[2500:2620] / 25)
    return values + 0.05 * rng.normal(size=_ROWS), [2560]


def noise(rng: Rng) -> Made:
    return 20.0 + rng.normal(size=_ROWS), []


def working_days(rng: Rng) -> Made:
    return _working_day(rng), []


def square_wave(rng: Rng) -> Made:  # noqa: ARG001 - as the others
    return np.where(np.arange(_ROWS) % _DAY < 100, 80.0, 20.0), []


def flat_line(rng: Rng) -> Made:  # noqa: ARG001 - as the others
    return np.full(_ROWS, 45.0), []


KINDS: tuple[Callable[[Rng], Made], ...] = (
    *(missing_day, high_day, denser_pulses, idle_server, busy_server, disk, requests, machine, taxis, mentions),
    *(latency, faster_wave, noise, working_days, square_wave, flat_line),
)


def make(seeds: range) -> Iterator[tuple[str, NDArray[np.float64], list[tuple[int, int]]]]:
    """Yield name, values and windows as rows, one of each kind for each seed."""
    for seed in seeds:
        for kind in KINDS:
            values, centres = kind(np.random.default_rng(seed))
            half = len(values) // 20 // max(len(centres), 1)
            windows = [(centre - half, min(centre + half, len(values) - 1)) for centre in centres]
            yield f"{kind.__name__}/{seed}.csv", values, windows


def main() -> int:
    parser = argparse.ArgumentParser(description="Write made-up series laid out like NAB's.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="series of each kind (default: %(default)s)")
    options = parser.parse_args()
    labels = {}
    for name, values, windows in make(range(options.seeds)):
        at = [str(_START + np.timedelta64(5 * row, "m")).replace("T", " ") for row in range(len(values))]
        path = options.out / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{when},{value:.6g}\n" for when, value in zip(at, values, strict=True))
        path.write_text("timestamp,value\n" + rows)
        labels[name] = [[at[first], at[last]] for first, last in windows]
    (options.out / "combined_windows.json").write_text(json.dumps(labels, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
