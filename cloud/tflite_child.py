"""Runs TFLite artefacts in tflite-runtime, in a child process: it lives in an environment of its own, with numpy 1.

    PYTHON -m cloud.tflite_child FOLDER     (what `ask_child` starts)

The folder holds `job.npz` and one numbered file for each artefact; the child adds `answers.npz`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud.measure import interleave, repeats_for
from shoal.errors import ModelError

_ROOT = Path(__file__).parents[1]
_JOB, _ANSWERS = "job.npz", "answers.npz"
_MAX_COMPLAINT = 500


@dataclass(frozen=True, slots=True)
class ChildAnswers:
    """What each artefact answered and took.

    Attributes:
        outputs: (n, ...) float32 of each artefact.
        taken_ns: (rounds, artefacts), of one call with the first row, see `interleave`.
    """

    outputs: tuple[NDArray[np.float32], ...]
    taken_ns: NDArray[np.float64]


def ask_child(
    python: Path, models: Sequence[bytes], rows: NDArray[np.float32], *, rounds: int, turn_s: float, timeout_s: float
) -> ChildAnswers:
    """Run artefacts on scaled rows (n, *shape), and time them against each other.

    Args:
        python: of an environment with tflite-runtime.
        models: TFLite, batch 1, float32 to float32.
        rows: what to answer.
        rounds: of timing.
        turn_s: how long an artefact runs in each.
        timeout_s: of the whole.

    Raises:
        ModelError: the child failed or took too long.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        np.savez(folder / _JOB, rows=rows, rounds=rounds, turn_s=turn_s)
        for number, model in enumerate(models):
            (folder / f"{number}.tflite").write_bytes(model)
        command = [str(python), "-m", "cloud.tflite_child", str(folder)]
        paths = {"PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'proto'}"}
        try:
            subprocess.run(  # noqa: S603 - no shell; the operator names the program
                command, check=True, capture_output=True, timeout=timeout_s, env={**os.environ, **paths}
            )
        except subprocess.CalledProcessError as exc:
            complaint = exc.stderr.decode(errors="replace").strip()[-_MAX_COMPLAINT:]
            raise ModelError(f"tflite-runtime's process ended with {exc.returncode}: {complaint}") from exc
        except subprocess.TimeoutExpired as exc:
            raise ModelError(f"tflite-runtime's process took more than {timeout_s} s") from exc
        with np.load(folder / _ANSWERS) as answers:
            return ChildAnswers(
                tuple(answers[f"outputs_{number}"] for number in range(len(models))), answers["taken_ns"]
            )


def main(directory: str) -> None:
    """Do the job in the folder."""
    from tflite_runtime.interpreter import Interpreter  # noqa: PLC0415 - only the child's environment has it

    folder = Path(directory)
    with np.load(folder / _JOB) as job:
        rows, rounds, turn_s = job["rows"], int(job["rounds"]), float(job["turn_s"])
    interpreters: list[Any] = []
    while (path := folder / f"{len(interpreters)}.tflite").exists():
        interpreters.append(Interpreter(model_content=path.read_bytes(), num_threads=1))
        interpreters[-1].allocate_tensors()
    calls = [partial(_run, interpreter, rows[:1]) for interpreter in interpreters]
    taken_ns = interleave(calls, rounds=rounds, repeats=repeats_for(calls, turn_s))
    outputs: dict[str, Any] = {f"outputs_{number}": _run(each, rows) for number, each in enumerate(interpreters)}
    np.savez(folder / _ANSWERS, taken_ns=taken_ns, **outputs)


def _run(interpreter: Any, rows: NDArray[np.float32]) -> NDArray[np.float32]:  # noqa: ANN401 - untyped library
    (source,), (sink,) = interpreter.get_input_details(), interpreter.get_output_details()
    outputs = np.empty((len(rows), *sink["shape"][1:]), dtype=np.float32)
    for index in range(len(rows)):
        interpreter.set_tensor(source["index"], rows[index : index + 1])
        interpreter.invoke()
        outputs[index] = interpreter.get_tensor(sink["index"])[0]
    return outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
