"""Servers and generators as processes: started, watched, ended, and what processor time each took."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_START_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.05
_GRACE_S = 60.0
_ROOT = Path(__file__).parent.parent.parent
_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Measured:
    """What a generator printed, and the CPU time of all who took part, in microseconds a request."""

    figures: Mapping[str, Any]
    cpu_us: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {**self.figures, "cpu_us": dict(self.cpu_us)}


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, with this tree first on the path: other environments do not have Shoal installed."""
    return {**os.environ, "PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}", **(extra or {})}


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, *, ready: str = "", port: int = 0, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a server while the block runs, from when its log has the line `ready` or its port answers; yields its pid.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has its last words.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(env),
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, log, ready, port)
        yield process.pid
    finally:
        _end(process)


def measure(command: Sequence[str], servers: Mapping[str, int], seconds: float) -> Measured:
    """Run a generator whose last line is JSON; `servers` are the pids of those it asks, by name.

    Raises:
        RuntimeError: it failed.
    """
    before = {name: cpu_seconds(pid) for name, pid in servers.items()}
    ended_before = _ended_children_s()
    generator = subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = generator.communicate(timeout=seconds + _GRACE_S)
    except subprocess.TimeoutExpired as exc:
        generator.kill()
        raise RuntimeError(f"{command[0]} did not end") from exc
    spent = {name: cpu_seconds(pid) - before[name] for name, pid in servers.items()}
    if generator.returncode != 0:
        raise RuntimeError(f"{command[0]}: {errors.strip() or output.strip()}")
    figures = json.loads(output.strip().splitlines()[-1])
    # wrk cannot say; that of children that ended includes the reading of the requests.
    spent["generator"] = figures.pop("cpu_s", _ended_children_s() - ended_before)
    requests = max(1, figures["requests"])
    return Measured(figures, {name: round(_MICROSECONDS * spent_s / requests, 2) for name, spent_s in spent.items()})


def cpu_seconds(pid: int) -> float:
    """Of a process and its living children."""
    process = psutil.Process(pid)
    total = 0.0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def _ended_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path, ready: str, port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if (ready and f"{ready}\n" in log.read_text(errors="replace")) or (port and _answers(port)):
            return
        time.sleep(_POLL_S)
    raise RuntimeError(f"{process.args!r} is not ready: {log.read_text(errors='replace')[-2000:]}")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The whole session: some servers leave workers behind when they are killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
