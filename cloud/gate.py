"""What stands between a trained model and the fleet.

Artefacts are scored as the bytes that ship, in the runtimes that they ship to, on rows that training never saw. The
decisions (`choose`, `passes`, the thresholds) are pure functions of what was measured.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from cloud.measure import interleave
from cloud.tasks.base import GateLimits, RecallRule, ShareRule
from shoal.errors import ModelError
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb

# Maps scaled rows (n, *shape) to outputs (n, ...), both float32.
Runner: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_GOLDEN_ROWS = 8
_INT8_STEPS = 255
# int8 kernels round differently: tflite-runtime 2.14 and LiteRT 2.3 were up to 2 steps apart on 1,000 rows.
_GOLDEN_STEPS = 4
# Of the largest output: what float32 sums differ by when added in another order, with room.
_GOLDEN_FLOAT_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class ArtefactReport:
    """What one artefact measured.

    Attributes:
        metric: the task's, on held-out rows.
        latency_us: time of one call in its fastest round.
        size_bytes: of the file.
    """

    metric: float
    latency_us: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    int8: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    reason: str


def choose(float_report: ArtefactReport, int8_report: ArtefactReport, limits: GateLimits) -> Choice:
    """Decide which precision ships: int8 must keep the metric, must not be slower, and must be faster or smaller.

    Faster and slower mean by more than timing varies, or the choice would be a coin's.
    """
    gain = int8_report.metric - float_report.metric
    slowdown = int8_report.latency_us / float_report.latency_us
    shrink = float_report.size_bytes / int8_report.size_bytes
    measured = f"metric {gain:+.4f}, {slowdown:.2f}x latency, {shrink:.2f}x smaller"
    if -gain > limits.max_drop_from_float:
        return Choice(int8=False, reason=f"int8 loses more than {limits.max_drop_from_float}: {measured}")
    if int8_report.metric < limits.min_metric <= float_report.metric:
        return Choice(int8=False, reason=f"int8 falls below {limits.min_metric}: {measured}")
    if slowdown > limits.max_slowdown:
        return Choice(int8=False, reason=f"int8 is slower: {measured}")
    if slowdown * limits.max_slowdown >= 1 and shrink <= 1:
        return Choice(int8=False, reason=f"int8 is neither faster nor smaller: {measured}")
    return Choice(int8=True, reason=f"int8: {measured}")


def passes(report: ArtefactReport, parent_metric: float | None, limits: GateLimits) -> Verdict:
    """Decide whether an artefact may be released.

    Args:
        report: of the artefact that would ship.
        parent_metric: of the artefact in the field, on the same rows; None for a first release.
        limits: of the tier.
    """
    if not report.metric >= limits.min_metric:
        return Verdict(ok=False, reason=f"metric {report.metric:.4f}, expected at least {limits.min_metric}")
    if report.size_bytes > limits.max_bytes:
        return Verdict(ok=False, reason=f"{report.size_bytes} bytes, expected at most {limits.max_bytes}")
    against = "" if parent_metric is None else f", parent {parent_metric:.4f} on the same rows"
    if parent_metric is not None and parent_metric - report.metric > limits.max_drop_from_parent:
        return Verdict(ok=False, reason=f"metric {report.metric:.4f}{against}")
    return Verdict(ok=True, reason=f"metric {report.metric:.4f}{against}")


def choose_thresholds(
    rule: RecallRule | ShareRule,
    device: NDArray[np.float32],
    gateway: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> tuple[float, float]:
    """Return the device's and the gateway's threshold from both models' scores on the same held-out rows.

    Raises:
        ModelError: the rule wants anomalies that the rows or the device's answers do not hold.
    """
    if isinstance(rule, ShareRule):
        return threshold_for_share(device, rule.device), threshold_for_share(gateway, rule.gateway)
    anomalies = labels == 1
    total = int(anomalies.sum())
    device_threshold = threshold_for_count(device, anomalies, math.ceil(rule.device * total))
    asked = device > np.float32(device_threshold)
    # Only what the device asks reaches the gateway, so only that can still be found or falsely reported.
    gateway_threshold = threshold_for_count(gateway[asked], anomalies[asked], math.ceil(rule.cascade * total))
    return device_threshold, gateway_threshold


def threshold_for_count(scores: NDArray[np.float32], wanted: NDArray[np.bool_], count: int) -> float:
    """Return the highest threshold that at least `count` wanted rows exceed, hence the one with fewest other rows.

    Raises:
        ModelError: no wanted row is asked for, or there are too few, or their scores are 0.
    """
    ranked = np.sort(scores[wanted])[::-1]
    if not 0 < count <= len(ranked) or ranked[count - 1] <= 0:
        raise ModelError(f"no threshold can find {count} of {len(ranked)} anomalies")
    return _below(ranked[count - 1], scores)


def threshold_for_share(scores: NDArray[np.float32], share: float) -> float:
    """Return the lowest threshold that at most this share of rows exceeds.

    Raises:
        ValueError: the share leaves nothing below, or there are no rows.
    """
    allowed = math.floor(share * len(scores))
    if not 0 <= allowed < len(scores):
        raise ValueError(f"share {share} of {len(scores)} rows, expected less than all")
    highest_kept = np.sort(scores)[::-1][allowed]
    above = scores[scores > highest_kept]
    return _below(above.min(), scores) if len(above) else float(highest_kept)


def _below(score: np.float32, scores: NDArray[np.float32]) -> float:
    """Return the float32 halfway between `score` and the next lower one, so that rounding does not flip a row."""
    lower = scores[scores < score]
    floor = lower.max() if len(lower) else np.float32(0)
    middle = np.float32((float(score) + float(floor)) / 2)
    return float(middle if middle < score else floor)


def onnx_runner(model: bytes) -> Runner:
    """Load an ONNX artefact as a gateway does: one thread, no spinning.

    Raises:
        ModelError: ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise ModelError(f"ONNX Runtime refuses the artefact: {exc}") from exc
    name = session.get_inputs()[0].name

    def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {name: rows})[0], dtype=np.float32)

    return run


def tflite_runner(model: bytes) -> Runner:
    """Load a TFLite artefact as a device does: batch 1, one thread.

    Raises:
        ModelError: LiteRT refuses it, or it does not take and return float32.
    """
    try:
        interpreter = Interpreter(model_content=model, num_threads=1)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as exc:
        raise ModelError(f"LiteRT refuses the artefact: {exc}") from exc
    (source,), (sink,) = interpreter.get_input_details(), interpreter.get_output_details()
    if (source["dtype"], sink["dtype"]) != (np.float32, np.float32):
        raise ModelError(f"artefact maps {source['dtype']} to {sink['dtype']}, expected float32 to float32")

    def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = np.empty((len(rows), *sink["shape"][1:]), dtype=np.float32)
        for index in range(len(rows)):
            interpreter.set_tensor(source["index"], rows[index : index + 1])
            interpreter.invoke()
            outputs[index] = interpreter.get_tensor(sink["index"])[0]
        return outputs

    return run


def load_runner(model: bytes, model_format: pb.ModelFormat) -> Runner:
    """Load an artefact in the runtime of its format.

    Raises:
        ModelError: the runtime refuses it, or there is none for it.
    """
    if model_format == pb.MODEL_FORMAT_ONNX:
        return onnx_runner(model)
    if model_format == pb.MODEL_FORMAT_TFLITE:
        return tflite_runner(model)
    raise ModelError(f"no runtime for model format {model_format}")


def measure_latency_us(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 20,
    repeats: int = 20,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> list[float]:
    """Time calls against each other; return each one's fastest round, as a mean over its repeats.

    The calls take turns, and the fastest round is the one that nobody else's work fell into: what a call costs is a
    property of the artefact, what it waits for is not.
    """
    taken = interleave(calls, rounds=rounds, repeats=[repeats] * len(calls), clock_ns=clock_ns)
    return [float(fastest) / 1000 for fastest in taken.min(axis=0)]


def golden_vectors(
    runner: Runner, rows: NDArray[np.float32], *, int8: bool, count: int = _GOLDEN_ROWS
) -> pb.GoldenVectors:
    """Record what the artefact's own runtime answers to the first `count` of scaled rows (n, *shape).

    The tolerance of int8 is a few steps of the output's scale, taken from the span of the outputs on all rows, which
    is what calibration fitted its 255 steps to.
    """
    outputs = runner(rows)
    if int8:
        tolerance = _GOLDEN_STEPS * float(np.ptp(outputs)) / _INT8_STEPS
    else:
        tolerance = _GOLDEN_FLOAT_SHARE * max(1.0, float(np.abs(outputs[:count]).max()))
    return pb.GoldenVectors(inputs=to_tensor(rows[:count]), outputs=to_tensor(outputs[:count]), tolerance=tolerance)
