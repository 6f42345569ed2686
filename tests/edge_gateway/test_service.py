"""The gateway as its operator sees it."""

import inspect
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from edge_gateway import Deploy, service
from edge_gateway.__main__ import _parser
from edge_gateway.lanes import Histograms
from edge_gateway.metrics import GatewayCollector
from edge_gateway.service import GatewaySettings, run
from shoal.config import load_config
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.release.client import UpdateClient
from shoal.routes import Route

_PATIENCE_S = 20.0
_PAGE = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()


@pytest.fixture
def config(tmp_path):
    """Write gateway.toml; a test changes what it wants, None leaves a key out."""

    def write(**changed):
        (tmp_path / "root.json").write_bytes(b"{}")
        settings = {
            "site": "plant",
            "node": "gw-1",
            "models": ["digits"],
            "data_dir": str(tmp_path / "data"),
            "trusted_root": str(tmp_path / "root.json"),
            "broker": {"url": "mqtt://127.0.0.1:1"},
            **changed,
        }
        path = tmp_path / "gateway.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


def command(path):
    return [sys.executable, "-m", "edge_gateway", "--config", path]


def last_words(path):
    done = subprocess.run(command(path), capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"nodes": "gw-1"}, "nodes"),
        ({"node": None}, "node"),
        ({"node": "Gateway 1"}, "node: 'Gateway 1' is not an id"),
        ({"site": "a/b"}, "site"),
        ({"models": ["digits", "Digits"]}, "models"),
        ({"devices": ["+"]}, "devices"),
        ({"models": []}, "models"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": 5000}, "max_batch_size"),
        ({"max_delay_ms": -1.0}, "max_delay_ms"),
        ({"cache_bytes": -1}, "cache_bytes"),
        ({"outbox_items": 0}, "outbox_items"),
        ({"state_interval_s": 601.0}, "state_interval_s"),
        ({"retry_after_s": 0.0}, "retry_after_s"),
        ({"broker": {"url": "http://127.0.0.1"}}, "mqtt://host:port"),
        ({"trusted_root": "/nowhere/root.json"}, "trusted_root /nowhere/root.json: No such file"),
        ({"data_dir": "/dev/null/data"}, "data_dir /dev/null/data: Not a directory"),
    ],
)
def test_bad_configuration_is_refused_by_name(config, changed, named):
    """Before anything is opened, with the key in the message."""
    with pytest.raises(ConfigError, match=re.escape(named)):
        run(load_config(config(**changed), GatewaySettings))


def test_operator_gets_one_line_and_exit_status_two(config):
    """Not a traceback."""
    assert "node: 'Gateway 1' is not an id" in last_words(config(node="Gateway 1"))


def test_only_an_ordered_end_is_excused(config, monkeypatch):
    """A model on probation keeps its try over a stop, and loses it where the gateway breaks."""
    excused = []
    monkeypatch.setattr(UpdateClient, "excuse_start", lambda _: excused.append("ordered"))
    settings = load_config(config(), GatewaySettings)
    monkeypatch.setattr(service, "serve", lambda _gateway, loop: loop.close())
    run(settings)
    assert excused == ["ordered"]

    def broken(_gateway, loop):
        loop.close()
        raise MemoryError

    monkeypatch.setattr(service, "serve", broken)
    with pytest.raises(MemoryError):
        run(settings)
    assert excused == ["ordered"]


@contextmanager
def running(path):
    """The gateway while the block runs; killed after it, unless it has ended."""
    process = subprocess.Popen(command(path), stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gateway_is_born_and_says_goodbye(config, broker, number):
    """Without a model it is online all the same, tells its state, and ends with exit status 0."""
    name = f"s{int(number)}-{broker.port}"
    loop, heard, states = Loop(), [], []
    link = Link(parse_broker_url(broker.url, session_expiry_s=0), node_identity(name, "watcher", "device"))
    link.subscribe(Route.PRESENCE, lambda delivery: heard.append(delivery.message.online), site=name, node="gw-1")
    link.subscribe(Route.STATE, lambda delivery: states.append(delivery.message.role), site=name, node="gw-1")
    link.attach(loop)
    loop.run(until=lambda: link.is_subscribed)
    loop.call_at(loop.clock() + _PATIENCE_S, lambda _now: loop.stop())
    with running(config(site=name, broker={"url": broker.url})) as process:
        loop.run(until=lambda: bool(heard and states))
        process.send_signal(number)
        loop.run(until=lambda: len(heard) >= 2)
        assert process.wait(_PATIENCE_S) == 0
    link.close()
    loop.close()
    assert (heard, states[0]) == ([True, False], "gateway")


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", GatewaySettings.__struct_fields__)
def test_every_setting_is_documented(key):
    """In the first column of a table."""
    assert re.search(rf"^\| [^|]*`\[?{key}\]?`", _PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", list(inspect.signature(Deploy).parameters))
def test_every_option_of_deploy_is_documented(name):
    """In the first column of a table."""
    assert re.search(rf"^\| [^|]*`{name}`", _PAGE, re.MULTILINE)


def test_every_option_of_the_command_is_documented():
    """Of `python -m edge_gateway`."""
    options = {action.option_strings[-1] for action in _parser()._actions} - {"--help"}
    assert {option for option in options if not re.search(rf"{option}\b", _PAGE)} == set()


def test_every_metric_is_documented():
    """By the name that Prometheus has."""
    for metric in GatewayCollector(dict, Histograms()).collect():
        assert f"`{metric.name}" in _PAGE


def test_every_picture_is_there():
    """And small."""
    pictures = re.findall(r"\]\((img/[^)]+)\)", _PAGE)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parents[2] / "docs" / picture).stat().st_size < 60_000
