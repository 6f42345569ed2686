"""What systemd is told, over a socket as systemd's."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from device_agent.logs import JsonFormatter
from device_agent.notify import ALIVE, READY, STOPPING, Notifier
from shoal.link_config import LinkConfig
from shoal.loop import Loop

pytestmark = pytest.mark.device

PATIENCE_S = 30.0


@pytest.fixture(params=["path", "abstract"])
def supervisor(request, tmp_path):
    """The socket and its name, as NOTIFY_SOCKET spells it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@shoal-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        yield sock, name


def test_state_arrives(supervisor):
    """Pins the datagram, for both kinds of address."""
    sock, name = supervisor
    Notifier({"NOTIFY_SOCKET": name}).tell(READY)
    assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("name", ["", "/nowhere/notify"])
def test_nobody_who_listens_is_no_error(name, caplog):
    """Pins that an agent outside systemd is silent, and that a supervisor that went is warned of and survived."""
    Notifier({"NOTIFY_SOCKET": name}).tell(READY)
    assert bool(caplog.records) is bool(name)


@pytest.mark.parametrize(
    ("environment", "beat_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 1.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_beat_is_a_third_of_the_patience(environment, beat_s):
    """Pins whom the watchdog means, and that two late beats are forgiven."""
    assert Notifier(environment, pid=7).beat_s == beat_s


@pytest.fixture
def config(tmp_path):
    (tmp_path / "root.json").write_text("{}")
    path = tmp_path / "agent.toml"
    path.write_text(
        f'site = "plant"\nnode = "dev-1"\nmodel = "m"\ndata_dir = "{tmp_path}/data"\n'
        f'trusted_root = "{tmp_path}/root.json"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n'
        f'[source]\nkind = "host"\nvalues = ["load_1m"]\n'
    )
    return path


def test_agent_is_ready_alive_and_stopping(supervisor, config):
    """Pins a whole life in systemd's eyes: ready without any network, beats while the loop turns, then the end."""
    pytest.importorskip("psutil", reason="left out: needs shoal[sensors]")
    sock, name = supervisor
    environment = {**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "150000", "SHOAL_PASSWORD": "hunter2"}
    command = [sys.executable, "-m", "device_agent", "run", "--config", str(config), "--log-format", "json"]
    command += ["--log-level", "DEBUG"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        said = [sock.recv(100).decode() for _ in range(4)]
        process.send_signal(signal.SIGTERM)
        while said[-1] != STOPPING:
            said.append(sock.recv(100).decode())
        errors = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0
    assert sorted(said[:2]) == sorted([READY, ALIVE])
    assert set(said[2:-1]) == {ALIVE}
    entries = [json.loads(line) for line in errors.splitlines() if not line.startswith("INFO:")]
    assert any("connect failed" in entry["message"] and entry["level"] == "WARNING" for entry in entries)
    assert "hunter2" not in errors


def test_loop_that_hangs_does_not_beat(supervisor):
    """Pins what the watchdog rests on: the beat is the loop's own, so that a callback which blocks silences it."""
    sock, name = supervisor
    sock.setblocking(False)
    service, loop = Notifier({"NOTIFY_SOCKET": name}), Loop()
    beats = []

    def count():
        try:
            while True:
                beats.append(sock.recv(100))
        except BlockingIOError:
            return len(beats)

    seen = []
    loop.call_every(0.01, lambda _: service.tell(ALIVE))
    loop.call_at(loop.clock() + 0.05, lambda _: seen.extend((count(), _spin(loop, 0.1), count())))
    loop.run(until=lambda: bool(seen))
    loop.close()
    assert seen[0] > 0
    assert seen[2] == seen[0]


def _spin(loop, seconds):
    """Hang."""
    end = loop.clock() + seconds
    while loop.clock() < end:
        pass


def test_log_line_is_one_object():
    """Pins the fields that collectors index, the traceback among them, on one line."""
    try:
        int("two\nlines")
    except ValueError:
        record = logging.LogRecord("device_agent.x", logging.ERROR, __file__, 1, "bad n=%d", (3,), sys.exc_info())
    line = JsonFormatter().format(record)
    entry = json.loads(line)
    assert "\n" not in line
    assert entry["at"].endswith("+00:00")
    assert {name: entry[name] for name in ("level", "logger", "message")} == {
        "level": "ERROR", "logger": "device_agent.x", "message": "bad n=3",
    }  # fmt: skip
    assert "ValueError: invalid literal" in entry["error"]


def test_password_is_in_no_representation():
    """Pins that whoever logs a connection's settings logs no secret."""
    assert "hunter2" not in repr(LinkConfig("h", password="hunter2"))


UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "shoal-device.service"


def test_unit_asks_for_what_the_agent_does(tmp_path):
    """Pins the service's file against the agent: notified, watched, not started again after a mistake, and valid."""
    lines = UNIT.read_text().splitlines()
    wanted = ["Type=notify", "RestartPreventExitStatus=2", "RestartForceExitStatus=75", "DynamicUser=yes"]
    assert [line for line in wanted if line not in lines] == []
    limits = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert {"WatchdogSec", "MemoryMax", "CPUQuota", "SystemCallFilter", "RestrictAddressFamilies"} <= limits.keys()
    assert limits["ExecStart"].endswith("shoal device run --config /etc/shoal/agent.toml")
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("left out: needs systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/shoal/bin/shoal device run", "/bin/true"))
    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, copy.name in done.stderr) == (0, False), done.stderr
