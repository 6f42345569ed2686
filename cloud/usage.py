"""What a piece of work takes of its machine, and what that costs."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import msgspec
import pynvml
from msgspec import Meta

_SAMPLE_S = 0.5
_MILLI = 1000
_HOUR_S = 3600


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an hour of this machine costs: the owner's figure, which Shoal does not know.

    Attributes:
        per_hour: 0 leaves costs out.
        as_of: when that was true, for whoever reads it later.
    """

    per_hour: Annotated[float, Meta(ge=0)] = 0.0
    currency: str = "USD"
    as_of: str = ""


class Gpu(Protocol):
    """What is read of a GPU."""

    @property
    def name(self) -> str: ...
    def utilisation(self) -> float:
        """Return the share of the last moment in which it computed, 0 to 1."""

    def memory_bytes(self) -> int:
        """Return how much of its memory is taken, by whomever."""

    def energy_j(self) -> float:
        """Return what it has consumed since its driver was loaded."""


class NvidiaGpu:
    """The first GPU, by NVIDIA's management library."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    @property
    def name(self) -> str:
        return str(pynvml.nvmlDeviceGetName(self._handle))

    def utilisation(self) -> float:
        return float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100

    def memory_bytes(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def energy_j(self) -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / _MILLI


def find_gpu() -> Gpu | None:
    """Return the first GPU; None where there is none, or no driver."""
    try:
        return NvidiaGpu()
    except pynvml.NVMLError:
        return None


@dataclass(slots=True)
class Usage:
    """What a piece of work took.

    Attributes:
        seconds: by the wall clock.
        cpu_s: of processors, this process's and its children's.
        gpu: its name; empty without one.
        gpu_utilisation: mean, 0 to 1.
        gpu_memory_bytes: most.
        gpu_energy_j: consumed meanwhile.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    gpu: str = ""
    gpu_utilisation: float = 0.0
    gpu_memory_bytes: int = 0
    gpu_energy_j: float = 0.0
    _samples: list[float] = field(default_factory=list)

    def figures(self, price: Price) -> dict[str, float | str]:
        """Return what to write down."""
        found: dict[str, float | str] = {"seconds": round(self.seconds, 2), "cpu_s": round(self.cpu_s, 2)}
        if self.gpu:
            found |= {
                "gpu": self.gpu,
                "gpu_utilisation": round(self.gpu_utilisation, 3),
                "gpu_memory_bytes": self.gpu_memory_bytes,
                "gpu_energy_j": round(self.gpu_energy_j, 1),
            }
        if price.per_hour:
            cost = self.seconds / _HOUR_S * price.per_hour
            found |= {"cost": round(cost, 4), "currency": price.currency, "price_as_of": price.as_of}
        return found


def processor_s() -> float:
    """Return what this process and its ended children have taken of processors."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def measured_usage(
    gpu: Gpu | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    cpu_clock: Callable[[], float] = processor_s,
    every_s: float = _SAMPLE_S,
) -> Iterator[Usage]:
    """Fill a `Usage` with what the block takes; a thread looks at the GPU meanwhile."""
    usage = Usage(gpu=gpu.name if gpu is not None else "")
    began, cpu_began = clock(), cpu_clock()
    energy = gpu.energy_j() if gpu is not None else 0.0
    ended = threading.Event()

    def look(gpu: Gpu) -> None:
        while True:
            usage._samples.append(gpu.utilisation())  # noqa: SLF001 - our own
            usage.gpu_memory_bytes = max(usage.gpu_memory_bytes, gpu.memory_bytes())
            if ended.wait(every_s):
                return

    watcher = threading.Thread(target=look, args=(gpu,), daemon=True) if gpu is not None else None
    if watcher is not None:
        watcher.start()
    try:
        yield usage
    finally:
        ended.set()
        if watcher is not None:
            watcher.join()
        usage.seconds, usage.cpu_s = clock() - began, cpu_clock() - cpu_began
        if gpu is not None:
            usage.gpu_energy_j = gpu.energy_j() - energy
            usage.gpu_utilisation = sum(usage._samples) / len(usage._samples)  # noqa: SLF001 - our own
