"""The demo's processes: started together, watched, started again where that is wanted, and all gone at the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.errors import ShoalError

# Ctrl-C promises five seconds; what has not ended by now is killed.
_GRACE_S = 3.0
_POLL_S = 0.02
_LOG_TAIL_BYTES = 800


class ProcessDiedError(ShoalError):
    """A process ended that should not have; its log's last words are in the message."""


@dataclass(slots=True)
class Child:
    """One process and its log.

    Attributes:
        finite: it is meant to end by itself, with status 0.
        restarts: how often it was started again.
        is_swept: it has ended, and what it had started has been killed.
    """

    name: str
    arguments: list[str]
    log: Path
    finite: bool
    process: "subprocess.Popen[bytes]"
    restarts: int = 0
    is_swept: bool = False

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def sweep(self) -> None:
        """Kill what is left of its group: a trainer that was killed leaves a build behind.

        Once only, because the number of a group that is gone may become another's.
        """
        if not self.is_swept:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.is_swept = True


class Processes:
    """Starts Python modules of this installation, each in a process group of its own. Use it with `with`.

    `pids.json` in the directory always names what runs, for people who want to break something.
    """

    def __init__(self, directory: Path, *, keep_going: bool) -> None:
        self._directory = directory
        self._keep_going = keep_going
        self.children: dict[str, Child] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, module: str, *arguments: str, finite: bool = False) -> None:
        """Start `python -m module arguments`, its output in `NAME.log`."""
        log = self._directory / f"{name}.log"
        command = [sys.executable, "-m", module, *arguments]
        self.children[name] = Child(name, command, log, finite, _spawn(command, log))
        self._write_pids()

    def run(self, module: str, *arguments: str) -> None:
        """Run a module to its end.

        Raises:
            ProcessDiedError: it failed.
        """
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, capture_output=True, check=False, text=True)  # noqa: S603
        if done.returncode:
            raise ProcessDiedError(f"{module} {' '.join(arguments)}: {done.stderr.strip()[-_LOG_TAIL_BYTES:]}")

    def watch(self) -> list[str]:
        """Look after everybody; return the names of those that were started again.

        Raises:
            ProcessDiedError: one died, and it was not said to keep going.
        """
        restarted = []
        for child in self.children.values():
            code = child.process.poll()
            if code is None:
                continue
            child.sweep()
            if child.finite and code == 0:
                continue
            if not self._keep_going:
                raise ProcessDiedError(f"{child.name} ended with {code}: {_tail(child.log)}")
            child.restarts += 1
            child.process = _spawn(child.arguments, child.log)
            child.is_swept = False
            restarted.append(child.name)
        if restarted:
            self._write_pids()
        return restarted

    def end(self, *names: str) -> None:
        """Ask these to end, and give them a few seconds for it."""
        running = [child for child in map(self.children.__getitem__, names) if child.is_running]
        for child in running:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while any(child.is_running for child in running) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End all of them at once: SIGTERM, a few seconds of grace, then SIGKILL to what is left of each group."""
        try:
            self.end(*self.children)
        finally:
            # Also when somebody presses Ctrl-C again.
            for child in self.children.values():
                child.sweep()
            for child in self.children.values():
                child.process.wait()

    def _write_pids(self) -> None:
        pids = {name: child.process.pid for name, child in self.children.items()}
        (self._directory / "pids.json").write_text(json.dumps(pids, indent=2) + "\n", encoding="utf-8")


def _spawn(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    # One thread for each process and library: thirty processes share the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )


def _tail(log: Path) -> str:
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
