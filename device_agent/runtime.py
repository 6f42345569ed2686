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
        self._input, self._output = _TensorKind(inputs[0]), _TensorKind(outputs[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Without the batch dimension."""
        return self._input.shape

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Answer scaled float32 rows (n, *shape) with float32 outputs (n, ...), one invocation each.

        Raises:
            ModelError: a row has another shape, or the runtime failed on it.
        """
        if len(inputs) == 1:
            return self._invoke(inputs)
        return np.concatenate([self._invoke(inputs[row : row + 1]) for row in range(len(inputs))])

    def _invoke(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        if row.shape[1:] != self._input.shape:
            raise ModelError(f"input {list(row.shape[1:])}, the model takes {list(self._input.shape)}")
        try:
            self._interpreter.set_tensor(self._input.index, self._input.quantized(row))
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as exc:
            raise ModelError(f"inference failed: {exc}") from exc
        return self._output.dequantized(self._interpreter.get_tensor(self._output.index))


class _TensorKind:
    """How one tensor of a model is laid out and quantized; asked once, because asking costs more than converting."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.index: int = details["index"]
        self.shape = tuple(int(size) for size in details["shape"][1:])
        self._dtype = np.dtype(details["dtype"])
        self._is_float = self._dtype.kind == "f"
        if not self._is_float:
            limits = np.iinfo(self._dtype)
            self._lowest, self._highest = np.float32(limits.min), np.float32(limits.max)
            scale, zero = details["quantization"]
            self._scale, self._zero = np.float32(scale), np.float32(zero)

    def quantized(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if self._is_float:
            return values.astype(self._dtype, copy=False)
        steps = np.rint(values / self._scale) + self._zero
        clipped: NDArray[np.float32] = np.minimum(np.maximum(steps, self._lowest), self._highest)
        return clipped.astype(self._dtype)

    def dequantized(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if self._is_float:
            return values.astype(np.float32, copy=False)
        return (values.astype(np.float32) - self._zero) * self._scale


def _installed() -> tuple[str, str]:
    for distribution, module in _RUNTIMES:
        try:
            version(distribution)
        except PackageNotFoundError:
            continue
        return distribution, module
    raise ConfigError("no TFLite runtime: install shoal[device], or shoal[device-tflite] with numpy below 2")
