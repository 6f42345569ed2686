"""One of several processes of a training; `torchrun` starts them all on the same folder.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m cloud.train_job FOLDER

The folder holds `job.json` and `data.npz`; the first process leaves `module.pt`, and `epochs.jsonl` while it trains.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import distributed

from cloud.compute import Device, Precision
from cloud.hardware import choose_hardware
from cloud.peers import join_peers
from cloud.tasks import load_task
from cloud.tasks.base import LabelledSamples, TrainingData, TrainingPlan
from cloud.training import train
from shoal.errors import ModelError

_LOOK_S = 0.2


class Job(msgspec.Struct, frozen=True):
    """What to train.

    Attributes:
        base: directory that paths in the parameters begin at.
        plan: how long and how hard.
    """

    task: str
    model: str
    parameters: dict[str, Any]
    base: str
    tier: int
    seed: int
    threads: int
    device: Device
    precision: Precision
    plan: TrainingPlan


def write_job(folder: Path, job: Job, data: TrainingData) -> None:
    """Put down what the processes need."""
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    np.savez(
        folder / "data.npz",
        x=data.train.x,
        y=data.train.y,
        held_x=data.holdout.x,
        held_y=data.holdout.y,
        mean=data.mean,
        std=data.std,
        cut=np.array([data.window, data.stride]),
    )


def read_data(folder: Path) -> TrainingData:
    with np.load(folder / "data.npz", allow_pickle=False) as file:
        train_part, held = LabelledSamples(file["x"], file["y"]), LabelledSamples(file["held_x"], file["held_y"])
        window, stride = file["cut"].tolist()
        return TrainingData(train_part, held, file["mean"], file["std"], window, stride)


def run_job(folder: Path, job: Job, data: TrainingData, processes: int) -> Iterator[tuple[int, int, float]]:
    """Start the processes; yield each epoch's number, how many there will be, and its mean loss, as they come.

    The trained module is then in `module.pt`. Whoever stops early ends the processes; they go on from their checkpoint.

    Raises:
        ModelError: a process failed; what it said is on standard error.
    """
    write_job(folder, job, data)
    (folder / "epochs.jsonl").write_bytes(b"")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.Popen([*words, "-m", "cloud.train_job", str(folder)])  # noqa: S603 - our own words
    try:
        with (folder / "epochs.jsonl").open("rb") as file:
            running = True
            while running:
                try:
                    process.wait(_LOOK_S)
                    running = False
                except subprocess.TimeoutExpired:
                    pass
                yield from (msgspec.json.decode(line, type=tuple[int, int, float]) for line in file)
    finally:
        process.terminate()
        process.wait()
    if process.returncode != 0:
        raise ModelError(f"training {job.model} in {processes} processes: one ended with status {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloud.train_job", description="Train as one of several processes.")
    parser.add_argument("folder", type=Path, help="with job.json and data.npz")
    folder: Path = parser.parse_args().folder
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    task = load_task(job.task, job.model, job.parameters, Path(job.base))
    peers = join_peers()
    epochs = folder / "epochs.jsonl"

    def note(epoch: int, last: int, loss: float) -> None:
        if peers.rank == 0:
            with epochs.open("ab") as file:
                file.write(msgspec.json.encode([epoch, last, loss]) + b"\n")

    module = train(
        task,
        job.tier,  # type: ignore[arg-type] # protobuf's enums are numbers at run time
        read_data(folder),
        seed=job.seed,
        checkpoint=folder / "job.ckpt",
        plan=job.plan,
        threads=job.threads,
        hardware=choose_hardware(job.device, job.precision),
        peers=peers,
        on_epoch=note,
    )
    if peers.rank == 0:
        spare = folder / "module.part"
        torch.save(module, spare)
        spare.replace(folder / "module.pt")
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
