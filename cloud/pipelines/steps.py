"""The steps that train and compress. Pure but for checkpoints: the same inputs and seed make the same bytes."""

import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloud import export, gate, mixed, prune, quantize, training
from cloud.compute import Device, Precision
from cloud.hardware import choose_hardware
from cloud.models.layers import fold_for_export
from cloud.pipelines.file import PruneParameters, Pruning, QuantizeParameters, TrainParameters
from cloud.pipelines.work import TIERS, Made, Tier, Work, artefact_name
from cloud.tasks.base import TrainingPlan
from cloud.train_job import Job, run_job
from shoal.scoring import scale, score_rows

_SEARCH_ROWS = 512


def train_model(work: Work, parameters: TrainParameters) -> Made:
    """Train both tiers from the beginning, so that a release depends on no chain of weights."""
    files = {}
    for tier in TIERS:
        work.report(f"tier={tier.name} rows={len(work.data.train)}")
        train = _train_here if parameters.processes == 1 else _train_together
        files[f"{tier.name}.pt"] = module_bytes(train(work, tier, parameters))
    return Made(files)


def _train_here(work: Work, tier: Tier, parameters: TrainParameters) -> nn.Module:
    return training.train(
        work.task,
        tier.number,
        work.data,
        seed=work.seed,
        checkpoint=work.folder / f"{tier.name}.ckpt",
        threads=work.threads,
        hardware=choose_hardware(parameters.device, parameters.precision),
        report=work.report,
        on_epoch=partial(_note_epoch, work, tier),
    )


def _train_together(work: Work, tier: Tier, parameters: TrainParameters) -> nn.Module:
    folder = work.folder / tier.name
    folder.mkdir(exist_ok=True)
    job = Job(
        task=work.origin.name,
        model=work.task.model,
        parameters=dict(work.origin.parameters),
        base=str(work.origin.base),
        tier=tier.number,
        seed=work.seed,
        threads=work.threads,
        device=parameters.device,
        precision=parameters.precision,
        plan=work.task.plans[tier.number],
    )
    for epoch, last, loss in run_job(folder, job, work.data, parameters.processes):
        work.report(f"{job.model} {tier.name} epoch={epoch}/{last} loss={loss:.4f}")
        _note_epoch(work, tier, epoch, last, loss)
    return read_module((folder / "module.pt").read_bytes())


def prune_model(work: Work, parameters: PruneParameters) -> Made:
    """Take channels or weights out of the tiers that the parameters name; the others pass as they are."""
    files, figures = {}, {}
    for tier in TIERS:
        data, ratio = work.module(tier), parameters.ratio_of(tier.name)
        if ratio is not None:
            module = read_module(data)
            pruned = _prune(work, tier, module, ratio, parameters)
            figures[tier.name] = {"weights": prune.count_weights(module), "weights_pruned": _nonzero(pruned)}
            data = module_bytes(pruned)
        files[f"{tier.name}.pt"] = data
    return Made(files, figures)


def _prune(work: Work, tier: Tier, module: nn.Module, ratio: float, parameters: PruneParameters) -> nn.Module:
    if parameters.kind is Pruning.WEIGHTS:
        return prune.prune_weights(module, ratio)
    plan = work.task.plans[tier.number]
    tuning = TrainingPlan(parameters.steps or plan.steps, plan.batch_rows, parameters.learning_rate, plan.weight_decay)
    return prune.prune_and_tune(
        module,
        prune.PruningPlan(ratio, tuning, parameters.rounds),
        work.task,
        tier.number,
        work.data,
        seed=work.seed,
        checkpoint=work.folder / f"{tier.name}.ckpt",
        threads=work.threads,
        hardware=choose_hardware(Device.AUTO, Precision.AUTO),
        report=work.report,
        on_epoch=partial(_note_epoch, work, tier),
    )


def _note_epoch(work: Work, tier: Tier, epoch: int, epochs: int, loss: float) -> None:
    work.measure(tier.name, epoch, epochs, {"loss": loss})


def _nonzero(module: nn.Module) -> int:
    return sum(int(torch.count_nonzero(value)) for value in module.parameters())


@dataclass(frozen=True, slots=True)
class _Exported:
    """A float artefact, and what is needed to quantize it.

    Attributes:
        quantize: all nodes but those given.
    """

    model: bytes
    nodes: Sequence[str]
    quantize: Callable[[Collection[str]], bytes]


def quantize_model(work: Work, parameters: QuantizeParameters) -> Made:
    """Export each tier's module and quantize it; where int8 costs more than its limit, look for a mixture."""
    files: dict[str, bytes] = {}
    figures: dict[str, dict[str, object]] = {}
    scaled = scale(work.data.train.x, work.data.schema())
    rows = quantize.calibration_rows(scaled, parameters.calibration_rows, work.seed)
    for tier in TIERS:
        work.report(f"tier={tier.name}")
        exported = _export(tier, read_module(work.module(tier)), work.task.shape, rows)
        plain = exported.quantize(())
        files |= {artefact_name(tier, "float"): exported.model, artefact_name(tier, "int8"): plain}
        figures[tier.name] = {"bytes_float": len(exported.model), "bytes_int8": len(plain)}
        if parameters.torch_dynamic:
            files[f"{tier.name}.dynamic.pt"] = export.to_torch_dynamic(read_module(work.module(tier)), work.task.shape)
        found = _mix(work, tier, exported, plain, parameters.mixed_tries)
        if found is not None:
            files[artefact_name(tier, "mixed")] = found.model
            figures[tier.name] |= {"bytes_mixed": len(found.model), "keep_float": list(found.keep_float)}
    return Made(files, figures)


def _export(tier: Tier, module: nn.Module, shape: tuple[int, ...], rows: NDArray[np.float32]) -> _Exported:
    module = fold_for_export(module)
    if tier.suffix == "onnx":
        model = export.to_onnx(module, shape)
        return _Exported(model, quantize.onnx_nodes(model), partial(quantize.quantize_onnx, model, rows))
    model = export.to_tflite(module, shape)
    return _Exported(model, quantize.tflite_operations(model), quantize.tflite_quantizer(model, rows))


def _mix(work: Work, tier: Tier, exported: _Exported, plain: bytes, tries: int) -> mixed.MixedModel | None:
    """Search on training rows: the held-out ones judge what is found, so they must not choose it.

    Where these hold one class only, as an autoencoder's do, no metric tells int8 from float, and there is no search.
    """
    chosen = np.random.default_rng(work.seed).permutation(len(work.data.train))[:_SEARCH_ROWS]
    samples = work.data.train.take(np.sort(chosen))
    if tries == 0 or len(np.unique(samples.y)) == 1:
        return None
    rows = scale(samples.x, work.data.schema())

    def outputs(model: bytes) -> NDArray[np.float32]:
        return gate.load_runner(model, tier.format)(rows)

    def metric(model: bytes) -> float:
        return work.task.metric(score_rows(work.task.score, rows, outputs(model)), samples.y)

    enough = metric(exported.model) - work.task.limits[tier.number].max_drop_from_float
    if metric(plain) >= enough:
        return None
    ranked = mixed.rank_nodes(exported.nodes, exported.quantize, outputs, outputs(exported.model))
    nodes = [node for node, _ in ranked]
    return mixed.find_mixed(nodes, exported.quantize, metric, enough=enough, max_tries=tries)


def module_bytes(module: nn.Module) -> bytes:
    """Return a module with its structure, which pruning may have changed, as bytes."""
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


def read_module(data: bytes) -> nn.Module:
    """Undo `module_bytes`. The bytes run code when they are read: only ever those of our own object store."""
    module: nn.Module = torch.load(io.BytesIO(data), weights_only=False)
    return module
