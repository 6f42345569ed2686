"""Smaller models: whole channels taken out, or single weights set to zero. Arrays in, arrays out; no I/O.

Only the first makes a model faster: nothing that ships skips a zero.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_pruning
from torch import nn
from torch.nn.utils import prune as torch_prune

from cloud.hardware import CPU, Hardware
from cloud.models.layers import LinearOfMaps
from cloud.tasks.base import Task, TrainingData, TrainingPlan
from cloud.training import OnEpoch, train
from shoal.errors import ModelError
from shoal.v1 import release_pb2 as pb

# Kernels work on so many channels at a time: fewer cost the same.
_ROUND_TO = 16
_EXAMPLE_BATCH = 2
_Weighted = nn.Conv2d | nn.Linear


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """How many channels go, and how the rest learns to do without them.

    Attributes:
        ratio: of the channels of every layer, before rounding to what kernels like; 0 < ratio < 1.
        tuning: after every round.
        rounds: 1 takes all at once; more take as much in equal parts.
    """

    ratio: float
    tuning: TrainingPlan
    rounds: int = 1


def prune_and_tune(
    module: nn.Module,
    pruning: PruningPlan,
    task: Task,
    tier: pb.Tier,
    data: TrainingData,
    *,
    seed: int,
    checkpoint: Path,
    threads: int = 1,
    hardware: Hardware = CPU,
    report: Callable[[str], None] = lambda _: None,
    on_epoch: OnEpoch = lambda *_: None,
) -> nn.Module:
    """Take channels out of a trained module and fine-tune the rest, round by round, in the one training loop.

    The module stays as it is. Each round has a checkpoint of its own, the given path with the round's number before its
    suffix, and a killed call resumes from them; they are the caller's to delete. All else is as in `train`.

    Raises:
        ModelError: the module cannot be pruned, or the loss left the finite numbers.
    """
    pruned = copy.deepcopy(module).eval()
    pruner = ChannelPruner(pruned, task.shape, pruning.ratio, pruning.rounds)
    for number in range(1, pruning.rounds + 1):
        pruner.step()
        report(f"prune_model model={task.model} round={number}/{pruning.rounds} weights={count_weights(pruned)}")
        train(
            task,
            tier,
            data,
            seed=seed + number,
            checkpoint=checkpoint.with_suffix(f".{number}{checkpoint.suffix}"),
            start=pruned,
            plan=pruning.tuning,
            threads=threads,
            hardware=hardware,
            report=report,
            on_epoch=on_epoch,
        )
    return pruned


def prune_channels(module: nn.Module, shape: tuple[int, ...], ratio: float) -> nn.Module:
    """Return a copy without the least important channels, at once and without tuning.

    Raises:
        ModelError: the module cannot be pruned.
    """
    pruned = copy.deepcopy(module).eval()
    ChannelPruner(pruned, shape, ratio, rounds=1).step()
    return pruned


class ChannelPruner:
    """Takes channels out of a module in place, in equal steps; in between it may be trained.

    Channels that meet in an addition go together, and a channel is worth the mean norm of its weights in all layers
    that hold it. Never touches what the module answers: inputs and outputs keep their shapes.

    Source: Fang et al., DepGraph: Towards Any Structural Pruning, 2023.

    Raises:
        ModelError: there is no layer to prune.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], ratio: float, rounds: int) -> None:
        self._module = module
        self._example = torch.zeros(_EXAMPLE_BATCH, *shape)
        self._outputs = module(self._example).shape
        with _channels_first(module):
            self._pruner = torch_pruning.pruner.BasePruner(
                module,
                self._example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                iterative_steps=rounds,
                round_to=_ROUND_TO,
                ignored_layers=[_last_layer(module, self._example)],
            )

    def step(self) -> None:
        """Take one round's channels.

        Raises:
            ModelError: what is left does not fit together, or answers in another shape.
        """
        self._module.eval()
        with _channels_first(self._module):
            self._pruner.step()
        try:
            outputs = self._module(self._example).shape
        except RuntimeError as exc:
            raise ModelError(f"cannot prune the module: {exc}") from exc
        if outputs != self._outputs:
            raise ModelError(f"pruned module answers {tuple(outputs)}, expected {tuple(self._outputs)}")


@contextmanager
def _channels_first(module: nn.Module) -> Iterator[None]:
    """Order a channel's columns next to each other, which torch-pruning takes for granted and nothing checks."""
    layers = [layer for layer in module.modules() if isinstance(layer, LinearOfMaps)]
    for layer in layers:
        layer.swap_layout()
    try:
        yield
    finally:
        for layer in layers:
            layer.swap_layout()


def _last_layer(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """Return the layer that gives the answer, whose channels are not ours to take.

    Raises:
        ModelError: there is none.
    """
    called: list[nn.Module] = []
    layers = [layer for layer in module.modules() if isinstance(layer, _Weighted)]
    hooks = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    try:
        module(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ModelError("the module has no layer to prune")
    return called[-1]


def prune_weights(module: nn.Module, ratio: float) -> nn.Module:
    """Return a copy with this share of the smallest weights of all layers together set to zero, for good.

    Changes neither the file's size nor the speed, for tensors keep their shapes; only the file compresses better.
    """
    pruned = copy.deepcopy(module).eval()
    weights = [(layer, "weight") for layer in pruned.modules() if isinstance(layer, _Weighted)]
    torch_prune.global_unstructured(weights, pruning_method=torch_prune.L1Unstructured, amount=ratio)
    for layer, name in weights:
        torch_prune.remove(layer, name)  # type: ignore[no-untyped-call]
    return pruned


def count_weights(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
