"""What a training runs on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cloud.compute import Device, Precision
from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where tensors live and how they are multiplied.

    Attributes:
        device: as torch names it.
        mixed: whether products are bfloat16 and weights channels last.
    """

    device: str
    mixed: bool

    @contextmanager
    def products(self) -> Iterator[None]:
        """Round what autocast rounds, where precision is mixed."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.mixed):
            yield

    def synchronize(self) -> None:
        """Wait until everything is computed that was asked for."""
        if self.device != Device.CPU:
            torch.cuda.synchronize()


CPU = Hardware(Device.CPU.value, mixed=False)


def choose_hardware(device: Device, precision: Precision) -> Hardware:
    """Resolve what was asked for.

    Raises:
        ConfigError: a GPU is asked for and none is there.
    """
    has_gpu = torch.cuda.is_available()
    if device is Device.CUDA and not has_gpu:
        raise ConfigError("device cuda: torch finds no GPU here; use auto or cpu")
    name = Device.CUDA if has_gpu and device is not Device.CPU else Device.CPU
    mixed = precision is Precision.BFLOAT16 or (precision is Precision.AUTO and name is Device.CUDA)
    return Hardware(name.value, mixed)
