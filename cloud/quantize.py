"""Static int8 after training. Each recipe is the one that measured fast and right in the runtime it is for."""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import algorithm_manager, calibrator, qtyping, quantizer, recipe_manager
from ai_edge_quantizer.utils import qsv_utils, tfl_flatbuffer_utils
from numpy.typing import NDArray
from onnxruntime import quantization as ort_quantization

_CALIBRATION_BATCH = 32
# Kept float32, so that no device must quantize and saturate for itself.
_BOUNDARY = (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT)


def calibration_rows(rows: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Choose rows, without repeats: (min(count, n), *shape), first those with a channel's least or greatest value.

    Without them a rare ordinary reading saturates, comes out wrong and scores above every anomaly. The others are drawn
    at random; in order they would be of a few classes only.
    """
    drawn = np.random.default_rng(seed).permutation(len(rows))
    channels = rows.reshape(len(rows), -1, rows.shape[-1] if rows.ndim > 1 else 1)
    is_extreme = np.isin(drawn, [channels.min(axis=1).argmin(axis=0), channels.max(axis=1).argmax(axis=0)])
    chosen: NDArray[np.int64] = np.concatenate([drawn[is_extreme], drawn[~is_extreme]])[:count]
    return rows[chosen]


def quantize_onnx(model: bytes, rows: NDArray[np.float32], keep_float: Collection[str] = ()) -> bytes:
    """Quantize for ONNX Runtime on x86: signed per-channel weights, unsigned activations (signed ones do not fuse).

    Args:
        model: float ONNX with one input called `input`.
        rows: (n, *shape) scaled; what does not fill the last batch is left out, since ragged batches crash calibrators.
        keep_float: nodes to leave alone, of `onnx_nodes`.
    """
    reader = _BatchReader(rows)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        ort_quantization.quantize_static(
            onnx.load_from_string(model),
            path,
            reader,
            quant_format=ort_quantization.QuantFormat.QDQ,
            activation_type=ort_quantization.QuantType.QUInt8,
            weight_type=ort_quantization.QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=sorted(keep_float),
        )
        return path.read_bytes()


def onnx_nodes(model: bytes) -> list[str]:
    """Return the names of all nodes, in order."""
    return [node.name for node in onnx.load_from_string(model).graph.node]


class _BatchReader(ort_quantization.CalibrationDataReader):  # type: ignore[misc] # untyped base
    def __init__(self, rows: NDArray[np.float32]) -> None:
        size = min(_CALIBRATION_BATCH, len(rows))
        self._batches = iter([rows[start : start + size] for start in range(0, len(rows) - size + 1, size)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch}


def quantize_tflite(model: bytes, rows: NDArray[np.float32]) -> bytes:
    """Quantize for LiteRT and tflite-runtime; inputs and outputs stay float32, quantized inside the graph.

    Args:
        model: float TFLite with one signature of one input, batch 1.
        rows: (n, *shape) scaled.
    """
    return tflite_quantizer(model, rows)(())


def tflite_quantizer(model: bytes, rows: NDArray[np.float32]) -> Callable[[Collection[str]], bytes]:
    """Calibrate once, and return what quantizes all operations but those named, of `tflite_operations`."""
    with _quiet():
        # The default, a moving average of each row's range, clips what calibration has seen.
        calibration = calibrator.Calibrator(model, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        calibration.calibrate(_signature_rows(model, rows), _int8_recipe(()))
    ranges = calibration.get_model_qsvs()

    def quantize(keep_float: Collection[str]) -> bytes:
        recipe = _int8_recipe(keep_float).get_quantization_recipe()
        with _quiet():
            quantized = quantizer.Quantizer(model, recipe).quantize(ranges, enable_progress_report=False)
        return bytes(quantized.quantized_model)

    return quantize


def tflite_operations(model: bytes) -> list[str]:
    """Return what ai-edge-quantizer calls each operation, in order: the names of its output tensors."""
    graphs = tfl_flatbuffer_utils.read_model(model).subgraphs
    return [tfl_flatbuffer_utils.get_op_scope(each, graph.tensors) for graph in graphs for each in graph.operators]


def _int8_recipe(keep_float: Collection[str]) -> recipe_manager.RecipeManager:
    """A later rule of a recipe overrides an earlier one."""
    manager = recipe_manager.RecipeManager()
    every, none = qtyping.TFLOperationName.ALL_SUPPORTED, algorithm_manager.AlgorithmName.NO_QUANTIZE
    manager.add_static_config(".*", every, activation_num_bits=8, weight_num_bits=8)
    for end in _BOUNDARY:
        manager.add_quantization_config(".*", end, algorithm_key=none)
    for name in sorted(keep_float):
        manager.add_quantization_config(f"^{re.escape(name)}$", every, algorithm_key=none)
    return manager


def _signature_rows(model: bytes, rows: NDArray[np.float32]) -> dict[str, list[dict[str, NDArray[np.float32]]]]:
    ((name, tensors),) = Interpreter(model_content=model).get_signature_list().items()
    (input_name,) = tensors["inputs"]
    return {name: [{input_name: row[np.newaxis]} for row in rows]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice off the terminal; what goes wrong is raised."""
    root_log = logging.getLogger()
    level = root_log.level
    root_log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            # Calibration needs every tensor, and says so each time.
            warnings.filterwarnings("ignore", "Warning: Enabling `experimental_preserve_all_tensors`", UserWarning)
            yield
    finally:
        root_log.setLevel(level)
