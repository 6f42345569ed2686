"""Run an artefact's golden vectors before it may answer anybody.

A model file is code: it can crash the process, allocate without end or never return. So the node's own runtime loads
it in a child process, under limits of memory, CPU and wall time, and only a verdict comes back.

    python -m shoal.release.selftest RUNTIME_MODULE ARTEFACT_FILE MEMORY_BYTES CPU_S VERDICT_FD < artefact message
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ModelError, PayloadError
from shoal.release.chunks import digest
from shoal.tensors import to_array
from shoal.v1.release_pb2 import Artefact

_REASON_BYTES = 300
_STDERR_BYTES = 4096


class Runtime(Protocol):
    """A loaded model."""

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Answer scaled float32 inputs of shape (n, *shape) with float32 outputs of shape (n, *output shape)."""


@unique
class Outcome(Enum):
    PASSED = "passed"
    # The artefact is at fault, and would be again.
    FAILED = "failed"
    # The node may have been at fault (no time, no process): worth another try.
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    reason: str = ""


class Trial(Protocol):
    """A self-test under way."""

    def poll(self, now: float) -> Verdict | None: ...

    def cancel(self) -> None: ...


class SelfTester(Protocol):
    """Starts self-tests; the simulator shares verdicts between devices behind this port."""

    def start(self, path: Path, artefact: Artefact, now: float) -> Trial: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one self-test.

    Attributes:
        memory_bytes: address space, runtime and libraries included. Small models pass under 512 MiB in LiteRT,
            tflite-runtime and ONNX Runtime alike, on x86_64.
    """

    memory_bytes: int = 1 << 30
    cpu_s: int = 30
    wall_s: float = 60.0


def run_golden(runtime: Runtime, artefact: Artefact) -> None:
    """Compare the runtime's answers with the golden vectors, row by row, as a device does.

    Raises:
        ModelError: an output has another shape, is not finite, or is further off than the tolerance.
    """
    try:
        inputs = to_array(artefact.golden.inputs, "golden.inputs")
        expected = to_array(artefact.golden.outputs, "golden.outputs")
    except PayloadError as exc:
        raise ModelError(f"golden vectors cannot be read: {exc}") from exc
    if inputs.ndim < 1 or len(inputs) == 0 or expected.ndim < 1 or len(inputs) != len(expected):
        raise ModelError(f"{list(inputs.shape)} golden inputs with {list(expected.shape)} outputs")
    for index in range(len(inputs)):
        output = np.asarray(runtime.run(inputs[index : index + 1]))
        wanted = expected[index : index + 1]
        if output.shape != wanted.shape:
            raise ModelError(f"golden vector {index}: output {list(output.shape)}, expected {list(wanted.shape)}")
        # NaN compares false with everything, so ask what is right and not what is wrong.
        with np.errstate(invalid="ignore", over="ignore"):
            worst = float(np.max(np.abs(output - wanted), initial=0.0))
        if not worst <= artefact.golden.tolerance:
            raise ModelError(f"golden vector {index}: off by {worst:g}, at most {artefact.golden.tolerance:g}")


class ChildSelfTest:
    """Runs each self-test in a process of its own.

    Args:
        runtime_module: has `load(path: Path) -> Runtime`; only the child imports it. `module:kind` hands on `kind`.
    """

    def __init__(self, runtime_module: str, limits: Limits | None = None) -> None:
        self._runtime_module = runtime_module
        self._limits = limits or Limits()

    def start(self, path: Path, artefact: Artefact, now: float) -> "ChildTrial":
        """Start a child; poll what is returned."""
        read_end, write_end = os.pipe()
        limits = self._limits
        arguments = [self._runtime_module, str(path), str(limits.memory_bytes), str(limits.cpu_s), str(write_end)]
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  the trial closes it
        try:
            # A file and not a pipe: golden vectors may exceed what a pipe holds, and nobody here may block.
            with tempfile.TemporaryFile() as stdin:
                stdin.write(artefact.SerializeToString())
                stdin.seek(0)
                process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                    [sys.executable, "-m", "shoal.release.selftest", *arguments],
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=(write_end,),
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                )
        except OSError:
            os.close(read_end)
            stderr.close()
            raise
        finally:
            os.close(write_end)
        return ChildTrial(process, os.fdopen(read_end, "rb"), stderr, now + limits.wall_s)


class ChildTrial:
    """One child. Never blocks but for reaping a child that was killed."""

    def __init__(self, process: "subprocess.Popen[bytes]", pipe: IO[bytes], stderr: IO[bytes], deadline: float) -> None:
        self._process = process
        self._pipe = pipe
        self._stderr = stderr
        self._deadline = deadline

    def poll(self, now: float) -> Verdict | None:
        """Return the verdict once there is one; do not poll again after that."""
        code = self._process.poll()
        if code is None:
            if now < self._deadline:
                return None
            self.cancel()
            return Verdict(Outcome.UNDECIDED, "no verdict in time")
        verdict = self._read_verdict(code)
        self._close()
        return verdict

    def cancel(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        self._pipe.close()
        self._stderr.close()

    def _read_verdict(self, code: int) -> Verdict:
        line = self._pipe.read()
        if line:
            reason = str(json.loads(line)["reason"])
            return Verdict(Outcome.FAILED, reason) if reason else Verdict(Outcome.PASSED)
        self._stderr.seek(0)
        tail = self._stderr.read(_STDERR_BYTES).decode(errors="replace").strip().rpartition("\n")[2]
        return Verdict(Outcome.FAILED, f"the self-test died with {code}: {tail}"[:_REASON_BYTES])


def selftest_in_child(
    path: Path,
    artefact: Artefact,
    runtime_module: str,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    limits: Limits | None = None,
) -> Verdict:
    """Run a self-test and wait for its verdict: for commands, not for loops."""
    trial = ChildSelfTest(runtime_module, limits).start(path, artefact, clock())
    while (verdict := trial.poll(clock())) is None:
        sleep(0.02)
    return verdict


def _judge(runtime_module: str, path: Path, artefact: Artefact) -> str:
    """Return why the artefact is refused; empty when it passes."""
    try:
        if digest(path.read_bytes()) != artefact.sha256:
            raise ModelError("the file is not the artefact that was signed")  # noqa: TRY301
        name, _, kind = runtime_module.partition(":")
        run_golden(importlib.import_module(name).load(path, *filter(None, [kind])), artefact)
    except Exception as exc:  # noqa: BLE001  whatever a model file provokes is a verdict on it
        return f"{type(exc).__name__}: {exc}"[:_REASON_BYTES]
    return ""


def main(arguments: list[str]) -> None:
    runtime_module, path, memory_bytes, cpu_s, verdict_fd = arguments
    artefact = Artefact.FromString(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), int(cpu_s)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reason = _judge(runtime_module, Path(path), artefact)
    os.write(int(verdict_fd), json.dumps({"reason": reason}).encode())
    # tflite-runtime crashes at teardown on some good models; the verdict is out, so leave without one.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
