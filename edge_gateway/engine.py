"""ONNX models on ONNX Runtime.

One session for a model, one thread in each call: an idle gateway must not burn a core, and callers share the session
from as many threads as there are cores. Arrays that the session reads and writes are allocated once for each caller,
where the model lets us.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from shoal.errors import ModelError

CPU = "CPUExecutionProvider"

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}
# How many callers' arrays are kept: more threads than this would not fit a gateway's cores.
_MAX_BUFFERS = 64

Outputs = list[NDArray[Any]]


def runtime_name(providers: Sequence[str] = (CPU,)) -> str:
    """The runtime and its first provider: `onnxruntime 1.32.0 CPUExecutionProvider`."""
    try:
        found = version("onnxruntime")
    except PackageNotFoundError:
        found = version("onnxruntime-gpu")
    return f"onnxruntime {found} {providers[0]}"


def load(path: Path, providers: Sequence[str] = (CPU,)) -> "OnnxRuntime":
    """Load a model file.

    `providers` are those to try, the best first; what the session really got is `OnnxRuntime.providers`.

    Raises:
        ModelError: it cannot be read or served; the message says why.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=list(providers))
    except Exception as exc:
        # onnxruntime's errors have no common base below Exception.
        raise ModelError(f"{path.name}: {exc}") from exc
    return OnnxRuntime(session, path.name)


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a model: its name, element type, and the shape of one row."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return math.prod(self.shape)


class OnnxRuntime:
    """One session that any number of threads may call.

    A model's batch is the first dimension of its inputs. Where it is free, all rows go in one call; where it is fixed
    to k, rows go k by k, the last call filled with zeros; where it is free on paper only, one by one. Several inputs
    take their parts of a row one after the other, in the model's own order, each converted to its element type.

    Attributes:
        inputs: what one row is made of.
        input_shape: of a row: the one input's shape, or the number of values of all of them.
        providers: that the session really has.
    """

    def __init__(self, session: Any, name: str) -> None:  # noqa: ANN401  onnxruntime publishes no types
        self._session = session
        self._name = name
        batches = [_batch(name, item) for item in session.get_inputs()]
        self.inputs = [_port(name, item) for item in session.get_inputs()]
        if not self.inputs:
            raise ModelError(f"{name}: it has no input")
        if len(set(batches)) > 1:
            raise ModelError(f"{name}: its inputs have batches of {batches}, expected the same")
        self._fixed_batch = batches[0]
        self._outputs = [item.name for item in session.get_outputs()]
        one = len(self.inputs) == 1
        self.input_shape = self.inputs[0].shape if one else (sum(port.values for port in self.inputs),)
        self.providers: list[str] = session.get_providers()
        self._free: deque[_Buffers] = deque()
        self._row_shapes = self._probe()

    @property
    def outputs(self) -> list[str]:
        """Their names, in the model's order; the first is the one that is scored."""
        return self._outputs

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Answer rows (n, *input_shape) with the first output, as float32 (n, ...).

        Raises:
            ModelError: the runtime failed on this batch.
        """
        first = self.run_all(inputs)[0]
        return first.astype(np.float32, copy=False) if first.dtype != np.float32 else first

    def run_all(self, inputs: NDArray[Any]) -> Outputs:
        """Answer rows (n, *input_shape) with all outputs, each (n, ...) in its own element type.

        Raises:
            ModelError: the runtime failed on this batch.
        """
        try:
            if self._row_shapes is not None and inputs.dtype == np.float32:
                return self._run_bound(inputs)
            return self._run_parts(inputs)
        except ModelError:
            raise
        except Exception as exc:
            # onnxruntime's errors have no common base below Exception.
            raise ModelError(f"inference failed: {exc}") from exc

    def _run_parts(self, inputs: NDArray[Any]) -> Outputs:
        """Call as often as the model's own batch demands."""
        step = self._fixed_batch or len(inputs)
        parts = [self._call(inputs[start : start + step]) for start in range(0, len(inputs), step)]
        return parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _call(self, rows: NDArray[Any]) -> Outputs:
        count = len(rows)
        if self._fixed_batch and count < self._fixed_batch:
            rows = np.concatenate([rows, np.zeros((self._fixed_batch - count, *rows.shape[1:]), rows.dtype)])
        outputs: Outputs = [np.asarray(output) for output in self._session.run(self._outputs, self._feed(rows))]
        if self._fixed_batch == 1:  # then all of an output is the one row's, whether or not it says so
            outputs = [output if output.ndim and len(output) == 1 else output[None] for output in outputs]
        for name, output in zip(self._outputs, outputs, strict=True):
            if output.ndim == 0 or len(output) != len(rows):
                raise ModelError(f"output {name}: {list(output.shape)} for {len(rows)} rows")
        return [output[:count] for output in outputs]

    def _feed(self, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        feed = {}
        start = 0
        flat = rows.reshape(len(rows), -1)
        for port in self.inputs:
            part = flat[:, start : start + port.values]
            feed[port.name] = np.ascontiguousarray(part.astype(port.dtype, copy=False)).reshape(-1, *port.shape)
            start += port.values
        return feed

    def _probe(self) -> list[tuple[int, ...]] | None:
        """The shape of a row of each output; None where it depends on the batch or arrays cannot be bound."""
        if not self._fixed_batch and not self._takes_two():
            self._fixed_batch = 1
        try:
            one = self._call(np.zeros((1, *self.input_shape), np.float32))
        except ModelError:
            raise
        except Exception as exc:
            raise ModelError(f"{self._name}: it fails on zeros: {exc}") from exc
        is_bindable = (
            not self._fixed_batch
            and len(self.inputs) == 1
            and self.inputs[0].dtype == np.float32
            and all(output.dtype == np.float32 for output in one)
            and self.providers[0] == CPU  # elsewhere the arrays would have to live on the device
        )
        if not is_bindable:
            return None
        shapes = [output.shape[1:] for output in one]
        two = self._call(np.zeros((2, *self.input_shape), np.float32))
        return shapes if shapes == [output.shape[1:] for output in two] else None

    def _takes_two(self) -> bool:
        try:
            self._call(np.zeros((2, *self.input_shape), np.float32))
        except Exception:  # noqa: BLE001  onnxruntime's errors have no common base below Exception
            return False
        return True

    def _run_bound(self, inputs: NDArray[np.float32]) -> Outputs:
        count = len(inputs)
        try:
            buffers = self._free.pop()
        except IndexError:
            buffers = _Buffers()
        if count > buffers.capacity:
            shapes = self._row_shapes or []
            buffers = _Buffers.of(count, self.input_shape, shapes)
        np.copyto(buffers.rows[:count], inputs.reshape(count, *self.input_shape))
        self._session.run_with_iobinding(buffers.bindings.get(count) or self._bind(buffers, count))
        outputs = [output[:count].copy() for output in buffers.outputs]
        if len(self._free) < _MAX_BUFFERS:
            self._free.append(buffers)
        return outputs

    def _bind(self, buffers: "_Buffers", count: int) -> Any:  # noqa: ANN401
        binding = self._session.io_binding()
        pairs = [(binding.bind_input, self.inputs[0].name, buffers.rows)]
        pairs += [
            (binding.bind_output, name, output) for name, output in zip(self._outputs, buffers.outputs, strict=True)
        ]
        for bind, name, array in pairs:
            bind(name, "cpu", 0, np.float32, (count, *array.shape[1:]), array.ctypes.data)
        buffers.bindings[count] = binding
        return binding


@dataclass(slots=True)
class _Buffers:
    """One caller's arrays, which the session reads and writes without a copy, and their bindings by batch size."""

    rows: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    outputs: Outputs = field(default_factory=list)
    bindings: dict[int, Any] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, count: int, row: tuple[int, ...], outputs: list[tuple[int, ...]]) -> "_Buffers":
        return cls(np.zeros((count, *row), np.float32), [np.zeros((count, *shape), np.float32) for shape in outputs])


def _batch(name: str, item: Any) -> int:  # noqa: ANN401
    """The model's own batch size; 0 where it is free."""
    if not item.shape:
        raise ModelError(f"{name}: input {item.name} is a single value, expected a batch of rows")
    return item.shape[0] if isinstance(item.shape[0], int) else 0


def _port(name: str, item: Any) -> Port:  # noqa: ANN401
    dtype = _DTYPES.get(item.type)
    if dtype is None:
        raise ModelError(f"{name}: input {item.name} is {item.type}, expected one of {', '.join(_DTYPES)}")
    shape = item.shape[1:]
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"{name}: input {item.name} has the shape {item.shape}: only its batch may be free")
    return Port(item.name, dtype, tuple(shape))
