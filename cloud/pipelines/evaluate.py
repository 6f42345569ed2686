"""The step `evaluate_model`: the artefacts that would ship, in their runtimes, on rows that training never saw.

What it decides becomes a release without a number: `spec.pb` and one artefact for each tier.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud import gate
from cloud.pipelines.file import EvaluateParameters, Kind, TierLimits
from cloud.pipelines.snapshot import PublishedRelease, read_field
from cloud.pipelines.work import TIERS, Made, Tier, Work
from cloud.tasks.base import GateLimits, LabelledSamples, RecallRule
from shoal.codec import decode
from shoal.errors import ModelError
from shoal.release.probation import measure_baseline
from shoal.scoring import scale, score_rows
from shoal.v1 import release_pb2 as pb

_SPEC = "spec.pb"
_PPM = 1_000_000
# Fewer say nothing of two models.
_FEWEST_HARD = 20


class RefusedError(ModelError):
    """The gate says no, and with the same inputs would again.

    Attributes:
        figures: everything that was measured, for the registry.
    """

    def __init__(self, message: str, figures: Mapping[str, object]) -> None:
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True, slots=True)
class TierReport:
    """The precisions of one tier, as measured in the runtime that ships. `mixed` is None where int8 was good enough.

    Attributes:
        metric_float, metric_int8, metric_mixed: the task's metric on held-out rows.
        latency_float_us, latency_int8_us, latency_mixed_us: of one call in its fastest round, with the tier's
            `latency_rows`.
        ships: "float", "int8" or "mixed".
        reason: why.
        metric_parent: the field's artefact on the same rows; None for a first release.
        hard_rows: field samples that a model in the field got wrong and that training does not see.
        metric_hard, metric_hard_parent: on these alone; None where they are too few, or of one class.
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
    bytes_mixed: int | None = None
    metric_mixed: float | None = None
    latency_mixed_us: float | None = None
    hard_rows: int = 0
    metric_hard: float | None = None
    metric_hard_parent: float | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One precision of one tier, loaded and scored on the holdout."""

    precision: str
    model: bytes
    runner: gate.Runner
    scores: NDArray[np.float32]
    measured: gate.ArtefactReport


def evaluate_model(work: Work, parameters: EvaluateParameters) -> Made:
    """Measure, choose, hold to the limits, and describe what ships.

    Raises:
        RefusedError: the gate refuses a tier.
        ModelError: an artefact cannot be loaded.
    """
    parent = read_field(work.inputs.get(Kind.FIELD, {}))
    shipped: dict[str, _Candidate] = {}
    reports: dict[str, TierReport] = {}
    refused: list[str] = []
    for tier in TIERS:
        limits = with_overrides(work.task.limits[tier.number], getattr(parameters, tier.name))
        candidates = _measure(work, tier, limits)
        before = _parent_metric(work, tier, parent, work.data.holdout)
        kept, report = _choose(candidates, before, limits)
        reports[tier.name] = _with_hard(work, tier, kept, parent, report)
        verdicts = (
            gate.passes(kept.measured, before, limits),
            _judge_on_hard(reports[tier.name], parameters.max_drop_on_hard),
        )
        verdict = next((each for each in verdicts if not each.ok), verdicts[0])
        work.report(f"tier={tier.name} ships={kept.precision} ({reports[tier.name].reason}; {verdict.reason})")
        if not verdict.ok:
            refused.append(f"{tier.name}: {verdict.reason}")
        shipped[tier.name] = kept
    figures: dict[str, object] = {"tiers": {name: asdict(report) for name, report in reports.items()}}
    if refused:
        raise RefusedError(f"release of {work.task.model} refused, {'; '.join(refused)}", figures)
    thresholds = _thresholds(work, shipped)
    spec = pb.ReleaseSpec(
        model=work.task.model,
        parent=parent.spec.release if parent is not None else 0,
        input=work.data.schema(),
        score=work.task.score,
        artefacts=[_describe(work, tier, shipped[tier.name], thresholds[tier.name]) for tier in TIERS],
        metrics_ppm=_metrics(work, shipped, thresholds),
    )
    files = {f"{tier.name}.{tier.suffix}": shipped[tier.name].model for tier in TIERS}
    return Made(files | {_SPEC: spec.SerializeToString(deterministic=True)}, figures)


def read_spec(files: Mapping[str, bytes]) -> pb.ReleaseSpec:
    """Return what the step's output says of a release, which has no number yet."""
    return decode(pb.ReleaseSpec, files[_SPEC])


def with_overrides(limits: GateLimits, given: TierLimits) -> GateLimits:
    """Replace what the pipeline file gives."""
    found = {name: getattr(given, name) for name in given.__struct_fields__}
    return replace(limits, **{name: value for name, value in found.items() if value is not msgspec.UNSET})


def _measure(work: Work, tier: Tier, limits: GateLimits) -> dict[str, _Candidate]:
    """Load, time and score every precision side by side."""
    rows = scale(work.data.holdout.x, work.data.schema())
    precisions = work.precisions(tier)
    models = [work.artefact(tier, precision) for precision in precisions]
    runners = [gate.load_runner(model, tier.format) for model in models]
    timed = rows[: limits.latency_rows]
    calls = [partial(runner, timed) for runner in runners]
    latencies = work.once(f"latency_us.{tier.name}", lambda: gate.measure_latency_us(calls))

    def candidate(index: int) -> _Candidate:
        scored = score_rows(work.task.score, rows, runners[index](rows))
        metric = work.task.metric(scored, work.data.holdout.y)
        measured = gate.ArtefactReport(metric, latencies[index], len(models[index]))
        return _Candidate(precisions[index], models[index], runners[index], scored.scores, measured)

    return {precision: candidate(index) for index, precision in enumerate(precisions)}


def _choose(
    candidates: Mapping[str, _Candidate], before: float | None, limits: GateLimits
) -> tuple[_Candidate, TierReport]:
    """Prefer int8, then mixed precision, to float; `gate.choose` says when either is worth it."""
    exact, small, mixed = candidates["float"], candidates["int8"], candidates.get("mixed")
    choice = gate.choose(exact.measured, small.measured, limits)
    kept = small if choice.int8 else exact
    if mixed is not None and not choice.int8:
        second = gate.choose(exact.measured, mixed.measured, limits)
        if second.int8:
            kept, choice = mixed, replace(second, reason=second.reason.replace("int8", "mixed", 1))
    return kept, TierReport(
        bytes_float=exact.measured.size_bytes,
        bytes_int8=small.measured.size_bytes,
        metric_float=exact.measured.metric,
        metric_int8=small.measured.metric,
        latency_float_us=exact.measured.latency_us,
        latency_int8_us=small.measured.latency_us,
        ships=kept.precision,
        reason=choice.reason,
        metric_parent=before,
        bytes_mixed=mixed.measured.size_bytes if mixed is not None else None,
        metric_mixed=mixed.measured.metric if mixed is not None else None,
        latency_mixed_us=mixed.measured.latency_us if mixed is not None else None,
    )


def _with_hard(
    work: Work, tier: Tier, kept: _Candidate, parent: PublishedRelease | None, report: TierReport
) -> TierReport:
    """Add what the artefact and the field's score on the hard samples."""
    hard = work.hard
    if hard is None or len(hard) < _FEWEST_HARD or len(np.unique(hard.y)) == 1:
        return replace(report, hard_rows=0 if hard is None else len(hard))
    rows = scale(hard.x, work.data.schema())
    metric = work.task.metric(score_rows(work.task.score, rows, kept.runner(rows)), hard.y)
    return replace(
        report, hard_rows=len(hard), metric_hard=metric, metric_hard_parent=_parent_metric(work, tier, parent, hard)
    )


def _judge_on_hard(report: TierReport, max_drop: float) -> gate.Verdict:
    """Decide by the hard samples: a release that forgets them would be the old trouble again."""
    mine, parents = report.metric_hard, report.metric_hard_parent
    if mine is None or parents is None or parents - mine <= max_drop:
        return gate.Verdict(ok=True, reason="")
    return gate.Verdict(ok=False, reason=f"metric {mine:.4f} on {report.hard_rows} hard samples, parent {parents:.4f}")


def _parent_metric(work: Work, tier: Tier, parent: PublishedRelease | None, samples: LabelledSamples) -> float | None:
    """Score the artefact in the field on the same rows, with its own scaling; None where it takes other rows."""
    if parent is None or tuple(parent.spec.input.shape) != work.task.shape:
        return None
    artefact = next((one for one in parent.spec.artefacts if one.tier == tier.number), None)
    if artefact is None:
        return None
    rows = scale(samples.x, parent.spec.input)
    outputs = gate.load_runner(parent.files[artefact.path], artefact.format)(rows)
    return work.task.metric(score_rows(parent.spec.score, rows, outputs), samples.y)


def _thresholds(work: Work, shipped: Mapping[str, _Candidate]) -> dict[str, float]:
    scores: Sequence[NDArray[np.float32]] = [shipped[tier.name].scores for tier in TIERS]
    chosen = gate.choose_thresholds(work.task.threshold_rule, scores[0], scores[1], work.data.holdout.y)
    return {tier.name: threshold for tier, threshold in zip(TIERS, chosen, strict=True)}


def _describe(work: Work, tier: Tier, kept: _Candidate, threshold: float) -> pb.Artefact:
    """Say all of an artefact but where it lies and in which chunks, which signing adds."""
    rows = scale(work.data.holdout.x, work.data.schema())
    int8 = kept.precision != "float"
    return pb.Artefact(
        tier=tier.number,
        format=tier.format,
        int8=int8,
        golden=gate.golden_vectors(kept.runner, rows, int8=int8),
        threshold=threshold,
        baseline=measure_baseline(kept.scores.tolist()),
    )


def _metrics(work: Work, shipped: Mapping[str, _Candidate], thresholds: Mapping[str, float]) -> dict[str, int]:
    """Return what the shipped pair measures on the holdout, in parts per million."""
    task = work.task
    device, gateway = (shipped[tier.name].scores > np.float32(thresholds[tier.name]) for tier in TIERS)
    found = device & gateway
    metrics = {f"{name}_{task.metric_name}": kept.measured.metric for name, kept in shipped.items()}
    metrics |= {"device_asked_share": float(device.mean()), "gateway_asked_share": float(found.mean())}
    if isinstance(task.threshold_rule, RecallRule):
        anomalies = work.data.holdout.y == 1
        metrics |= {"device_recall": float(device[anomalies].mean()), "cascade_recall": float(found[anomalies].mean())}
    return {name: round(value * _PPM) for name, value in metrics.items()}
