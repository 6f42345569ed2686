"""The same delivery over Mosquitto, real links, one loop, and a self-test in a real child process."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cloud.publisher import Publisher
from cloud.retained import RETAINED_BUDGET_BYTES
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.release.chunks import CHUNK_BYTES
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import ChildSelfTest
from shoal.release.trust import TrustStore
from shoal.v1.node_pb2 import SlotPhase
from shoal.v1.release_pb2 import Tier

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(shutil.which("mosquitto") is None, reason="Mosquitto is not installed"),
]

# Answers its inputs, as the golden vectors of the test's releases want it.
ECHO_RUNTIME = """
class Echo:
    def run(self, inputs):
        return inputs

def load(path):
    return Echo()
"""


class Mosquitto:
    """A broker on a free port; without persistence it has lost everything when it is started again."""

    def __init__(self, directory: Path, *, is_persistent: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = directory / "mosquitto.conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_inflight_messages 100\n"
            f"persistence {str(is_persistent).lower()}\npersistence_location {directory}/\n"
            # Started by root it would become another user, who cannot write its database here.
            f"{'user root' if os.geteuid() == 0 else ''}\n"
        )
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["mosquitto", "-c", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
            except OSError:
                continue
            return
        raise RuntimeError("Mosquitto does not listen")

    def stop(self) -> None:
        """End it as an operator does; one with persistence writes its database then."""
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def mosquitto(tmp_path, request):
    """Asked for by a parameter, it keeps what is retained through a restart."""
    broker = Mosquitto(tmp_path, is_persistent=getattr(request, "param", False))
    yield broker
    broker.stop()


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def connect(mosquitto, loop):
    links = []

    def make(identity) -> Link:
        url = parse_broker_url(f"mqtt://127.0.0.1:{mosquitto.port}", session_expiry_s=0)
        link = Link(url, identity, rng=random.Random(len(links)))
        links.append(link)
        return link

    yield make
    for link in links:
        link.close()


@pytest.fixture
def budget_bytes():
    return RETAINED_BUDGET_BYTES


@pytest.fixture
def serve(connect, loop, cloud, budget_bytes):
    """Let the fixture's cloud publish over the real broker."""
    cloud.publisher.close()
    link = connect(service_identity("publisher"))
    cloud.publisher = Publisher(
        link, cloud.store, cloud.keys,
        counters=Counter(), budget_bytes=budget_bytes, wall_clock=lambda: cloud.now,
    )  # fmt: skip
    cloud.publisher.start()
    link.on_connect(cloud.publisher.on_connect)
    link.attach(loop)
    loop.call_every(0.05, cloud.publisher.tick)
    return link


class BrokerNode:
    def __init__(self, directory: Path, link: Link, cloud, loop: Loop, name: str) -> None:
        self.active: list[tuple[int, bytes]] = []
        self.counters: Counter[str] = Counter()
        self.client = UpdateClient(
            link,
            TrustStore(directory / "trust", cloud.store.root(), clock=cloud.wall_s),
            directory / "models",
            [NodeModel("digits", Tier.TIER_DEVICE, "echo 1.0", probation_s=0.2)],
            node=name,
            self_test=ChildSelfTest("echo_runtime"),
            activate=lambda _model, spec, path: self.active.append((spec.release, path.read_bytes())),
            rng=random.Random(name),
            counters=self.counters,
            refresh_jitter_s=0.05,
        )
        self.client.start()
        link.attach(loop)
        loop.call_every(0.05, self.client.tick)


@pytest.fixture
def make_broker_node(tmp_path, connect, cloud, loop, monkeypatch):
    (tmp_path / "echo_runtime.py").write_text(ECHO_RUNTIME)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    nodes = []

    def make(name: str) -> BrokerNode:
        node = BrokerNode(tmp_path / name, connect(node_identity("lab", name, "device")), cloud, loop, name)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.client.close()


def run_until(loop: Loop, condition, limit_s: float = 30.0) -> None:
    deadline = loop.clock() + limit_s
    loop.run(until=lambda: condition() or loop.clock() > deadline)
    assert condition()


def test_releases_reach_nodes_over_a_real_broker(cloud, serve, make_broker_node, loop):
    """Two releases in a row: 40 chunks in windows of 16, verified, tested in a child, confirmed."""
    first, second = (random.Random(seed).randbytes(40 * CHUNK_BYTES - 5) for seed in (1, 2))
    nodes = [make_broker_node(f"cam-{number}") for number in range(3)]
    cloud.release(first)
    cloud.plan(1)
    run_until(loop, lambda: all(node.active == [(1, first)] for node in nodes))
    run_until(loop, lambda: all(node.client.state()[0].phase == SlotPhase.SLOT_PHASE_CONFIRMED for node in nodes))
    cloud.release(second, parent=1)
    cloud.plan(2)
    run_until(loop, lambda: all(node.active[-1] == (2, second) for node in nodes))
    assert all(node.counters["blobs_bad"] == 0 for node in nodes)
    assert serve.counters["refused_publishes"] == 0
    run_until(loop, lambda: cloud.publisher.settled)


def test_broker_that_forgot_everything_is_healed(cloud, serve, make_broker_node, loop, mosquitto):
    """Restarted without persistence; a node that comes after that still converges."""
    data = random.Random(1).randbytes(5 * CHUNK_BYTES)
    cloud.release(data)
    cloud.plan(1)
    run_until(loop, lambda: cloud.publisher.settled)
    mosquitto.stop()
    run_until(loop, lambda: not serve.connected)
    mosquitto.start()
    node = make_broker_node("late")
    run_until(loop, lambda: node.active == [(1, data)])


@pytest.mark.parametrize("mosquitto", [True], indirect=True, ids=["persistent"])
def test_new_node_converges_when_the_cloud_is_gone_and_the_broker_was_restarted(
    cloud, serve, make_broker_node, loop, mosquitto
):
    """Retained messages alone: the publisher is closed, and the broker has them from its disk."""
    data = random.Random(1).randbytes(20 * CHUNK_BYTES)
    cloud.release(data)
    cloud.plan(1)
    run_until(loop, lambda: cloud.publisher.settled)
    serve.close()
    cloud.publisher.close()
    mosquitto.stop()
    mosquitto.start()
    node = make_broker_node("late")
    run_until(loop, lambda: node.active == [(1, data)])
    assert node.client.state()[0].release == 1


@pytest.mark.parametrize("budget_bytes", [20 * CHUNK_BYTES])
def test_release_without_room_leaves_the_field_as_it_is(cloud, serve, make_broker_node, loop):
    """Refused with nothing published: nodes keep what they run, and the next release that has room reaches them."""
    small, large, next_small = (random.Random(n).randbytes(size * CHUNK_BYTES) for n, size in enumerate((4, 40, 5)))
    node = make_broker_node("cam-1")
    cloud.release(small)
    cloud.plan(1)
    run_until(loop, lambda: node.active == [(1, small)] and cloud.publisher.settled)
    before, sent = cloud.store.load(), serve.counters["messages_sent"]
    cloud.release(large, parent=1)
    run_until(loop, lambda: cloud.publisher.counters["orders_over_budget"] == 1)
    assert (cloud.store.load(), serve.counters["messages_sent"], cloud.store.orders()) == (before, sent, [])
    cloud.release(next_small, parent=1)
    cloud.plan(2)
    run_until(loop, lambda: node.active == [(1, small), (2, next_small)])
