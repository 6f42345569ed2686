"""The whole loop with no hand on it: 200 labelled samples arrive over MQTT, and a better release is on the broker."""

import secrets
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import tomli_w

from cloud.pipelines.registry import Registry
from fleet_console.models import read_listing
from fleet_console.retained import open_reader
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.tensors import to_tensor
from shoal.v1.command_pb2 import COMMAND_STATUS_DONE, LABEL_SOURCE_PERSON, AddLabels, Command, Label
from shoal.v1.sample_pb2 import Sample, SampleBatch, SampleGroup
from shoal.v1.sensor_pb2 import SensorData

PATIENCE_S = 120
NEW_LABELS = 200
PIPELINE = """\
model: digits
task: vision
parameters: {data: digits}
triggers: {new_labels: 200}
steps:
  - {name: train_model, inputs: samples, outputs: trained}
  - {name: quantize_model, inputs: [trained, samples], outputs: quantized}
  - {name: evaluate_model, inputs: [quantized, samples, field], outputs: release}
  - {name: deploy_to_edge, inputs: release, targets: "*"}
"""


@contextmanager
def processes(*commands):
    """Run `shoal` commands until the block ends; each must then end well when it is told to."""
    words = [sys.executable, "-c", "from fleet_console.entry import main; main()"]
    running = [subprocess.Popen([*words, *command], stdin=subprocess.DEVNULL) for command in commands]
    try:
        yield running
        for process in running:
            process.terminate()
        assert [process.wait(20) for process in running] == [0] * len(running)
    finally:
        for process in running:
            process.kill()
            process.wait()


class Site:
    """A gateway that brings samples, and a person who labels them."""

    def __init__(self, url):
        self.loop = Loop()
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity("plant", "gw-01", "gateway"))
        self.stored, self.results, self.is_there = set(), [], False
        self.link.subscribe(Route.ACK, self._acked, site="plant", node="gw-01")
        self.link.subscribe(Route.RESULT, lambda got: self.results.append(got.message), site="cloud", node="ingest")
        self.link.subscribe(Route.CLOUD_PRESENCE, self._seen, service="ingest")
        self.link.attach(self.loop)
        # Before, nobody would hear what is sent; a gateway would send it again.
        self.wait(lambda: self.is_there)

    def wait(self, until):
        deadline = time.monotonic() + PATIENCE_S
        self.loop.run(until=lambda: until() or time.monotonic() > deadline)
        assert until()

    def send(self, images, labels):
        samples = [
            Sample(reading=SensorData(device="cam-01", epoch=bytes(16), seq=seq, tensor=to_tensor(image)))
            for seq, image in enumerate(images)
        ]
        group = SampleGroup(device="cam-01", epoch=bytes(16), model="digits", samples=samples)
        assert self.link.publish(Route.SAMPLE, SampleBatch(gateway="gw-01", groups=[group]), site="plant", node="gw-01")
        self.wait(lambda: len(self.stored) == len(samples))
        spoken = [Label(device="cam-01", epoch=bytes(16), seq=seq, label=label) for seq, label in enumerate(labels)]
        now_us = time.time_ns() // 1000
        command = Command(
            id=secrets.token_bytes(16),
            issued_at_us=now_us,
            expires_at_us=now_us + 60_000_000,
            add_labels=AddLabels(source=LABEL_SOURCE_PERSON, author="ann", labels=spoken),
        )
        assert self.link.publish(Route.COMMAND, command, expiry_s=60, site="cloud", node="ingest")
        self.wait(lambda: self.results)
        assert self.results[0].status == COMMAND_STATUS_DONE

    def close(self):
        self.link.close()
        self.loop.close()

    def _seen(self, delivery):
        self.is_there = delivery.message.online

    def _acked(self, delivery):
        self.stored |= {seq for group in delivery.message.groups for seq in group.stored}


def wait_for_release(url, number):
    """Look at what the broker retains, as a node would, until a plan names the release."""
    deadline = time.monotonic() + PATIENCE_S
    found = []
    while time.monotonic() < deadline:
        # Nothing is published yet, or not all of it.
        with suppress(ConfigError), open_reader(url) as reader:
            found = [listed.release for listed in read_listing(reader, None).models]
        if number in found:
            return
        threading.Event().wait(0.2)
    pytest.fail(f"release {number} is not on the broker, only {found}")


@pytest.mark.timeout(600)
def test_labels_that_arrive_become_a_release(tmp_path, own_broker, drifted):
    """Ingest, publisher and `shoal pipeline watch` are processes that share a directory; the rest goes over MQTT."""
    pipeline, config, data = tmp_path / "digits.yaml", tmp_path / "cloud.toml", tmp_path / "cloud"
    pipeline.write_text(PIPELINE)
    models = [{"name": "digits", "pipeline": str(pipeline)}]
    config.write_text(tomli_w.dumps({"data_dir": str(data), "models": models, "broker": {"url": own_broker.url}}))
    subprocess.run([sys.executable, "-m", "cloud", "init", "--config", str(config)], check=True, capture_output=True)
    services = [["cloud", name, "--config", str(config)] for name in ("ingest", "publisher")]
    with processes(*services, ["pipeline", "watch", str(pipeline), "--config", str(config)]):
        wait_for_release(own_broker.url, 1)
        site = Site(own_broker.url)
        site.send(drifted.x[:NEW_LABELS], drifted.y[:NEW_LABELS].tolist())
        site.close()
        wait_for_release(own_broker.url, 2)
    registry = Registry(data / "registry.sqlite")
    assert [run.reason for run in registry.runs()] == [f"{NEW_LABELS} new labels", "first release"]
    report = registry.releases("digits")[-1]
    assert (report.labelled, report.parent) == (NEW_LABELS, 1)
    assert report.tiers["device"]["metric_parent"] + 0.03 < report.tiers["device"]["metric_float"]
    registry.close()
