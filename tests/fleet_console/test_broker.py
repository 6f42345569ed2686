"""Starting brokers."""

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from itertools import count

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleet_console import broker as broker_module
from fleet_console.broker import BrokerKind, find_mosquitto, free_port, start_broker
from shoal.errors import ConfigError
from shoal.link_config import parse_broker_url
from shoal.routes import Route, topic


@pytest.fixture(params=BrokerKind, ids=lambda kind: kind.value)
def kind(request):
    if request.param is BrokerKind.MOSQUITTO and find_mosquitto() is None:
        pytest.skip("left out: Mosquitto is not installed")
    return request.param


def test_broker_listens_while_the_block_runs_and_not_after(tmp_path, kind):
    """No process and no port is left behind."""
    with start_broker(tmp_path, kind) as broker:
        with socket.create_connection(("127.0.0.1", broker.port), 5):
            pass
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert broker.version[0].isdigit()
        pid = broker.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_broker_at_its_url_speaks_mqtt_5(tmp_path, kind):
    """A retained message comes back with its properties, which MQTT 3.1.1 has not."""
    name = topic(Route.STATE, site="lab", node="cam-1")
    sent = Properties(PacketTypes.PUBLISH)
    sent.CorrelationData = b"which"
    received = []
    with start_broker(tmp_path, kind) as broker:
        address = parse_broker_url(broker.url)
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        client.on_connect = lambda *_: client.publish(name, b"hello", qos=1, retain=True, properties=sent)
        client.on_publish = lambda *_: client.subscribe(name, qos=1)
        client.on_message = lambda _client, _userdata, message: received.append(message)
        client.connect(address.host, address.port)
        deadline = time.monotonic() + 10.0
        while not received and time.monotonic() < deadline:
            client.loop(0.05)
        client.disconnect()
        client.reinitialise()  # closes what paho otherwise leaves to the garbage collector
    (message,) = received
    assert (message.topic, message.payload, message.retain) == (name, b"hello", True)
    assert message.properties.CorrelationData == b"which"


def test_taken_port_is_said(tmp_path, kind):
    """The operator learns what is wrong and what to do."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken"), start_broker(tmp_path, kind, port):
            pass


def test_broker_that_dies_tells_why(tmp_path):
    """Its own last words are in the error."""
    if find_mosquitto() is None:
        pytest.skip("left out: Mosquitto is not installed")
    with (
        pytest.raises(ConfigError, match="no_such_setting"),
        start_broker(tmp_path, BrokerKind.MOSQUITTO, free_port(), extra_config="no_such_setting true"),
    ):
        pass


def test_broker_obeys_when_it_is_stopped(tmp_path, kind):
    """Ctrl-C promises five seconds: nobody has to be killed."""
    with start_broker(tmp_path, kind) as broker:
        pass
    assert broker.process.returncode == 0


@pytest.fixture
def stranger():
    """Somebody else's listener."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("seen", [True, False], ids=["seen before the start", "taken under its hands"])
def test_free_port_that_was_taken_meanwhile_is_given_up(tmp_path, kind, stranger, monkeypatch, seen):
    """A stranger's listener is never taken for the broker, and another port is tried."""
    ports = iter([stranger, free_port()])
    monkeypatch.setattr(broker_module, "free_port", lambda: next(ports))
    if not seen:
        # Free when asked before the start; from then on the truth.
        is_taken = broker_module._is_taken
        asked = count()
        monkeypatch.setattr(broker_module, "_is_taken", lambda port: next(asked) > 0 and is_taken(port))
    with start_broker(tmp_path, kind) as broker:
        assert broker.port != stranger
        assert broker.process.poll() is None


def test_missing_embedded_broker_is_said(tmp_path, monkeypatch):
    """An operator reads what to install, not a traceback."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(broker_module, "version", missing)
    with pytest.raises(ConfigError, match="iotcore is not installed"), start_broker(tmp_path, BrokerKind.IOTCORE):
        pass


# Signals itself as soon as the broker's process exists, before anything of ours knows of it: the worst moment.
_STARTER = """
import os, subprocess, sys
from pathlib import Path
from fleet_console import broker

class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if {at_birth} and kwargs.get("start_new_session"):
            os.kill(os.getpid(), {number})

subprocess.Popen = Popen
sys.exit(broker.run_foreground(Path({directory!r}), broker.BrokerKind({kind!r}), {port}))
"""


@pytest.mark.parametrize("at_birth", [False, True], ids=["running", "just made"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_broker_in_the_foreground_ends_with_its_starter(tmp_path, kind, number, at_birth):
    """Neither Ctrl-C nor a supervisor's SIGTERM leaves a broker behind, whenever it comes."""
    port = free_port()
    program = _STARTER.format(
        at_birth=at_birth, number=int(number), directory=str(tmp_path), kind=kind.value, port=port
    )
    with subprocess.Popen([sys.executable, "-c", program]) as starter:
        deadline = time.monotonic() + 20.0
        while not at_birth and not broker_module._answers(port):
            assert starter.poll() is None
            assert time.monotonic() < deadline
        if not at_birth:
            starter.send_signal(number)
        assert starter.wait(20.0) == 0
    assert not broker_module._answers(port)
