"""Look into a model file that nobody here made, in a process of its own, and run it.

A model file is code: it can crash the process, allocate without end or never return. Only files come back:
`probe.json` with what it is or why it cannot be released, and `probe.npz` with inputs and answers.

    python -m cloud.byo_probe ARTEFACT_FILE WORKDIR MEMORY_BYTES CPU_S

With `given.npy` in the work folder those inputs are run; without it, seeded random ones in the model's range.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ModelError

CANDIDATES = 64
# No more inputs are tried after this; one is enough for a model that takes so long.
_PATIENCE_S = 5.0
_REASON_BYTES = 600
_SEED = 0
_ROUNDING_SHARE = 0.02
_INTEGERS = ("int8", "uint8", "int16")
_MAX_ROW_BYTES = 1 << 20

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file is.

    Attributes:
        shape: of one input, without the batch.
        low, high: of the inputs to try.
        input_step: of a quantized input, whose values are whole multiples of it from `low` on; 0 for float.
        output_step: of a quantized output; 0 for float.
        int8: whether anything inside is quantized.
        runtime: which answered.
    """

    shape: tuple[int, ...]
    low: float
    high: float
    input_step: float
    output_step: float
    int8: bool
    runtime: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in two ways that must agree: as nodes run it, and as their runtime's plainest kernels do.

    How far these are apart is how far another release of the runtime may be.
    """

    facts: Facts
    run: Callable[[Rows], Rows]
    run_plainly: Callable[[Rows], Rows]

    def run_alone(self, rows: Rows) -> Rows:
        return _row_by_row(self.run)(rows)


def load(path: Path) -> Loaded:
    """Load a `.tflite` or `.onnx` file.

    Raises:
        ModelError: it cannot be released; the message says why.
    """
    if path.suffix == ".tflite":
        return _load_tflite(path)
    return _load_onnx(path)


def _load_tflite(path: Path) -> Loaded:
    from importlib.metadata import version  # noqa: PLC0415  only the runtime that is needed is loaded

    from ai_edge_litert.interpreter import Interpreter, OpResolverType  # noqa: PLC0415

    def start(**options: Any) -> Any:  # noqa: ANN401  LiteRT publishes no types
        interpreter = Interpreter(model_path=str(path), num_threads=1, **options)
        interpreter.allocate_tensors()
        return interpreter

    try:
        interpreter = start()
    except (ValueError, RuntimeError) as exc:
        raise ModelError(f"LiteRT refuses it: {exc}") from exc
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    _check_single([item["name"] for item in inputs], [item["name"] for item in outputs])
    source, sink = inputs[0], outputs[0]
    signature = [int(size) for size in source.get("shape_signature", source["shape"])]
    _check_shape(source["name"], int(source["shape"][0]) if len(source["shape"]) else 0, signature[1:])
    source_step, sink_step = _step(source, "input"), _step(sink, "output")
    facts = Facts(
        shape=tuple(int(size) for size in source["shape"][1:]),
        low=_dequantized(np.array(_limits(source)[0]), source).item() if source_step else -1.0,
        high=_dequantized(np.array(_limits(source)[1]), source).item() if source_step else 1.0,
        input_step=source_step,
        output_step=sink_step,
        int8=any(np.dtype(item["dtype"]).name in _INTEGERS for item in interpreter.get_tensor_details()),
        runtime=f"ai-edge-litert {version('ai-edge-litert')}",
    )
    plain = start(experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    return Loaded(facts, _tflite_runner(interpreter), _tflite_runner(plain))


def _tflite_runner(interpreter: Any) -> Callable[[Rows], Rows]:  # noqa: ANN401  as above
    source, sink = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def answer(row: Rows) -> Rows:
        interpreter.set_tensor(source["index"], _quantized(row, source))
        interpreter.invoke()
        return _dequantized(interpreter.get_tensor(sink["index"]), sink)

    return _row_by_row(answer)


def _load_onnx(path: Path) -> Loaded:
    import onnxruntime  # noqa: PLC0415  only the runtime that is needed is loaded

    def start(level: Any) -> Any:  # noqa: ANN401  ONNX Runtime publishes no types
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = level
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    try:
        session = start(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    except Exception as exc:
        # onnxruntime's errors have no common base below Exception.
        raise ModelError(f"ONNX Runtime refuses it: {exc}") from exc
    inputs, outputs = session.get_inputs(), session.get_outputs()
    _check_single([item.name for item in inputs], [item.name for item in outputs])
    for item, kind in ((inputs[0], "input"), (outputs[0], "output")):
        if item.type != "tensor(float)":
            raise ModelError(f"{kind} {item.name} is {item.type}, expected tensor(float)")
    batch, *sizes = inputs[0].shape or [0]
    _check_shape(inputs[0].name, batch if isinstance(batch, int) else 1, sizes)
    facts = Facts(
        shape=tuple(sizes),
        low=-1.0,
        high=1.0,
        input_step=0.0,
        output_step=0.0,
        int8=b"QuantizeLinear" in path.read_bytes() or b"QLinear" in path.read_bytes(),
        runtime=f"onnxruntime {onnxruntime.__version__}",
    )
    plain = start(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return Loaded(facts, _onnx_runner(session), _onnx_runner(plain))


def _onnx_runner(session: Any) -> Callable[[Rows], Rows]:  # noqa: ANN401  as above
    name, batch = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]

    def run(rows: Rows) -> Rows:
        return np.asarray(session.run(None, {name: rows})[0])

    return _row_by_row(run) if isinstance(batch, int) else run


def _row_by_row(run: Callable[[Rows], Rows]) -> Callable[[Rows], Rows]:
    def run_rows(rows: Rows) -> Rows:
        outputs = [run(rows[index : index + 1]) for index in range(len(rows))]
        if outputs[0].ndim < 1 or len(outputs[0]) != 1:
            raise ModelError(f"one row in, output {list(outputs[0].shape)} out: expected one row of it")
        return np.concatenate(outputs)

    return run_rows


def _check_single(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{len(inputs)} inputs ({', '.join(inputs)}) and {len(outputs)} outputs ({', '.join(outputs)}), "
            "expected one of each"
        )


def _check_shape(name: str, batch: int, sizes: Sequence[object]) -> None:
    if batch != 1:
        raise ModelError(f"input {name} has a fixed batch of {batch}, expected 1 or a free one")
    fixed = [size for size in sizes if isinstance(size, int) and size > 0]
    if not sizes or len(fixed) != len(sizes):
        raise ModelError(
            f"input {name} is {list(sizes)} after the batch, expected at least one size, all of them fixed"
        )
    if math.prod(fixed) * 4 >= _MAX_ROW_BYTES:
        raise ModelError(f"input {name} is {math.prod(fixed) * 4} bytes a row, and no message holds more than 1 MiB")


def _step(details: dict[str, Any], kind: str) -> float:
    """The step of a quantized tensor, 0 for float32.

    Raises:
        ModelError: it is neither.
    """
    name = np.dtype(details["dtype"]).name
    if name == "float32":
        return 0.0
    scale = float(details["quantization"][0])
    if name not in _INTEGERS or scale <= 0:
        scaled = "" if scale > 0 else " without one scale for all of it"
        expected = f"float32, or one of {', '.join(_INTEGERS)} with a scale"
        raise ModelError(f"{kind} {details['name']} is {name}{scaled}, expected {expected}")
    return scale


def _limits(details: dict[str, Any]) -> tuple[int, int]:
    limits = np.iinfo(details["dtype"])
    return int(limits.min), int(limits.max)


def _quantized(values: Rows, details: dict[str, Any]) -> NDArray[Any]:
    """As the device's runtime does it; the golden vectors would tell if the two differed."""
    dtype = np.dtype(details["dtype"])
    if dtype.kind == "f":
        return values
    scale, zero = details["quantization"]
    return np.asarray(np.clip(np.rint(values / scale) + zero, *_limits(details)), dtype=dtype)


def _dequantized(values: NDArray[Any], details: dict[str, Any]) -> Rows:
    if np.dtype(details["dtype"]).kind == "f":
        return values.astype(np.float32)
    scale, zero = details["quantization"]
    return np.asarray((values.astype(np.float32) - zero) * scale, dtype=np.float32)


def random_row(facts: Facts, rng: np.random.Generator) -> Rows:
    """One row in the model's range; of a quantized model values that it represents exactly."""
    if not facts.input_step:
        return rng.uniform(facts.low, facts.high, (1, *facts.shape)).astype(np.float32)
    steps = round((facts.high - facts.low) / facts.input_step)
    return (facts.low + rng.integers(0, steps + 1, (1, *facts.shape)) * facts.input_step).astype(np.float32)


def answers(loaded: Loaded, given: Rows | None, clock: Callable[[], float]) -> tuple[Rows, Rows, Rows]:
    """Run inputs; return them with both answers.

    Raises:
        ModelError: it answers with something that cannot be checked on a node.
    """
    if given is not None:
        if given.shape[1:] != loaded.facts.shape:
            raise ModelError(f"golden inputs are {list(given.shape[1:])} a row, expected {list(loaded.facts.shape)}")
        rows = given
    else:
        rng, end = np.random.default_rng(_SEED), clock() + _PATIENCE_S
        drawn = [random_row(loaded.facts, rng)]
        loaded.run(drawn[0])
        while len(drawn) < CANDIDATES and clock() < end:
            drawn.append(random_row(loaded.facts, rng))
            loaded.run(drawn[-1])
        rows = np.concatenate(drawn)
    alone, outputs, again = loaded.run_alone(rows), loaded.run(rows), loaded.run(rows)
    if not np.array_equal(outputs, again, equal_nan=True):
        raise ModelError("it answers the same inputs differently each time")
    if outputs.shape != alone.shape or not _agree(outputs, alone):
        raise ModelError("it answers a row otherwise in a batch than alone, and gateways batch as requests come")
    return rows, outputs, loaded.run_plainly(rows)


def _agree(some: Rows, others: Rows) -> bool:
    """Whether two runs differ by rounding at most, a few steps of a quantized model included."""
    finite = some[np.isfinite(some)]
    room = _ROUNDING_SHARE * max(float(np.ptp(finite)), float(np.abs(finite).max())) if finite.size else 0.0
    return bool(np.allclose(some, others, rtol=0.0, atol=room, equal_nan=True))


def probe(path: Path, workdir: Path) -> None:
    given = np.load(workdir / "given.npy", allow_pickle=False) if (workdir / "given.npy").exists() else None
    try:
        loaded = load(path)
        rows, outputs, plainly = answers(loaded, given, time.monotonic)
    except ModelError as exc:
        found: dict[str, object] = {"error": str(exc)[:_REASON_BYTES]}
    except Exception as exc:  # noqa: BLE001  whatever a model file provokes is a verdict on it
        found = {"error": f"{type(exc).__name__}: {exc}"[:_REASON_BYTES]}
    else:
        np.savez(workdir / "probe.npz", rows=rows, outputs=outputs, plainly=plainly)
        found = {"facts": asdict(loaded.facts)}
    (workdir / "probe.json").write_text(json.dumps(found))


def main(arguments: list[str]) -> None:
    path, workdir, memory_bytes, cpu_s = arguments
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), int(cpu_s)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    probe(Path(path), Path(workdir))
    sys.stderr.flush()
    # A runtime may crash at teardown on a good model; the answer is out, so leave without one.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
