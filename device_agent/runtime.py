"""TFLite models on whichever interpreter is installed: LiteRT, or tflite-runtime on machines that it left behind."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, ModelError

# Distribution and module; the first that is installed is used.
_RUNTIMES = (("ai-edge-litert", "ai_edge_litert.interpreter"), ("tflite-runtime", "tflite_runtime.interpreter"))


def runtime_name() -> str:
    """The installed runtime as it reports itself: `ai-edge-litert 2.3.0`.

    Raises:
        ConfigError: none is installed.
    """
    distribution, _ = _installed()
    return f"{distribution} {version(distribution)}"


def load(path: Path) -> "TfliteRuntime":
    """Load a model file.

    Raises:
        ModelError: it cannot be read, or is not one input and one output.
        ConfigError: no TFLite runtime is installed.
    """
    interpreter_class = importlib.import_module(_installed()[1]).Interpreter
    try:
        interpreter = interpreter_class(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as exc:
        raise ModelError(f"{path.name}: {exc}") from exc
    return TfliteRuntime(interpreter, path.name)


class TfliteRuntime:
    """One interpreter, batch 1. Quantized inputs and outputs are converted with the tensor's own scale."""

    def __init__(self, interpreter: Any, name: str) -> None:  # noqa: ANN401  neither runtime publishes types
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelError(f"{name}: {len(inputs)} inputs and {len(outputs)} outputs, expected one of each")
        self._interpreter = interpreter
        self._input, self._output = inputs[0], outputs[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Without the batch dimension."""
        return tuple(int(size) for size in self._input["shape"][1:])

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Answer scaled float32 rows (n, *shape) with float32 outputs (n, ...), one invocation each.

        Raises:
            ModelError: a row has another shape, or the runtime failed on it.
        """
        return np.concatenate([self._invoke(inputs[row : row + 1]) for row in range(len(inputs))])

    def _invoke(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        details = self._input
        if row.shape[1:] != self.input_shape:
            raise ModelError(f"input {list(row.shape[1:])}, the model takes {list(self.input_shape)}")
        try:
            self._interpreter.set_tensor(details["index"], _quantized(row, details))
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as exc:
            raise ModelError(f"inference failed: {exc}") from exc
        return _dequantized(self._interpreter.get_tensor(self._output["index"]), self._output)


def _installed() -> tuple[str, str]:
    for distribution, module in _RUNTIMES:
        try:
            version(distribution)
        except PackageNotFoundError:
            continue
        return distribution, module
    raise ConfigError("no TFLite runtime: install shoal[device], or shoal[device-tflite] with numpy below 2")


def _quantized(values: NDArray[np.float32], details: dict[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(details["dtype"])
    if dtype.kind == "f":
        return values.astype(dtype, copy=False)
    scale, zero = details["quantization"]
    limits = np.iinfo(dtype)
    return np.asarray(np.clip(np.rint(values / scale) + zero, limits.min, limits.max), dtype=dtype)


def _dequantized(values: NDArray[Any], details: dict[str, Any]) -> NDArray[np.float32]:
    if np.dtype(details["dtype"]).kind == "f":
        return values.astype(np.float32)
    scale, zero = details["quantization"]
    return np.asarray((values.astype(np.float32) - zero) * scale, dtype=np.float32)
