"""Starting brokers."""

import os
import socket

import pytest

from fleet_console.broker import BrokerKind, find_mosquitto, free_port, start_broker
from shoal.errors import ConfigError


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
