"""The device's metrics, over real HTTP."""

import socket
import threading
from contextlib import closing, suppress
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from device_agent.agent import AgentSettings
from device_agent.agent import run as run_agent
from device_agent.metrics import render
from device_agent.metrics_server import MetricsServer
from shoal.config import load_config
from shoal.errors import ConfigError
from shoal.loop import Loop
from tests.device_agent.test_agent import config, gateway, running  # noqa: F401  fixtures

pytestmark = pytest.mark.device


@pytest.fixture
def server():
    """A server on a loop in a thread; counts what it rendered."""
    loop = Loop()
    calls = []

    def text():
        calls.append("rendered")
        return render({"produced": 10**6 + len(calls), 'a"b': 1}, {"outbox_items": 3})

    made = MetricsServer(loop, "127.0.0.1:0", text)
    serving = threading.Thread(target=loop.run)
    serving.start()
    yield made
    loop.stop()
    serving.join()
    made.close()
    loop.close()


def test_metrics_are_what_they_are_now(server):
    """Pins the format, its content type, and that each request is rendered anew."""
    for number in (1, 2):
        with urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            text = answer.read().decode()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert f'shoal_device_events_total{{name="produced"}} {10**6 + number}' in text
        assert r'{name="a\"b"} 1' in text


def test_another_path_is_not_found(server):
    """Pins that nothing else is served."""
    with pytest.raises(HTTPError, match="404") as caught:
        urlopen(f"http://127.0.0.1:{server.port}/")
    caught.value.close()


def test_peers_that_say_too_much_or_nothing_hold_up_nobody(server):
    """Pins the bounds: an endless request is cut off, more than a few silent peers are turned away, the rest served."""
    with closing(socket.create_connection(("127.0.0.1", server.port))) as endless:
        endless.sendall(b"GET /" + b"x" * 20_000)
        endless.settimeout(10)
        with suppress(ConnectionResetError):
            assert endless.recv(10) == b""
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(7)]
    with urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        assert answer.status == 200
    silent.append(socket.create_connection(("127.0.0.1", server.port)))
    with closing(socket.create_connection(("127.0.0.1", server.port))) as one_too_many:
        one_too_many.settimeout(3)
        assert one_too_many.recv(10) == b""
    for one in silent:
        one.close()


@pytest.mark.parametrize("address", ["5000", "nowhere:", "127.0.0.1:x", "127.0.0.1:99999", "192.0.2.1:5000"])
def test_address_that_cannot_be_is_named(address):
    """Pins the operator's line."""
    with closing(Loop()) as loop, pytest.raises(ConfigError, match="metrics_address"):
        MetricsServer(loop, address, lambda: b"")


def test_agent_serves_its_metrics(config, gateway):  # noqa: F811
    """Pins the setting, on the real agent over a real broker."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    peer = gateway()
    with running(config(metrics_address=f"127.0.0.1:{port}")):
        peer.until(lambda: peer.counters.get("answered"))
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    assert 'shoal_device_events_total{name="asked.no_model"}' in text
    assert "shoal_device_connected 1" in text


def test_agent_with_a_wrong_address_does_not_start(config):  # noqa: F811
    """Pins that it is an operator's mistake, told before anything runs."""
    with pytest.raises(ConfigError, match="metrics_address"):
        run_agent(load_config(config(metrics_address="x"), AgentSettings))
