"""The agent as the footprint's benchmark runs it: with a signed release, over a real broker."""

import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.device_footprint import (
    TARGETS,
    Cloud,
    Fleet,
    agent,
    cpu_s,
    first_reading_s,
    produced,
    status_mb,
    write_config,
)
from shoal.v1.node_pb2 import SLOT_PHASE_CONFIRMED

PYTHON = Path(sys.executable)
# What the cloud, the gateway and the console need, and a device must never load.
STRANGERS = {
    "torch", "onnx", "onnxruntime", "onnxscript", "sklearn", "scipy", "river", "litert_torch", "ai_edge_quantizer",
    "tensorflow", "pandas", "matplotlib", "typer", "rich", "sqlite_utils", "cachetools", "prometheus_client",
    "cloud", "edge_gateway", "simulator",
}  # fmt: skip


@pytest.fixture(scope="module")
def life(mosquitto, tmp_path_factory):
    """One agent from its first start to its end, with every import on record; then the folder it leaves."""
    folder = tmp_path_factory.mktemp("life")
    cloud = Cloud(folder, mosquitto.url)
    config = write_config(folder, mosquitto.url, cloud.store.root())
    with closing(Fleet(cloud, mosquitto.url)) as fleet:
        with agent(PYTHON, config, folder, {"PYTHONPROFILEIMPORTTIME": "1"}) as process:
            fleet.until(lambda: fleet.phase == SLOT_PHASE_CONFIRMED)
            spent, resident = cpu_s(process.pid), status_mb(process.pid, "VmRSS")
        yield folder, config, spent, resident


def test_agent_loads_nothing_of_the_cloud(life):
    """Pins the device's dependencies on a whole life: started, verified, self-tested, activated, confirmed, ended."""
    folder, *_ = life
    lines = (folder / "agent.log").read_text().splitlines()
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"device_agent.agent", "tuf.api.metadata", "paho.mqtt.client"} <= loaded
    assert any(name.startswith(("ai_edge_litert.", "tflite_runtime.")) for name in loaded)
    assert not {name for name in loaded if name.partition(".")[0] in STRANGERS}
    assert not {name for name in loaded if name.startswith("fleet_console.")} - {"fleet_console.entry"}


def test_measures_measure(life):
    """Pins that the figures are of the agent: it has used some CPU and memory, and reads anew when started again."""
    folder, config, spent, resident = life
    assert 0.05 < spent < 60
    assert 20 < resident < 2 * TARGETS["rss_mb"]
    before = produced(folder / "data" / "outbox.sqlite")
    assert 0 < first_reading_s(PYTHON, config, folder) < 30
    assert produced(folder / "data" / "outbox.sqlite") > before
