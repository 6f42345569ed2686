"""What a device's upload budget finds: recall against bytes, on real data, with the device's own policy.

    make bench-uplink                   (under a minute; needs the package `river`, and ../shared/data/sensor_nab if there)
    python benchmarks/uplink.py --draw  (only the picture, from the JSON that is there)

Every reading goes through `device_agent.policy.UploadPolicy` as in the agent (take, decide, spend); bytes are those of the
question's row in its message, without MQTT, TLS and TCP. What is compared is what the policy does with a score, so scores
are simple, and no better than they are: see `shuttle_devices` and `nab_devices`.

Policies, at each budget B (a share of the readings):
- all: every reading is asked;
- random: a share B by lot;
- fixed: no budget, and a threshold that a share B of the calibration scores exceeds, as a release's threshold is made;
- budgeted: `max_share = B`, of it a twentieth by lot (`audit_share`), `score_threshold = 0`: the budget alone decides;
- oracle (Shuttle): knows the truth, and asks about B of the readings, anomalies only. Where anomalies are a share A of the
  readings, it finds B / A of them: 28 % at 2 %. This is the most that any policy with this budget could find.

Figures:
- warm-up: a device's first 500 readings of Shuttle, 15 % of a series of NAB (its own probation), are left out of all;
- shuttle.oracle_ratio: anomalies asked by the budgeted policy at 2 % / those an oracle asks with the same budget, or with as
  many questions as the policy really asked, where these are more. Audits are asked from the same budget;
- share_error: |asked / readings / B - 1| of the budgeted policy at 2 %, audits included, all devices together, mean of the
  seeds; worst_device is the largest of any device and seed;
- nab.window_recall: labelled windows of which at least one reading was asked, / all windows, budgeted at 2 %. A window is
  long (29 to 363 readings), so lot alone finds most: the difference shows at smaller budgets;
- shuttle.by_bytes: with `max_bytes_per_day` worth 2 % (29 questions a day) in place of `max_share`; used is what was spent
  a day / the cap, over_cap the most bytes in any 24 hours / the cap, both from the first reading on.

Intervals are 95 % percentile bootstrap: devices or series drawn with replacement, each with one seed's lots.
"""

import argparse
import csv
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from device_agent.policy import PolicyConfig, UploadPolicy
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import Scalars, SensorData, TimeQuality
from simulator.datasets import load_shuttle
from simulator.streams import Share

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results" / "uplink.json"
_PICTURE = _ROOT / "docs" / "img" / "devices-uplink.svg"
_NAB = _ROOT.parent / "shared" / "data" / "sensor_nab"
BUDGETS = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
BUDGET = 0.02
_AUDITS = 1 / 20
_NO_CAP = 10**9
_DAY_S = 86_400.0
_ROW_HEAD_BYTES = 8
_RESAMPLES = 2000
_COLOURS = {"random": "C7", "fixed": "C1", "budgeted": "C0", "oracle": "0.2"}


@dataclass(frozen=True)
class DeviceData:
    """One device's readings. `events` are what must be found: rows of booleans, one row for each anomaly or window."""

    name: str
    scores: NDArray[np.float64]
    calibration: NDArray[np.float64]
    seconds: NDArray[np.float64]
    sizes: NDArray[np.int64]
    warm_up: int
    anomalies: NDArray[np.bool_]
    windows: tuple[NDArray[np.bool_], ...] = ()


def shuttle_devices(devices: int = 10) -> list[DeviceData]:
    """Rows 12,000 on, in the order of flight, dealt to ten devices that read one a minute.

    The score is the largest |z| of the nine channels, with mean and deviation of the normal rows among the first 12,000.
    """
    data = load_shuttle()
    first = np.arange(len(data.values)) < data.stream[0]
    normal = data.values[first & (data.labels == 0)].astype(np.float64)
    mean, std = normal.mean(0), normal.std(0)
    score = lambda rows: np.abs((rows - mean) / std).max(1)  # noqa: E731
    found = []
    for index in range(devices):
        share = Share(index, devices)
        rows = data.stream[share.index :: share.devices]
        values = data.values[rows].astype(np.float64)
        found.append(
            DeviceData(
                f"shuttle-{index}",
                score(values),
                score(normal),
                np.arange(len(rows)) * 60.0,
                question_sizes(values, [f"shuttle/{row}" for row in rows]),
                500,
                data.labels[rows] == 1,
            )
        )
    return found


def nab_devices(folder: Path) -> list[DeviceData]:
    """The eight series, one device each, at their own timestamps.

    The score is the distance from an exponentially weighted mean in weighted deviations (weight 0.02), before the reading
    is learnt. Nothing is trained, nothing was tuned.
    """
    found = []
    for name, windows in json.loads((folder / "combined_windows.json").read_text()).items():
        with (folder / "data" / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        at = np.array([row["timestamp"] for row in rows], dtype="datetime64[s]")
        values = np.array([float(row["value"]) for row in rows])
        scores = ewma_scores(values, 0.02)
        warm_up = round(0.15 * len(rows))
        inside = tuple((np.datetime64(a[:19]) <= at) & (at <= np.datetime64(b[:19])) for a, b in windows)
        sizes = question_sizes(values[:, None], [""] * len(rows))
        seconds = (at - at[0]).astype(np.float64)
        anomalies = np.any(inside, axis=0)
        found.append(DeviceData(name, scores, scores[:warm_up], seconds, sizes, warm_up, anomalies, inside))
    return found


def ewma_scores(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    mean, variance, scores = values[0], 0.0, np.zeros(len(values))
    for index, value in enumerate(values):
        offset = value - mean
        scores[index] = abs(offset) / variance**0.5 if variance > 0 else 0.0
        mean += weight * offset
        variance = (1 - weight) * (variance + weight * offset * offset)
    return scores


def question_sizes(values: NDArray[np.float64], references: list[str]) -> NDArray[np.int64]:
    """Bytes of each reading as a row of a question, as the device sends and counts it."""
    sizes = []
    for seq, (row, reference) in enumerate(zip(values.tolist(), references, strict=True)):
        data = SensorData(
            seq=seq,
            captured_at_us=1_790_000_000_000_000 + seq,
            time_quality=TimeQuality.TIME_QUALITY_SYNCED,
            scalars=Scalars(values=row),
            reference=reference,
        )
        answer = pb.Answer(release=1, score=1.5)
        question = pb.InferenceRow(reading=data, reason=pb.ASK_REASON_SCORE, device_answer=answer)
        sizes.append(question.ByteSize() + _ROW_HEAD_BYTES)
    return np.array(sizes)


# -- policies ----------------------------------------------------------------------------------------------------------

Make = Callable[[DeviceData, float], PolicyConfig]


def _all(_device: DeviceData, _budget: float) -> PolicyConfig:
    return PolicyConfig(audit_share=1.0, max_share=1.0, max_per_minute=_NO_CAP)


def _random(_device: DeviceData, budget: float) -> PolicyConfig:
    return PolicyConfig(budget, budget, _NO_CAP, score_threshold=float("inf"))


def _fixed(device: DeviceData, budget: float) -> PolicyConfig:
    threshold = float(np.quantile(device.calibration, 1 - budget))
    return PolicyConfig(0.0, 1.0, _NO_CAP, score_threshold=threshold)


def _budgeted(_device: DeviceData, budget: float) -> PolicyConfig:
    return PolicyConfig(_AUDITS * budget, budget, _NO_CAP, score_threshold=0.0)


def bytes_a_day(device: DeviceData, budget: float) -> int:
    readings_a_day = _DAY_S / float(np.median(np.diff(device.seconds)))
    return max(1, round(budget * readings_a_day * float(np.median(device.sizes))))


def _by_bytes(device: DeviceData, budget: float) -> PolicyConfig:
    return PolicyConfig(
        _AUDITS, 1.0, _NO_CAP, max_bytes_per_day=bytes_a_day(device, budget), score_threshold=0.0
    )  # audits are thinned with the share


POLICIES: dict[str, Make] = {"random": _random, "fixed": _fixed, "budgeted": _budgeted}


def ask(config: PolicyConfig, device: DeviceData, seed: int) -> NDArray[np.bool_]:
    """Lead every reading through a policy as the agent does; which were asked."""
    policy = UploadPolicy(config)
    chances = np.random.default_rng(seed).random(len(device.scores)).tolist()
    asked = []
    rows = zip(device.scores.tolist(), chances, device.seconds.tolist(), device.sizes.tolist(), strict=True)
    for score, chance, now, size in rows:
        audit = policy.take(chance, now)
        choice = policy.decide(score, 0.0, audit=audit)
        asked.append(choice.is_ask and policy.spend(size, now))
    return np.array(asked)


class Tally:
    """Sums after the warm-up for each device and seed: (devices, seeds) arrays."""

    def __init__(self, devices: list[DeviceData], make: Make, budget: float, seeds: int) -> None:
        shape = (len(devices), seeds)
        self.asked, self.anomalies_found, self.windows_found, self.bytes = (np.zeros(shape) for _ in range(4))
        self.readings, self.anomalies, self.windows, self.all_bytes = (np.zeros(len(devices)) for _ in range(4))
        self.over_cap: list[float] = []
        self.used: list[float] = []
        for place, device in enumerate(devices):
            counted = np.arange(len(device.scores)) >= device.warm_up
            self.readings[place] = counted.sum()
            self.anomalies[place] = (counted & device.anomalies).sum()
            self.windows[place] = len(device.windows)
            self.all_bytes[place] = device.sizes[counted].sum()
            config = make(device, budget)
            for seed in range(seeds):
                mask = ask(config, device, 1000 * place + seed)
                if config.max_bytes_per_day:
                    self.over_cap.append(_most_in_a_day(device, mask) / config.max_bytes_per_day)
                    days = device.seconds[-1] / _DAY_S
                    self.used.append(device.sizes[mask].sum() / days / config.max_bytes_per_day)
                mask &= counted
                self.asked[place, seed] = mask.sum()
                self.anomalies_found[place, seed] = (mask & device.anomalies).sum()
                self.windows_found[place, seed] = sum(bool((mask & window).any()) for window in device.windows)
                self.bytes[place, seed] = device.sizes[mask].sum()

    def point(self, statistic: Callable[[Any], Any]) -> dict[str, Any]:
        """The mean of the seeds and its interval; `statistic` takes sums over devices."""
        names = ("asked", "anomalies_found", "windows_found", "bytes", "readings", "anomalies", "windows", "all_bytes")

        def sums(places: NDArray[np.int64], seeds: NDArray[np.int64]) -> argparse.Namespace:
            values = {name: getattr(self, name) for name in names}
            return argparse.Namespace(
                **{name: (v[places, seeds] if v.ndim == 2 else v[places]).sum() for name, v in values.items()}
            )

        devices, seeds = self.asked.shape
        everyone = np.arange(devices)
        value = np.mean([statistic(sums(everyone, np.full(devices, seed))) for seed in range(seeds)])
        rng = np.random.default_rng(1)
        draws = [
            statistic(sums(rng.integers(devices, size=devices), rng.integers(seeds, size=devices)))
            for _ in range(_RESAMPLES)
        ]
        low, high = np.percentile(draws, [2.5, 97.5])
        return {"value": round(float(value), 4), "ci": [round(float(low), 4), round(float(high), 4)]}

    def share_errors(self, budget: float) -> dict[str, float]:
        pooled = np.abs(self.asked.sum(0) / self.readings.sum() / budget - 1)
        each = np.abs(self.asked / self.readings[:, None] / budget - 1)
        return {"share_error": round(float(pooled.mean()), 4), "worst_device": round(float(each.max()), 4)}


def _most_in_a_day(device: DeviceData, mask: NDArray[np.bool_]) -> float:
    at, total = device.seconds[mask], np.concatenate([[0], np.cumsum(device.sizes[mask])])
    begins = np.searchsorted(at, at - _DAY_S, side="right")
    return float((total[1:] - total[begins]).max(initial=0))


def measure(devices: list[DeviceData], seeds: int) -> dict[str, Any]:
    recall, cost, oracle = _recall(devices), lambda s: s.bytes / s.all_bytes, _oracle_ratio
    curves: dict[str, Any] = {}
    for name, make in POLICIES.items():
        for budget in BUDGETS:
            tally = Tally(devices, make, budget, seeds)
            point = {"recall": tally.point(recall), "bytes": tally.point(cost)}
            curves.setdefault(name, {})[str(budget)] = point
            if (name, budget) == ("budgeted", BUDGET):
                result = tally.share_errors(budget)
                ratio = tally.point(oracle)
    everything = Tally(devices, _all, 1.0, 1)
    at_budget = {name: curves[name][str(BUDGET)] for name in POLICIES}
    result["at_2_percent"] = {
        name: {"recall": point["recall"]["value"], "bytes": point["bytes"]["value"]}
        for name, point in at_budget.items()
    }
    result["at_2_percent"]["all"] = {"recall": everything.point(recall)["value"], "bytes": 1.0}
    shared = {**result, "bytes_all": int(everything.bytes.sum()), "readings": int(everything.readings.sum())}
    if devices[0].windows:
        found = at_budget["budgeted"]["recall"]
        shared |= {"window_recall": found["value"], "window_recall_ci": found["ci"]}
        shared |= {"windows": int(everything.windows.sum())}
    else:
        share = everything.anomalies.sum() / everything.readings.sum()
        by_bytes = Tally(devices, _by_bytes, BUDGET, seeds)
        shared["by_bytes"] = {
            "used": round(float(np.mean(by_bytes.used)), 4),
            "over_cap": round(max(by_bytes.over_cap), 4),
            "oracle_ratio": by_bytes.point(oracle)["value"],
        }
        shared |= {"oracle_ratio": ratio["value"], "oracle_ratio_ci": ratio["ci"], "anomaly_share": round(share, 4)}
        curves["oracle"] = {str(budget): {"recall": {"value": min(1.0, budget / share)}} for budget in BUDGETS}
    return {"figures": shared, "curves": curves}


def _recall(devices: list[DeviceData]) -> Callable[[Any], Any]:
    if devices[0].windows:
        return lambda s: s.windows_found / s.windows
    return lambda s: s.anomalies_found / s.anomalies


def _oracle_ratio(sums: Any) -> Any:
    return sums.anomalies_found / min(sums.anomalies, max(sums.asked, BUDGET * sums.readings))


def auc(devices: list[DeviceData]) -> float:
    """How well the score alone tells anomalies, over all devices: the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    truth, scores = (np.concatenate([getattr(d, name) for d in devices]) for name in ("anomalies", "scores"))
    return round(float(roc_auc_score(truth, scores)), 4)


def measure_all(seeds: int, nab: Path) -> dict[str, Any]:
    sets = {"shuttle": shuttle_devices()}
    if nab.is_dir():
        sets["nab"] = nab_devices(nab)
    else:
        print(f"nab: left out, {nab} is not there", flush=True)
    result: dict[str, Any] = {"budget": BUDGET, "seeds": seeds, "curves": {}}
    for name, devices in sets.items():
        measured = measure(devices, seeds)
        result[name] = measured["figures"]
        if name == "shuttle":
            result[name]["score_auc"] = auc(devices)
        result["curves"][name] = measured["curves"]
        print(f"{name}: {json.dumps(result[name])}", flush=True)
    result["machine"] = {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()}
    result["versions"] = {name: version(name) for name in ("numpy", "river", "protobuf")}
    result["date"] = datetime.now(UTC).date().isoformat()
    return result


# -- picture -----------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any], path: Path) -> None:
    # Text as text: small files, in the reader's own font; and the same bytes for the same figures.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shoal", "font.size": 9, "axes.grid": True})
    figure = Figure(figsize=(8, 3.4), layout=ConstrainedLayoutEngine(rect=(0, 0.06, 1, 0.94)))  # above its caption
    curves = result["curves"]
    found = {"shuttle": "Shuttle: anomalies asked, %", "nab": "NAB: windows with a reading asked, %"}
    for axes, name in zip(np.ravel(figure.subplots(1, len(curves))), curves, strict=True):
        for policy, points in curves[name].items():
            _line(axes, policy, points)
        axes.plot([100], [100], "s", markersize=4, color="0.2", label="all", clip_on=False)
        axes.axvline(100 * result["budget"], color="0.6", linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlim(0.08, 100)
        axes.set_xticks([0.1, 0.5, 2, 10, 100], ["0.1", "0.5", "2", "10", "100"])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.set_xlabel("bytes asked, % of asking about all")
        axes.set_ylabel(found[name])
        axes.legend()
    note = f"{result['seeds']} seeds, 95 % bootstrap, {result['date']}"
    figure.text(0.995, 0.005, note, ha="right", fontsize=7, color="0.5")
    figure.savefig(path, metadata={"Date": None})


def _line(axes, policy: str, points: dict[str, Any]) -> None:
    recall = [100 * point["recall"]["value"] for point in points.values()]
    if policy == "oracle":
        axes.plot([100 * float(budget) for budget in points], recall, "--", color=_COLOURS[policy], label=policy)
        return
    spent = [100 * point["bytes"]["value"] for point in points.values()]
    low, high = zip(*(np.multiply(point["recall"]["ci"], 100) for point in points.values()), strict=True)
    axes.fill_between(spent, low, high, color=_COLOURS[policy], alpha=0.2, linewidth=0)
    axes.plot(spent, recall, "o-", markersize=3, color=_COLOURS[policy], label=policy)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure recall against bytes of the device's upload policies.")
    parser.add_argument("--draw", action="store_true", help="only draw, from the JSON that is there")
    parser.add_argument("--seeds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--nab", type=Path, default=_NAB, help="folder of the NAB series (default: %(default)s)")
    options = parser.parse_args()
    if not options.draw:
        result = measure_all(options.seeds, options.nab)
        _RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(_RESULTS.read_text())
    draw(result, _PICTURE)
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
