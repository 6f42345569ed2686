"""Several processes that train one model: each learns a part of a batch, all step by the mean of their gradients."""

import os
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Peers:
    """Which of how many this process is; one alone needs no process group.

    Attributes:
        rank: 0 writes checkpoints and speaks for all.
    """

    rank: int
    count: int

    def share(self, module: nn.Module) -> nn.Module:
        """Return what to call in the module's place, so that gradients are those of the whole batch."""
        return module if self.count == 1 else DistributedDataParallel(module)

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this process's rows of a batch, as many as anybody's or a row more; all, where there are too few."""
        return batch if len(batch) < self.count else batch[self.rank :: self.count]

    def mean(self, value: float) -> float:
        """Return the mean of everybody's value, the same for all."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total) / self.count


ALONE = Peers(0, 1)


def join_peers() -> Peers:
    """Meet the others that torchrun started, by the environment that it gives; each has a GPU of its own, if any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    return Peers(distributed.get_rank(), distributed.get_world_size())
