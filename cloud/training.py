"""The training loop. The same seed, data and plan give the same weights, even when the run was killed on the way."""

import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cloud.tasks.base import Task, TrainingData, TrainingPlan
from shoal.errors import ModelError
from shoal.scoring import scale
from shoal.v1 import release_pb2 as pb

OnEpoch = Callable[[int, int, float], None]


def train(
    task: Task,
    tier: pb.Tier,
    data: TrainingData,
    *,
    seed: int,
    checkpoint: Path,
    start: nn.Module | None = None,
    plan: TrainingPlan | None = None,
    threads: int = 1,
    device: str = "cpu",
    report: Callable[[str], None] = lambda _: None,
    on_epoch: OnEpoch = lambda *_: None,
) -> nn.Module:
    """Train one tier's model and return it on the CPU, ready for export.

    Args:
        task: the plug-in, which also says how long to train.
        tier: which of its models.
        data: scaled here, with its own statistics.
        seed: of initial weights, order and augmentation.
        checkpoint: written after every epoch, and read first when it belongs to this very run.
        start: the module to go on from, trained in place; None for a new one of the task's.
        plan: how long and how hard; None for the task's.
        threads: of torch, for the time of the call.
        device: as torch names it.
        report: takes a line after every epoch.
        on_epoch: takes the number of every epoch, how many there will be, and its mean loss.

    Raises:
        ModelError: the loss left the finite numbers.
    """
    with _torch_threads(threads):
        run = _Run(task, tier, data, seed, device, start=start, plan=plan or task.plans[tier])
        run.resume(checkpoint)
        while run.epoch < run.epochs:
            loss = run.train_epoch()
            run.save(checkpoint)
            report(f"{task.model} {pb.Tier.Name(tier)} epoch={run.epoch}/{run.epochs} loss={loss:.4f}")
            on_epoch(run.epoch, run.epochs, loss)
        return run.model.cpu().eval()


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """Everything that a checkpoint must hold. Randomness comes from one generator on the CPU, never the global one."""

    def __init__(
        self,
        task: Task,
        tier: pb.Tier,
        data: TrainingData,
        seed: int,
        device: str,
        *,
        start: nn.Module | None,
        plan: TrainingPlan,
    ) -> None:
        self.epoch = 0
        self._task = task
        self._plan = plan
        self._rows = torch.from_numpy(scale(data.train.x, data.schema())).to(device)
        self._labels = torch.from_numpy(data.train.y).to(device)
        steps_per_epoch = -(-len(data.train) // self._plan.batch_rows)
        self.epochs = -(-self._plan.steps // steps_per_epoch)
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = (task.build_model(tier) if start is None else start).to(device).train()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self._plan.learning_rate, weight_decay=self._plan.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, self._plan.learning_rate, total_steps=self.epochs * steps_per_epoch
        )
        self._identity = _identity(self.model, self._plan, data, seed)

    def train_epoch(self) -> float:
        """Take every row once and return the mean loss."""
        order = torch.randperm(len(self._rows), generator=self._generator).to(self._rows.device)
        losses = [self._step(chosen) for chosen in torch.split(order, self._plan.batch_rows)]
        self.epoch += 1
        mean = float(torch.stack(losses).mean())
        if not np.isfinite(mean):
            raise ModelError(f"training {self._task.model}: loss {mean} in epoch {self.epoch}")
        return mean

    def _step(self, chosen: torch.Tensor) -> torch.Tensor:
        rows = self._task.augment(self._rows[chosen], self._generator)
        loss = self._task.loss(self.model(rows), rows, self._labels[chosen])
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        spare = path.with_suffix(".part")
        state = {
            "identity": self._identity,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
        }
        torch.save(state, spare)
        spare.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this very run; ignore any other, and one that cannot be read."""
        state = _load_checkpoint(path)
        if state is None or state.get("identity") != self._identity:
            return
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])


def _load_checkpoint(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return None
    return state


def _identity(model: nn.Module, plan: TrainingPlan, data: TrainingData, seed: int) -> str:
    """Name a run by all that decides its weights."""
    digest = hashlib.sha256(repr((str(model), plan, seed)).encode())
    weights = [value.cpu().numpy() for value in model.state_dict().values()]
    for array in (*weights, data.train.x, data.train.y, data.mean, data.std):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
