"""What pruning and int8 make of four networks, in three runtimes: bytes, speed and what they cost in quality.

    make bench-compression                      (10 to 15 minutes on 2 cores)
    python -m benchmarks.compression --draw     (only table and picture, from the JSON that is there)

Networks: see `compression_subjects.py`. Variants of each: `float`; `pruned`, half of the channels taken out and the rest
fine-tuned; `int8`, static; `pruned_int8`, both; `zeroed` (CNN), 30 % of the weights set to zero; `mixed`, only where int8
costs more than its limit: the nodes that hurt stay float. Runtimes: `onnx` is ONNX Runtime, `litert` LiteRT, `tflite_runtime`
tflite-runtime in its own environment; the last two run the same file. One thread, batch 1; `batch8_speed_ratio` is ONNX
Runtime with 8 rows a call. `torch_dynamic` is torch on TorchScript, float against int8 linear layers.

Figures, each against `float` in the same runtime:
- size_ratio: bytes of float / bytes of the variant; exact, so both ends of its interval are the figure;
- zstd_bytes: of the file, packed at level 19;
- speed_ratio: time of a call of float / of the variant: all variants of a runtime take turns, the median of the rounds'
  ratios, 95 % percentile bootstrap over rounds;
- metric, metric_drop: on rows that neither training nor calibration saw; a drop is of paired rows, bootstrap over rows. That
  of ResNet-18 is agreement with the float network, of `pruned_int8` with the pruned one;
- ships: what the gate (`cloud.gate.choose`) would ship of a precision and its float, and why.

`NETWORK.RUNTIME` starts with the figures of int8, `NETWORK.VARIANT` holds the worst of all runtimes. The last line is all of
it as JSON.
"""

import argparse
import io
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.compression_report import draw, table
from benchmarks.compression_subjects import MAKERS, NAMES, Subject
from cloud import gate
from cloud.export import to_onnx, to_tflite, to_torch_dynamic
from cloud.measure import Interval, interleave, metric_interval, repeats_for, speed_ratio, zstd_bytes
from cloud.mixed import find_mixed, rank_nodes, signal_to_noise_db
from cloud.quantize import onnx_nodes, quantize_onnx, tflite_operations, tflite_quantizer
from cloud.tflite_child import ask_child

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results" / "compression.json"
_PICTURE = _ROOT / "docs" / "img" / "compression.svg"
_DEVICE_PYTHON = _ROOT / ".venv-device" / "bin" / "python"
_PACKAGES = ("torch", "torch-pruning", "onnxruntime", "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "numpy")
_FLOAT_OF = {
    "float": "float",
    "pruned": "pruned",
    "zeroed": "zeroed",
    "int8": "float",
    "pruned_int8": "pruned",
    "mixed": "float",
}
_INT8 = ("int8", "pruned_int8", "mixed")
_KNEE = 8
_MAX_TRIES = 6
_CHILD_TIMEOUT_S = 300.0

Figures = dict[str, Any]
Rows = NDArray[np.float32]
OfRows = Callable[[NDArray[np.int64]], float]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one runtime made of artefacts: outputs by variant on the test rows, and times in (rounds, variants)."""

    outputs: Mapping[str, NDArray[np.float32]]
    taken_ns: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Effort:
    rounds: int
    turn_s: float
    seed: int


def artefacts(subject: Subject, *, tflite: bool, say: Say) -> dict[str, bytes]:
    """All variants in one format; `mixed` where int8 misses the limit on the rows that training held out."""
    export = to_tflite if tflite else to_onnx
    models = {variant: export(module, subject.shape) for variant, module in subject.modules.items()}
    quantizers = {
        variant: tflite_quantizer(models[variant], subject.calibration)
        if tflite
        else partial(quantize_onnx, models[variant], subject.calibration)
        for variant in ("float", "pruned")
    }
    models["int8"], models["pruned_int8"] = quantizers["float"](()), quantizers["pruned"](())
    metric = subject.search_metric
    if metric is None:
        return models
    load = gate.tflite_runner if tflite else gate.onnx_runner
    everything = np.arange(len(subject.search))

    def outputs(model: bytes) -> NDArray[np.float32]:
        return load(model)(subject.search)

    def score(model: bytes) -> float:
        return metric(outputs(model), everything)

    enough = score(models["float"]) - subject.limits.max_drop_from_float
    if score(models["int8"]) >= enough:
        return models
    nodes = tflite_operations(models["float"]) if tflite else onnx_nodes(models["float"])
    ranked = rank_nodes(nodes, quantizers["float"], outputs, outputs(models["float"]))
    found = find_mixed([node for node, _ in ranked], quantizers["float"], score, enough=enough, max_tries=_MAX_TRIES)
    say(f"{subject.name}: int8 misses its limit; float stay {list(found.keep_float)} after {found.tried} tries")
    return models | {"mixed": found.model}


def run_here(models: Mapping[str, bytes], load: Callable[[bytes], gate.Runner], rows: Rows, effort: Effort) -> Answers:
    runners = [load(model) for model in models.values()]
    taken = time_calls(runners, rows[:1], effort)
    return Answers({variant: run_batches(each, rows) for variant, each in zip(models, runners, strict=True)}, taken)


def time_calls(runners: Sequence[gate.Runner], rows: Rows, effort: Effort) -> NDArray[np.float64]:
    calls = [partial(runner, rows) for runner in runners]
    return interleave(calls, rounds=effort.rounds, repeats=repeats_for(calls, effort.turn_s))


def run_batches(runner: gate.Runner, rows: Rows, size: int = 64) -> NDArray[np.float32]:
    return np.concatenate([runner(rows[start : start + size]) for start in range(0, len(rows), size)])


def run_in_child(models: Mapping[str, bytes], rows: Rows, effort: Effort) -> Answers:
    found = ask_child(
        _DEVICE_PYTHON,
        list(models.values()),
        rows,
        rounds=effort.rounds,
        turn_s=effort.turn_s,
        timeout_s=_CHILD_TIMEOUT_S,
    )
    return Answers(dict(zip(models, found.outputs, strict=True)), found.taken_ns)


def describe(subject: Subject, models: Mapping[str, bytes], answers: Answers, effort: Effort) -> Figures:
    """The figures of one runtime."""
    taken = dict(zip(models, answers.taken_ns.T, strict=True))
    variants: Figures = {}
    for variant, model in models.items():
        outputs = answers.outputs[variant]
        metric = partial(subject.metrics[_FLOAT_OF[variant]], outputs)
        exact = subject.metrics[reference := _FLOAT_OF[variant] if subject.search_metric is None else "float"]
        judge, before = partial(exact, outputs), partial(exact, answers.outputs[reference])
        size = len(models["float"]) / len(model)
        variants[variant] = {
            "bytes": len(model),
            "zstd_bytes": zstd_bytes(model),
            **figure("size_ratio", Interval(size, size, size)),
            "latency_us": round(float(np.median(taken[variant])) / 1000, 2),
            **figure("speed_ratio", speed_ratio(taken["float"], taken[variant], effort.seed)),
            **figure("metric", metric_interval(metric, len(outputs), effort.seed, subject.resamples), 4),
            **figure("metric_drop", drop(judge, before, len(outputs), subject, effort.seed), 4),
        }
        if variant in _INT8:
            own = _FLOAT_OF[variant]
            ratio = signal_to_noise_db(answers.outputs[own], outputs)
            choice = gate.choose(report_of(variants[own]), report_of(variants[variant]), subject.limits)
            variants[variant] |= {
                "signal_to_noise_db": round(ratio, 1),
                "ships": variant if choice.int8 else own,
                "reason": choice.reason,
            }
    of_int8: Figures = variants["int8"]
    return of_int8 | {"variants": variants}


def drop(judge: OfRows, before: OfRows, rows: int, subject: Subject, seed: int) -> Interval:
    return metric_interval(lambda drawn: before(drawn) - judge(drawn), rows, seed, subject.resamples)


def report_of(figures: Figures) -> gate.ArtefactReport:
    return gate.ArtefactReport(figures["metric"], figures["latency_us"], figures["bytes"])


def figure(name: str, found: Interval, digits: int = 3) -> Figures:
    return {name: round(found.value, digits), f"{name}_ci": [round(found.low, digits), round(found.high, digits)]}


def measure_dynamic(subject: Subject, effort: Effort) -> Figures:
    """Torch alone: TorchScript with float against int8 linear layers."""
    module = subject.modules["float"]
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "`torch.jit.", DeprecationWarning)
        torch.jit.save(torch.jit.trace(module, torch.zeros(2, *subject.shape)), file)
        models = [file.getvalue(), to_torch_dynamic(module, subject.shape)]
        scripts = [torch.jit.load(io.BytesIO(model)) for model in models]
        torch.set_num_threads(1)
        runners = [lambda rows, each=each: each(torch.from_numpy(rows)).numpy() for each in scripts]
        taken = time_calls(runners, subject.rows[:1], effort)
        outputs = [run_batches(runner, subject.rows) for runner in runners]
    size = len(models[0]) / len(models[1])
    before, judge = (partial(subject.metrics["float"], each) for each in outputs)
    return {
        "bytes": len(models[1]),
        **figure("size_ratio", Interval(size, size, size)),
        **figure("speed_ratio", speed_ratio(taken[:, 0], taken[:, 1], effort.seed)),
        **figure("metric_drop", drop(judge, before, len(subject.rows), subject, effort.seed), 4),
    }


def measure_subject(subject: Subject, effort: Effort, say: Say) -> Figures:
    result: Figures = {"metric": subject.metric_name, "rows": len(subject.rows)}
    models = artefacts(subject, tflite=False, say=say)
    result["onnx"] = describe(subject, models, run_here(models, gate.onnx_runner, subject.rows, effort), effort)
    knee = time_calls([gate.onnx_runner(models[each]) for each in ("float", "int8")], subject.rows[:_KNEE], effort)
    result["onnx"] |= figure("batch8_speed_ratio", speed_ratio(knee[:, 0], knee[:, 1], effort.seed))
    models = artefacts(subject, tflite=True, say=say)
    result["litert"] = describe(subject, models, run_here(models, gate.tflite_runner, subject.rows, effort), effort)
    if _DEVICE_PYTHON.exists():
        result["tflite_runtime"] = describe(subject, models, run_in_child(models, subject.rows, effort), effort)
    else:
        say(f"tflite-runtime: left out, {_DEVICE_PYTHON} is not there (make venv-device)")
        result["tflite_runtime"] = {"left_out": "no .venv-device"}
    result["torch_dynamic"] = measure_dynamic(subject, effort)
    return result | worst_of(result)


def worst_of(result: Figures) -> Figures:
    """Of each variant the smallest ratios and the largest drop of all runtimes, each with its own interval."""
    runtimes = [each["variants"] for each in result.values() if isinstance(each, dict) and "variants" in each]
    worst: Figures = {}
    for variant in {name: None for runtime in runtimes for name in runtime if name != "float"}:
        measured = [runtime[variant] for runtime in runtimes if variant in runtime]
        picks = (("size_ratio", min), ("speed_ratio", min), ("metric_drop", max))
        worst[variant] = {}
        for name, pick in picks:
            chosen = pick(measured, key=itemgetter(name))
            worst[variant] |= {name: chosen[name], f"{name}_ci": chosen[f"{name}_ci"]}
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what pruning and int8 do to four networks.")
    parser.add_argument("--quick", action="store_true", help="brief training and few rounds: shows that it runs")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these networks; nothing is stored")
    parser.add_argument("--draw", action="store_true", help="only table and picture, from the JSON that is there")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of training (default: %(default)s)")
    options = parser.parse_args()
    if options.draw:
        result = json.loads(_RESULTS.read_text())
    else:
        effort = Effort(rounds=3 if options.quick else 31, turn_s=0.001 if options.quick else 0.006, seed=options.seed)
        result = measure_all(options.only, effort, 0.05 if options.quick else 1.0, options.threads)
    print(table(result))
    if options.draw or not (options.quick or options.only != NAMES):
        _RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, _PICTURE)
    print(json.dumps(result))
    return 0


def measure_all(names: Sequence[str], effort: Effort, share: float, threads: int) -> Figures:
    result: Figures = {}
    say = partial(print, flush=True)
    for name in names:
        started = time.monotonic()
        subject = MAKERS[name](effort.seed, threads, share)
        made = time.monotonic()
        result[name] = measure_subject(subject, effort, say)
        say(f"{name}: trained in {made - started:.0f} s, measured in {time.monotonic() - made:.0f} s")
    result["machine"] = {"cores": os.cpu_count(), "kind": platform.machine(), "load": round(os.getloadavg()[0], 2)}
    result["versions"] = {package: version(package) for package in _PACKAGES}
    result["date"] = datetime.now(UTC).date().isoformat()
    return result


if __name__ == "__main__":
    sys.exit(main())
