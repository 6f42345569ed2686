"""TFLite models on whichever interpreter is installed: LiteRT, or tflite-runtime on machines that it left behind."""

import importlib
from collections.abc import Mapping
from enum import StrEnum, unique
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, ModelError


@unique
class RuntimeKind(StrEnum):
    """Which interpreter runs the models; `auto` takes the first of the others that is installed."""

    AUTO = "auto"
    LITERT = "litert"
    TFLITE = "tflite"


class _Package(NamedTuple):
    """A distribution, its package, and what to install where it is missing.

    Attributes:
        runs_hybrid: it is right on integer weights with float activations, as dynamic-range quantization makes them.
    """

    distribution: str
    name: str
    extra: str
    runs_hybrid: bool


_PACKAGES: Mapping[RuntimeKind, _Package] = MappingProxyType(
    {
        RuntimeKind.LITERT: _Package("ai-edge-litert", "ai_edge_litert", "shoal[device]", runs_hybrid=True),
        # MEASURED: it loads dynamic-range models and answers wrongly, without a word.
        RuntimeKind.TFLITE: _Package(
            "tflite-runtime", "tflite_runtime", "shoal[device-tflite] with numpy below 2", runs_hybrid=False
        ),
    }
)

_WEIGHTS = frozenset(map(np.dtype, (np.int8, np.uint8)))


def runtime_name(kind: RuntimeKind = RuntimeKind.AUTO) -> str:
    """The runtime as it reports itself: `ai-edge-litert 2.3.0`.

    Raises:
        ConfigError: it is not installed.
    """
    package = _installed(kind)
    # The installed metadata knows it too, and reading that costs a device more memory than a model does.
    return f"{package.distribution} {importlib.import_module(package.name).__version__}"


def load(path: Path, kind: str = RuntimeKind.AUTO) -> "TfliteRuntime":
    """Load a model file.

    Raises:
        ModelError: it cannot be read, is not one input and one output, or this runtime would answer it wrongly.
        ConfigError: the runtime is not installed.
    """
    package = _installed(RuntimeKind(kind))
    interpreter_class = importlib.import_module(f"{package.name}.interpreter").Interpreter
    try:
        interpreter = interpreter_class(model_path=str(path), num_threads=1)
        if not package.runs_hybrid:
            _refuse_hybrid(interpreter, path.name, package.distribution)
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
            scale, zero = details["quantization"]
            self._scale, self._zero = np.float32(scale), np.float32(zero)
            # In the tensor's own units: cut off before they are divided, no value is too large for the division.
            self._lowest = (np.float32(limits.min) - self._zero) * self._scale
            self._highest = (np.float32(limits.max) - self._zero) * self._scale

    def quantized(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if self._dtype == np.float32:
            return values
        if self._is_float:
            with np.errstate(over="ignore"):  # too large for half a float is infinite there
                return values.astype(self._dtype)
        clipped: NDArray[np.float32] = np.minimum(np.maximum(values, self._lowest), self._highest)
        steps: NDArray[np.float32] = np.rint(clipped / self._scale) + self._zero
        return steps.astype(self._dtype)

    def dequantized(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if self._is_float:
            return values.astype(np.float32, copy=False)
        return (values.astype(np.float32) - self._zero) * self._scale


def _refuse_hybrid(interpreter: Any, name: str, distribution: str) -> None:  # noqa: ANN401  no types published
    kinds = {tensor["index"]: np.dtype(tensor["dtype"]) for tensor in interpreter.get_tensor_details()}
    # Private, and the only way to what reads what; both runtimes have it.
    for operator in interpreter._get_ops_details():  # noqa: SLF001
        read = {kinds[index] for index in operator["inputs"] if index in kinds}
        if np.dtype(np.float32) in read and read & _WEIGHTS:
            raise ModelError(
                f"{name}: {operator['op_name']} has integer weights and float activations (dynamic-range "
                f"quantization), which {distribution} answers wrongly: quantize it statically, or run it on LiteRT"
            )


def _installed(kind: RuntimeKind = RuntimeKind.AUTO) -> _Package:
    wanted = [_PACKAGES[kind]] if kind in _PACKAGES else list(_PACKAGES.values())
    for package in wanted:
        if find_spec(package.name) is not None:
            return package
    raise ConfigError(f"no TFLite runtime for {kind.value!r}: install {' or '.join(item.extra for item in wanted)}")
