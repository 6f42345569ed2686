"""ONNX models on ONNX Runtime."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from shoal.errors import ModelError

_DTYPES = {"tensor(float)": np.float32}


def runtime_name() -> str:
    """The runtime and the providers that a session really gets: `onnxruntime 1.32.0 CPUExecutionProvider`."""
    return f"onnxruntime {version('onnxruntime')} CPUExecutionProvider"


def load(path: Path) -> "OnnxRuntime":
    """Load a model file.

    Raises:
        ModelError: it cannot be read, is not one float32 input and one output, or has a fixed batch above 1.
    """
    options = onnxruntime.SessionOptions()
    # One thread, no spinning: an idle gateway must not burn a core, and the loop's thread does the work.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        # onnxruntime's errors have no common base below Exception.
        raise ModelError(f"{path.name}: {exc}") from exc
    return OnnxRuntime(session, path.name)


class OnnxRuntime:
    """One session; any number of rows at a time, or one by one where the model's batch is fixed to 1."""

    def __init__(self, session: Any, name: str) -> None:  # noqa: ANN401  onnxruntime publishes no types
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelError(f"{name}: {len(inputs)} inputs and {len(outputs)} outputs, expected one of each")
        if inputs[0].type not in _DTYPES:
            raise ModelError(f"{name}: input {inputs[0].name} is {inputs[0].type}, expected tensor(float)")
        batch, *shape = inputs[0].shape
        if not all(isinstance(size, int) for size in shape) or (isinstance(batch, int) and batch != 1):
            raise ModelError(f"{name}: input shape {inputs[0].shape}, expected a free batch or 1, then fixed sizes")
        self._session = session
        self._input = inputs[0].name
        self._is_batched = not isinstance(batch, int)
        self.input_shape: tuple[int, ...] = tuple(shape)

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Answer scaled float32 rows (n, *shape) with float32 outputs (n, ...).

        Raises:
            ModelError: the runtime failed on this batch.
        """
        rows = inputs.astype(np.float32, copy=False)
        parts = [rows] if self._is_batched else [rows[index : index + 1] for index in range(len(rows))]
        try:
            outputs = [self._session.run(None, {self._input: part})[0] for part in parts]
        except Exception as exc:
            # onnxruntime's errors have no common base below Exception.
            raise ModelError(f"inference failed: {exc}") from exc
        output = np.concatenate(outputs) if len(outputs) > 1 else outputs[0]
        if len(output) != len(rows):
            raise ModelError(f"{len(rows)} rows in, {len(output)} out")
        return np.asarray(output)
