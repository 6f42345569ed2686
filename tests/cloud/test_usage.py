"""What work takes of a machine, with a GPU that a test plays."""

import pynvml
import pytest

from cloud.usage import Price, find_gpu, measured_usage


class FakeGpu:
    """Busy in every other look; consumes 100 J between two readings of its meter."""

    name = "Model T"

    def __init__(self):
        self.looks = 0
        self.energy = 0.0

    def utilisation(self):
        self.looks += 1
        return self.looks % 2

    def memory_bytes(self):
        return 1000 - self.looks

    def energy_j(self):
        self.energy += 100.0
        return self.energy


def test_gpu_is_looked_at_while_the_work_goes_on():
    """Mean utilisation, most memory, and the energy of the block alone."""
    gpu = FakeGpu()
    with measured_usage(gpu, every_s=0.0) as usage:
        while gpu.looks < 100:
            pass
    assert usage.gpu_utilisation == pytest.approx(0.5, abs=0.01)
    assert (usage.gpu_memory_bytes, usage.gpu_energy_j) == (999, 100.0)
    assert usage.figures(Price())["gpu"] == "Model T"


def test_cost_is_the_owners_price_by_the_clock():
    """Two hours at 3 euros; without a price there is no cost, without a GPU nothing is said of one."""
    times = iter([0.0, 7200.0])
    cpu = iter([1.0, 5.0])
    with measured_usage(clock=lambda: next(times), cpu_clock=lambda: next(cpu)) as usage:
        pass
    assert usage.figures(Price(3.0, "EUR", "2026-11")) == {
        "seconds": 7200.0,
        "cpu_s": 4.0,
        "cost": 6.0,
        "currency": "EUR",
        "price_as_of": "2026-11",
    }
    assert usage.figures(Price()) == {"seconds": 7200.0, "cpu_s": 4.0}


def test_work_that_fails_was_work_too():
    """The registry says what it took until then."""
    times = iter([0.0, 3.0])
    with pytest.raises(KeyError), measured_usage(clock=lambda: next(times), cpu_clock=lambda: 0.0) as usage:
        raise KeyError
    assert usage.seconds == 3.0


def test_machine_without_a_driver_has_no_gpu(monkeypatch):
    """And that is no error."""

    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert find_gpu() is None
