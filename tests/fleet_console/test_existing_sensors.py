"""What a site has already, a Zigbee bridge and a folder of pictures, is answered and shows up in `shoal watch`."""

import json
import os
import subprocess
import sys
import threading
import uuid
from contextlib import closing, contextmanager

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

import edge_gateway
from shoal.link_config import parse_broker_url

PATIENCE_S = 30.0
SHOAL = [sys.executable, "-c", "from fleet_console.entry import main; main()"]
PIXELS = 16


def classifier(path, values):
    """Two classes of so many values."""
    weights = np.random.default_rng(1).normal(size=(values, 2)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "m",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", values])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [values, 2], weights.ravel())],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@contextmanager
def running(*arguments, **options):
    """A command of ours, ended with the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    process = subprocess.Popen([*SHOAL, *arguments], env=environment, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


class Watcher:
    """What `shoal watch --json` prints of one site."""

    def __init__(self, process):
        self._process = process
        # A pipe has no timeout of its own: late, the command is ended and its output with it.
        self._late = threading.Timer(PATIENCE_S, process.terminate)
        self._late.start()

    def until(self, is_it):
        """The first line that is it, and none before it that could not be decoded."""
        for text in self._process.stdout:
            line = json.loads(text)
            assert "schema" in line or line.get("cleared"), line
            if is_it(line):
                return line
        raise AssertionError("it never came")

    def close(self):
        self._late.cancel()


@pytest.fixture
def site():
    return f"site-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def watcher(broker, site):
    """`shoal watch`, once it has seen a retained message and so is subscribed."""
    arguments = ["watch", f"shoal/v1/+/{site}/#", "--broker", broker.url, "--json"]
    with running(*arguments, stdout=subprocess.PIPE) as process, closing(Watcher(process)) as watcher:
        yield watcher


@pytest.fixture
def agent(broker, site, tmp_path):
    """A running agent with this source."""

    def start(node, model, source):
        (tmp_path / "root.json").write_text("{}")
        settings = {
            "site": site,
            "node": node,
            "model": model,
            "data_dir": str(tmp_path / node),
            "trusted_root": str(tmp_path / "root.json"),
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        lines += ["[broker]", f"url = {json.dumps(broker.url)}", "[source]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in source.items()]
        (tmp_path / f"{node}.toml").write_text("\n".join(lines))
        return running("device", "run", "--config", str(tmp_path / f"{node}.toml"), stderr=subprocess.DEVNULL)

    return start


def is_answer_of(line, node):
    return line["topic"].endswith(f"/{node}/reply") and line["message"]["rows"][0]["status"] == "STATUS_OK"


def test_zigbee_bridge_and_pictures_reach_the_gateway_and_are_seen(broker, site, watcher, agent, tmp_path):
    """Two agents without a model of their own: what they ask and what the gateway answers is there to read."""
    pytest.importorskip("jmespath", reason="left out: needs shoal[sensors]")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.arange(PIXELS, dtype=np.uint8)
    (pictures / "one.pgm").write_bytes(b"P5\n4 4\n255\n" + pixels.tobytes())
    climate, eyes = classifier(tmp_path / "climate.onnx", 2), classifier(tmp_path / "eyes.onnx", PIXELS)
    service = edge_gateway.Deploy([climate, eyes], ["kitchen", "porch"], broker=broker.url, site=site, name="gw-1")
    zigbee = {"kind": "mqtt", "topics": [f"zigbee2mqtt/{site}"], "values": ["temperature", "humidity"]}
    with service:
        watcher.until(lambda line: line["topic"].endswith("gw-1/presence") and line["message"]["online"])
        with agent("porch", "eyes", {"kind": "images", "path": str(pictures)}):
            asked = watcher.until(lambda line: line["topic"].endswith("/porch/infer"))
            watcher.until(lambda line: is_answer_of(line, "porch"))
        assert asked["message"]["rows"][0]["reading"]["reference"] == "one.pgm"
        config = parse_broker_url(broker.url)
        bridge = Client(CallbackAPIVersion.VERSION2)
        bridge.connect(config.host, config.port)
        bridge.loop_start()
        # Retained, as Zigbee2MQTT is often set up: there is no moment at which the agent is known to listen.
        payload = json.dumps({"temperature": 21.5, "humidity": 40, "linkquality": 99})
        bridge.publish(zigbee["topics"][0], payload, qos=1, retain=True).wait_for_publish(PATIENCE_S)
        with agent("kitchen", "climate", {**zigbee, "retained": True}):
            asked = watcher.until(lambda line: line["topic"].endswith("/kitchen/infer"))
            watcher.until(lambda line: is_answer_of(line, "kitchen"))
        bridge.disconnect()
        bridge.loop_stop()
    assert asked["message"]["rows"][0]["reading"]["scalars"] == {"values": [21.5, 40.0]}
    assert service.stats()["rows.ok"] == 2
