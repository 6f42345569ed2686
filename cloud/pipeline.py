"""One release from start to end: train, export, quantize, gate. Writes nothing but checkpoints in its work folder."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloud import gate
from cloud.tasks.base import LabelledSamples, RecallRule, Task, TrainingData
from shoal.errors import ModelError
from shoal.release.probation import measure_baseline
from shoal.scoring import scale, score_rows
from shoal.v1 import release_pb2 as pb

# What every MQTT broker lets through; DESIGN.md section 2.
CHUNK_BYTES = 64 * 1024
TIERS: Mapping[pb.Tier, tuple[str, pb.ModelFormat, str]] = MappingProxyType(
    {
        pb.TIER_DEVICE: ("device", pb.MODEL_FORMAT_TFLITE, "tflite"),
        pb.TIER_GATEWAY: ("gateway", pb.MODEL_FORMAT_ONNX, "onnx"),
    }
)
_CALIBRATION_ROWS = 256
_PPM = 1_000_000


@dataclass(frozen=True, slots=True)
class TierReport:
    """Both precisions of one tier, as measured in the runtime that ships.

    Attributes:
        metric_float, metric_int8: the task's metric on held-out rows.
        latency_float_us, latency_int8_us: of one call in its fastest round, with the tier's `latency_rows`.
        ships: "float" or "int8".
        reason: why.
        metric_parent: the parent's artefact on the same rows; None for a first release.
    """

    bytes_float: int
    bytes_int8: int
    metric_float: float
    metric_int8: float
    latency_float_us: float
    latency_int8_us: float
    ships: str
    reason: str
    metric_parent: float | None


@dataclass(frozen=True, slots=True)
class BuiltRelease:
    """A release that passed its gate.

    Attributes:
        spec: what will be signed.
        files: artefacts by the path that `spec` gives them.
        reports: by tier, "device" and "gateway".
    """

    spec: pb.ReleaseSpec
    files: Mapping[str, bytes]
    reports: Mapping[str, TierReport]


class Parent(Protocol):
    """The release in the field; a `BuiltRelease` is one, and so is whatever a registry loads."""

    @property
    def spec(self) -> pb.ReleaseSpec: ...
    @property
    def files(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True, slots=True)
class _Build:
    """What every step of one call needs."""

    task: Task
    data: TrainingData
    release: int
    parent: Parent | None
    workdir: Path
    seed: int
    threads: int
    report: Callable[[str], None]

    def checkpoint(self, tier: pb.Tier) -> Path:
        return self.workdir / f"{self.task.model}-{self.release}-{TIERS[tier][0]}.ckpt"

    def holdout(self) -> NDArray[np.float32]:
        """Return the held-out rows, scaled."""
        return scale(self.data.holdout.x, self.data.schema())


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One precision of one tier, loaded and scored on the holdout."""

    model: bytes
    int8: bool
    runner: gate.Runner
    scores: NDArray[np.float32]
    measured: gate.ArtefactReport


def build_release(
    task: Task,
    *,
    release: int,
    parent: Parent | None,
    extra: LabelledSamples | None,
    workdir: Path,
    seed: int,
    threads: int = 1,
    report: Callable[[str], None] = lambda _: None,
    created_at_us: int | None = None,
) -> BuiltRelease:
    """Train, quantize and gate one release: a TFLite artefact for devices and an ONNX artefact for gateways.

    Training starts afresh on the initial data and all extra samples, so a release depends on no chain of weights.

    Args:
        task: the plug-in.
        release: its number, counted up by the caller.
        parent: the release in the field, scored on the same held-out rows; None for the first.
        extra: labelled samples from the field, in the sensor's own units.
        workdir: holds checkpoints while this runs; a killed call resumes from them.
        seed: decides weights, order, augmentation and calibration.
        threads: of torch.
        report: takes one line of progress at a time.
        created_at_us: Unix time for the release; the clock's when None.

    Raises:
        ModelError: the gate refuses the release, or the extra samples do not fit the task.
    """
    build = _Build(task, task.prepare(extra), release, parent, workdir, seed, threads, report)
    workdir.mkdir(parents=True, exist_ok=True)
    shipped: dict[pb.Tier, _Candidate] = {}
    reports: dict[str, TierReport] = {}
    for tier, (name, _, _) in TIERS.items():
        shipped[tier], reports[name] = _gate(build, tier, _make(build, tier))
    thresholds = _thresholds(build, shipped)
    spec = pb.ReleaseSpec(
        model=task.model,
        release=release,
        parent=parent.spec.release if parent is not None else 0,
        created_at_us=time.time_ns() // 1000 if created_at_us is None else created_at_us,
        input=build.data.schema(),
        score=task.score,
        artefacts=[_describe(build, tier, kept, thresholds[tier]) for tier, kept in shipped.items()],
        metrics_ppm=_metrics(build, shipped, thresholds),
    )
    files = {artefact.path: shipped[artefact.tier].model for artefact in spec.artefacts}
    for tier in TIERS:
        build.checkpoint(tier).unlink()
    return BuiltRelease(spec, MappingProxyType(files), MappingProxyType(reports))


def chunk_digests(content: bytes, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """Return the SHA-256 of each chunk in order; all chunks but the last are `chunk_bytes` long."""
    return [
        hashlib.sha256(content[start : start + chunk_bytes]).digest() for start in range(0, len(content), chunk_bytes)
    ]


def _make(build: _Build, tier: pb.Tier) -> tuple[bytes, bytes]:
    """Return the float and the int8 artefact of a tier."""
    # The trainer's process pays seconds for these; whoever only reads a report does not.
    from cloud import export, quantize, training  # noqa: PLC0415

    name, model_format, _ = TIERS[tier]
    task, data = build.task, build.data
    build.report(f"train_model model={task.model} tier={name} rows={len(data.train)}")
    module = training.train(
        task,
        tier,
        data,
        seed=build.seed,
        checkpoint=build.checkpoint(tier),
        threads=build.threads,
        report=build.report,
    )
    build.report(f"quantize_model model={task.model} tier={name}")
    rows = quantize.calibration_rows(scale(data.train.x, data.schema()), _CALIBRATION_ROWS, build.seed)
    if model_format == pb.MODEL_FORMAT_ONNX:
        exported = export.to_onnx(module, task.shape)
        return exported, quantize.quantize_onnx(exported, rows)
    exported = export.to_tflite(module, task.shape)
    return exported, quantize.quantize_tflite(exported, rows)


def _gate(build: _Build, tier: pb.Tier, models: tuple[bytes, bytes]) -> tuple[_Candidate, TierReport]:
    """Measure both precisions, choose one and hold it to its limits.

    Raises:
        ModelError: it does not keep to them.
    """
    name, limits = TIERS[tier][0], build.task.limits[tier]
    exact, small = _measure(build, tier, models)
    choice = gate.choose(exact.measured, small.measured, limits)
    kept = small if choice.int8 else exact
    before = _parent_metric(build, tier)
    verdict = gate.passes(kept.measured, before, limits)
    ships = "int8" if choice.int8 else "float"
    build.report(f"gate model={build.task.model} tier={name} ships={ships} ({choice.reason}; {verdict.reason})")
    if not verdict.ok:
        raise ModelError(f"release {build.release} of {build.task.model}, {name}: {verdict.reason}")
    return kept, TierReport(
        bytes_float=exact.measured.size_bytes,
        bytes_int8=small.measured.size_bytes,
        metric_float=exact.measured.metric,
        metric_int8=small.measured.metric,
        metric_parent=before,
        latency_float_us=exact.measured.latency_us,
        latency_int8_us=small.measured.latency_us,
        ships=ships,
        reason=choice.reason,
    )


def _measure(build: _Build, tier: pb.Tier, models: tuple[bytes, bytes]) -> tuple[_Candidate, _Candidate]:
    """Load, time and score the float and the int8 artefact side by side."""
    rows = build.holdout()
    runners = [gate.load_runner(model, TIERS[tier][1]) for model in models]
    timed = rows[: build.task.limits[tier].latency_rows]
    latencies = gate.measure_latency_us([partial(runner, timed) for runner in runners])

    def candidate(index: int) -> _Candidate:
        scored = score_rows(build.task.score, rows, runners[index](rows))
        metric = build.task.metric(scored, build.data.holdout.y)
        measured = gate.ArtefactReport(metric, latencies[index], len(models[index]))
        return _Candidate(models[index], index == 1, runners[index], scored.scores, measured)

    return candidate(0), candidate(1)


def _parent_metric(build: _Build, tier: pb.Tier) -> float | None:
    """Score the artefact in the field on today's held-out rows, with its own scaling."""
    if build.parent is None:
        return None
    spec, holdout = build.parent.spec, build.data.holdout
    artefact = next((one for one in spec.artefacts if one.tier == tier), None)
    if artefact is None:
        return None
    rows = scale(holdout.x, spec.input)
    outputs = gate.load_runner(build.parent.files[artefact.path], artefact.format)(rows)
    return build.task.metric(score_rows(spec.score, rows, outputs), holdout.y)


def _thresholds(build: _Build, shipped: Mapping[pb.Tier, _Candidate]) -> dict[pb.Tier, float]:
    device, gateway = gate.choose_thresholds(
        build.task.threshold_rule,
        shipped[pb.TIER_DEVICE].scores,
        shipped[pb.TIER_GATEWAY].scores,
        build.data.holdout.y,
    )
    return {pb.TIER_DEVICE: device, pb.TIER_GATEWAY: gateway}


def _describe(build: _Build, tier: pb.Tier, kept: _Candidate, threshold: float) -> pb.Artefact:
    name, model_format, suffix = TIERS[tier]
    return pb.Artefact(
        tier=tier,
        format=model_format,
        int8=kept.int8,
        path=f"models/{build.task.model}/{build.release}/{name}.{suffix}",
        sha256=hashlib.sha256(kept.model).digest(),
        length_bytes=len(kept.model),
        chunks=chunk_digests(kept.model),
        chunk_bytes=CHUNK_BYTES,
        golden=gate.golden_vectors(kept.runner, build.holdout(), int8=kept.int8),
        threshold=threshold,
        baseline=measure_baseline(kept.scores.tolist()),
    )


def _metrics(
    build: _Build, shipped: Mapping[pb.Tier, _Candidate], thresholds: Mapping[pb.Tier, float]
) -> dict[str, int]:
    """Return what the shipped pair measures on the holdout, in parts per million."""
    device, gateway = (shipped[tier].scores > np.float32(thresholds[tier]) for tier in TIERS)
    found = device & gateway
    metrics = {f"{TIERS[tier][0]}_{build.task.metric_name}": kept.measured.metric for tier, kept in shipped.items()}
    metrics |= {"device_asked_share": float(device.mean()), "gateway_asked_share": float(found.mean())}
    if isinstance(build.task.threshold_rule, RecallRule):
        anomalies = build.data.holdout.y == 1
        metrics |= {"device_recall": float(device[anomalies].mean()), "cascade_recall": float(found[anomalies].mean())}
    return {name: round(value * _PPM) for name, value in metrics.items()}
