"""Starts an MQTT 5 broker as a child process: Mosquitto where it is installed, otherwise the embedded iotcore.

    python -m fleet_console.broker CONFIG    (how the embedded broker is run in its own process)

Only the standard library is imported at the top: tests use this on small machines too.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, unique
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from shoal.codec import MAX_PAYLOAD_BYTES
from shoal.errors import ConfigError

_READY_S = 15.0
_STOP_S = 5.0
_POLL_S = 0.02
_FOREGROUND_POLL_S = 0.1
_PROFILE = Path(__file__).parent / "profiles" / "mosquitto-dev.conf"
# Debian puts it where only root's PATH looks.
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LOG_TAIL_BYTES = 600
# A free port may be taken before the broker binds it.
_PORT_ATTEMPTS = 5
# What both write once they own the port. A connection alone proves nothing: it may reach whoever was faster.
_RUNNING = b" running"


class _PortTakenError(ConfigError):
    """Another port may do."""


@unique
class BrokerKind(Enum):
    MOSQUITTO = "mosquitto"
    IOTCORE = "iotcore"


@dataclass(slots=True)
class RunningBroker:
    """A broker of ours."""

    kind: BrokerKind
    version: str
    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def name(self) -> str:
        return self.kind.value

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End it; kill it where it does not obey."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def find_mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SEARCH_PATH)


def choose_kind() -> BrokerKind:
    """Mosquitto where it is installed, otherwise the embedded broker."""
    return BrokerKind.MOSQUITTO if find_mosquitto() else BrokerKind.IOTCORE


@contextlib.contextmanager
def start_broker(
    directory: Path, kind: BrokerKind | None = None, port: int | None = None, extra_config: str = ""
) -> Iterator[RunningBroker]:
    """Run a broker on loopback while the block runs.

    Args:
        directory: for its configuration, database and log.
        kind: None chooses.
        port: None takes a free one.
        extra_config: lines appended to Mosquitto's configuration.

    Raises:
        ConfigError: it is not installed, or did not start; the message ends with its own last words.
    """
    chosen = kind or choose_kind()
    broker = (
        _launch_anywhere(directory, chosen, extra_config)
        if port is None
        else _launch(directory, chosen, port, extra_config)
    )
    try:
        yield broker
    finally:
        broker.stop()


def run_foreground(directory: Path, kind: BrokerKind | None, port: int) -> int:
    """Run a broker until it ends, Ctrl-C or SIGTERM; return its exit status."""
    asked_to_stop = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    # No exception: one raised while the broker's process is being made would lose it, and it has a session of its own.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with start_broker(directory, kind, port) as broker:
            while broker.process.poll() is None and not asked_to_stop:
                time.sleep(_FOREGROUND_POLL_S)
            return 0 if asked_to_stop else broker.process.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launch_anywhere(directory: Path, kind: BrokerKind, extra_config: str) -> RunningBroker:
    for _ in range(_PORT_ATTEMPTS - 1):
        with contextlib.suppress(_PortTakenError):
            return _launch(directory, kind, free_port(), extra_config)
    return _launch(directory, kind, free_port(), extra_config)


def _launch(directory: Path, kind: BrokerKind, port: int, extra_config: str) -> RunningBroker:
    directory.mkdir(parents=True, exist_ok=True)
    if _is_taken(port):
        raise _PortTakenError(f"port {port} is taken; choose another, or use the broker there with SHOAL_BROKER")
    command, found = (
        _mosquitto(directory, port, extra_config) if kind is BrokerKind.MOSQUITTO else _iotcore(directory, port)
    )
    log = directory / f"{kind.value}.log"
    with log.open("wb") as output:
        # A session of its own: Ctrl-C goes to whoever started us, who stops it last.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)  # noqa: S603
    broker = RunningBroker(kind, found, port, process)
    try:
        _wait_until_ready(broker, log)
    except BaseException:
        broker.stop()
        raise
    return broker


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        # As brokers do, or connections of the last one would count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


def _mosquitto(directory: Path, port: int, extra_config: str) -> tuple[list[str], str]:
    binary = find_mosquitto()
    if binary is None:
        raise ConfigError("mosquitto is not installed: apt-get install mosquitto, or use the embedded broker iotcore")
    lines = [_PROFILE.read_text(), f"listener {port} 127.0.0.1", f"persistence_location {directory}/", extra_config]
    if os.geteuid() == 0:
        lines.append("user root")  # it would become another user, who cannot write its database here
    config = directory / "mosquitto.conf"
    config.write_text("\n".join(lines) + "\n")
    helped = subprocess.run([binary, "-h"], capture_output=True, text=True, check=False)  # noqa: S603
    found = re.search(r"version (\S+)", helped.stdout)
    return [binary, "-c", str(config)], found[1] if found else "unknown"


def _iotcore(directory: Path, port: int) -> tuple[list[str], str]:
    try:
        found = version("iotcore")
    except PackageNotFoundError as exc:
        raise ConfigError("iotcore is not installed: pip install 'shoal[console]', or install mosquitto") from exc
    config = directory / "iotcore.toml"
    config.write_text(_iotcore_config(port))
    return [sys.executable, "-m", "fleet_console.broker", str(config)], found


def _iotcore_config(port: int) -> str:
    # The only settings under which it speaks MQTT 5 and passes 1 MiB; sizes are for up to a hundred nodes.
    return f"""\
id = 0

[router]
id = 0
max_connections = 20000
max_outgoing_packet_count = 2000
max_segment_size = 104857600
max_segment_count = 10
initialized_filters = []

[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {MAX_PAYLOAD_BYTES}
max_inflight_count = 500
dynamic_filters = true
"""


def _wait_until_ready(broker: RunningBroker, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if broker.process.poll() is not None:
            break
        if _RUNNING in log.read_bytes() and _answers(broker.port):
            return
        time.sleep(_POLL_S)
    tail = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    died = broker.process.poll() is not None
    error = _PortTakenError if died and _is_taken(broker.port) else ConfigError
    raise error(f"{broker.name} did not start on port {broker.port}: {tail or 'it said nothing'}")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _serve_iotcore(config: str) -> None:
    from iotcore import Broker  # noqa: PLC0415  only this process needs it

    stops = {signal.SIGTERM, signal.SIGINT}
    with Broker(config_path=config):
        # Only now: its own child would inherit the mask, ignore SIGTERM and be killed after five seconds.
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        sys.stderr.write("iotcore running\n")
        sys.stderr.flush()
        signal.sigwait(stops)


if __name__ == "__main__":
    _serve_iotcore(sys.argv[1])
