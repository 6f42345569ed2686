"""The training loop. The same seed, data and plan give the same weights, even when the run was killed on the way."""

import hashlib
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cloud.hardware import CPU, Hardware
from cloud.peers import ALONE, Peers
from cloud.tasks.base import Task, TrainingData, TrainingPlan
from shoal.errors import ModelError
from shoal.scoring import scale
from shoal.v1 import release_pb2 as pb

OnEpoch = Callable[[int, int, float], None]

# Within an epoch a checkpoint is written so often; at an epoch's end whenever it is worth its time.
_CHECKPOINT_S = 20.0
# Of the time, for checkpoints: those of a large network take longer than a short epoch.
_CHECKPOINT_SHARE = 0.05


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
    hardware: Hardware = CPU,
    peers: Peers = ALONE,
    report: Callable[[str], None] = lambda _: None,
    on_epoch: OnEpoch = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
) -> nn.Module:
    """Train one tier's model and return it on the CPU, ready for export.

    Args:
        task: the plug-in, which also says how long to train.
        tier: which of its models.
        data: scaled here, with its own statistics.
        seed: of initial weights, order and augmentation.
        checkpoint: written after epochs and every 20 s, and read first when it belongs to this very run.
        start: the module to go on from, trained in place; None for a new one of the task's.
        plan: how long and how hard; None for the task's.
        threads: of torch, for the time of the call.
        hardware: where, and how precisely.
        peers: the processes that train the same model together.
        report: takes a line after every epoch.
        on_epoch: takes the number of every epoch, how many there will be, and its mean loss.
        clock: of checkpoints.

    Raises:
        ModelError: the loss left the finite numbers.
    """
    with _torch_threads(threads):
        run = _Run(task, tier, data, seed, hardware, start=start, plan=plan or task.plans[tier], peers=peers)
        run.resume(checkpoint)
        saver = _Saver(run, checkpoint, clock, writes=peers.rank == 0)
        while run.epoch < run.epochs:
            while run.step():
                saver.save_after(_CHECKPOINT_S)
            loss = run.end_epoch()
            saver.save_after(0.0)
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
        hardware: Hardware,
        *,
        start: nn.Module | None,
        plan: TrainingPlan,
        peers: Peers,
    ) -> None:
        self.epoch = 0
        self._task = task
        self._plan = plan
        self._hardware = hardware
        self._peers = peers
        self._rows = torch.from_numpy(scale(data.train.x, data.schema())).to(hardware.device)
        self._labels = torch.from_numpy(data.train.y).to(hardware.device)
        self._steps_per_epoch = -(-len(data.train) // self._plan.batch_rows)
        self.epochs = -(-self._plan.steps // self._steps_per_epoch)
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = (task.build_model(tier) if start is None else start).to(hardware.device).train()
        if hardware.mixed:
            # Pictures come laid out channels last already; half the chip is lost where weights are not.
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward = peers.share(self.model)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self._plan.learning_rate, weight_decay=self._plan.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, self._plan.learning_rate, total_steps=self.epochs * self._steps_per_epoch
        )
        self._identity = _identity(self.model, self._plan, data, f"{seed} {hardware} {peers.count}")
        self._order: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []

    def step(self) -> bool:
        """Take one batch; say whether the epoch has another. Never waits for the GPU."""
        if self._order is None:
            self._order = torch.randperm(len(self._rows), generator=self._generator)
        first = len(self._losses) * self._plan.batch_rows
        batch = self._order[first : first + self._plan.batch_rows]
        self._losses.append(self._learn(batch.to(self._rows.device)))
        return len(self._losses) < self._steps_per_epoch

    def end_epoch(self) -> float:
        """Return the mean loss of the epoch.

        Raises:
            ModelError: it is not finite.
        """
        mean = self._peers.mean(float(torch.stack(self._losses).mean()))
        self.epoch += 1
        self._order, self._losses = None, []
        if not np.isfinite(mean):
            raise ModelError(f"training {self._task.model}: loss {mean} in epoch {self.epoch}")
        return mean

    def _learn(self, chosen: torch.Tensor) -> torch.Tensor:
        # Everybody varies the whole batch, so that generators stay in step, and learns a part of it.
        rows = self._peers.part(self._task.augment(self._rows[chosen], self._generator))
        labels = self._peers.part(self._labels[chosen])
        with self._hardware.products():
            outputs = self._forward(rows)
        loss = self._task.loss(outputs.float(), rows, labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write everything. Not synced: after a power cut it may be torn, is then ignored, and has cost only time."""
        spare = path.with_suffix(".part")
        state = {
            "identity": self._identity,
            "epoch": self.epoch,
            "order": self._order,
            "losses": self._losses,
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
        self.epoch, self._order = state["epoch"], state["order"]
        # Read to the CPU, as everything is; what follows is where the rows are.
        self._losses = [loss.to(self._rows.device) for loss in state["losses"]]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])


class _Saver:
    """Writes checkpoints, but never for more than a twentieth of the time."""

    def __init__(self, run: _Run, path: Path, clock: Callable[[], float], *, writes: bool) -> None:
        self._run = run
        self._path = path
        self._clock = clock
        self._writes = writes
        self._saved_at = clock()
        self._took_s = 0.0

    def save_after(self, interval_s: float) -> None:
        """Write one if the last is so long ago and cost little enough."""
        now = self._clock()
        if not self._writes or now - self._saved_at < max(interval_s, self._took_s / _CHECKPOINT_SHARE):
            return
        self._run.save(self._path)
        self._saved_at = self._clock()
        self._took_s = self._saved_at - now


def _load_checkpoint(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return None
    return state


def _identity(model: nn.Module, plan: TrainingPlan, data: TrainingData, told: str) -> str:
    """Name a run by all that decides its weights."""
    digest = hashlib.sha256(repr((str(model), plan, told)).encode())
    weights = [value.cpu().numpy() for value in model.state_dict().values()]
    for array in (*weights, data.train.x, data.train.y, data.mean, data.std):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
