import sys
from types import SimpleNamespace

import numpy as np
import pytest

from device_agent.sources.host import HostSettings, HostSource
from shoal.errors import ConfigError

pytestmark = pytest.mark.device

EVERYWHERE = ["cpu_percent", "load_1m", "load_5m", "load_15m", "memory_percent", "disk_percent", "disk_free_bytes"]


def test_values_of_this_machine_are_read_in_their_order(feed):
    """Pins the real library: ranges that hold on any machine."""
    pytest.importorskip("psutil", reason="left out: needs shoal[sensors]")
    source = HostSource(HostSettings(values=EVERYWHERE, rate_hz=50.0))
    feed.serve(source, until=lambda: len(feed.readings) > 2)
    assert not feed.refused
    for reading in feed.readings:
        cpu, *loads, memory, disk, free_bytes = reading.values
        assert all(0 <= share <= 100 for share in (cpu, memory, disk))
        assert min(loads) >= 0
        assert free_bytes > 1e3
        assert reading.values.dtype == np.float32


@pytest.fixture
def chips(monkeypatch):
    """A machine whose temperature sensors the test decides about."""
    found = {
        "coretemp": [SimpleNamespace(current=41.0), SimpleNamespace(current=43.5)],
        "nvme": [SimpleNamespace(current=60.0)],
    }
    machine = SimpleNamespace(cpu_percent=lambda: 0.0, sensors_temperatures=lambda: found)
    monkeypatch.setitem(sys.modules, "psutil", machine)
    return found


@pytest.mark.parametrize(("chip", "expected"), [("", 60.0), ("coretemp", 43.5)])
def test_temperature_is_the_hottest_of_a_chip_or_of_all(chips, feed, chip, expected):
    """Pins which of many sensors counts."""
    source = HostSource(HostSettings(values=["temperature_celsius"], temperature=chip))
    feed.serve(source, until=lambda: feed.readings)
    assert feed.values == [[expected]]


def test_sensor_that_is_not_there_is_told_at_the_start(chips, feed):
    """Pins the operator's line, with what there is instead."""
    source = HostSource(HostSettings(values=["temperature_celsius"], temperature="k10temp"))
    with pytest.raises(
        ConfigError, match=r"source host: temperature_celsius: .*no sensor k10temp; there are coretemp, nvme"
    ):
        source.start(feed)
    chips.clear()
    with pytest.raises(ConfigError, match="no sensor at all; there are none"):
        HostSource(HostSettings(values=["temperature_celsius"])).start(feed)


def test_sensor_that_goes_is_refused_by_name_and_asked_again(chips, feed):
    """Pins that a sensor which fails later costs its readings, not the agent."""
    source = HostSource(HostSettings(values=["temperature_celsius"], rate_hz=100.0))
    source.start(feed)
    feed.until(lambda: feed.readings)
    kept = dict(chips)
    chips.clear()
    feed.until(lambda: feed.refused)
    chips.update(kept)
    feed.heard.clear()
    feed.until(lambda: "" in feed.heard)
    source.close()
    assert feed.refused[0].startswith("temperature_celsius: ")


def test_missing_library_says_what_to_install(feed, monkeypatch):
    """Pins the extra's name."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ConfigError, match=r"source host needs psutil: pip install 'shoal\[sensors\]'"):
        HostSource(HostSettings(values=["load_1m"])).start(feed)
