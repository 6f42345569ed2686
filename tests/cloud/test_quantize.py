import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cloud import gate, quantize
from cloud.export import to_onnx, to_tflite
from cloud.quantize import calibration_rows, quantize_onnx, quantize_tflite
from shoal.errors import ModelError

# One row in 200 is 20 times as large: a calibration that averages ranges clips it.
LARGE = 20.0


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def rows():
    values = np.random.default_rng(0).uniform(-1, 1, size=(200, 9)).astype(np.float32)
    values[0] *= LARGE
    return values


@pytest.fixture(scope="module")
def onnx_model(module):
    return to_onnx(module, (9,))


def assert_close_in_steps(int8, exact):
    """The calibrated span of 255 steps covers all outputs, so no error is more than a few steps."""
    step = np.ptp(exact) / 255
    assert np.abs(int8 - exact).max() < 4 * step


def test_tflite_covers_the_largest_calibration_row(module, rows):
    """Ranges are minimum and maximum; int8 stays within steps of float, with float32 at both ends."""
    exact = to_tflite(module, (9,))
    int8 = quantize_tflite(exact, rows)
    assert_close_in_steps(gate.tflite_runner(int8)(rows), gate.tflite_runner(exact)(rows))
    interpreter = Interpreter(model_content=int8)
    assert any(tensor["dtype"] == np.int8 for tensor in interpreter.get_tensor_details())


def test_onnx_takes_unsigned_activations_and_signed_weights_per_channel(onnx_model, rows):
    """The recipe that fuses on x86, and close to float; 200 rows do not fill the last batch of 32."""
    int8 = quantize_onnx(onnx_model, rows)
    calibrated = rows[:192]
    assert_close_in_steps(gate.onnx_runner(int8)(calibrated), gate.onnx_runner(onnx_model)(calibrated))
    graph = onnx.load_from_string(int8).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: values for name, values in constants.items() if values.ndim == 2}
    assert {values.dtype for values in weights.values()} == {np.dtype(np.int8)}
    assert sorted(len(constants[name.replace("_quantized", "_scale")]) for name in weights) == [4, 32]
    points = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {point.dtype for point in points} == {np.dtype(np.uint8)}


def test_int8_at_the_boundary_is_refused(monkeypatch, module, rows):
    """The contract is float32 in and out; the library's own recipe would leave int8 to every runtime."""
    monkeypatch.setattr(quantize, "_BOUNDARY", ())
    with pytest.raises(ModelError, match="expected float32 to float32"):
        gate.tflite_runner(quantize_tflite(to_tflite(module, (9,)), rows))


@pytest.mark.parametrize(("count", "sizes"), [(200, [32] * 6), (64, [32, 32]), (5, [5])])
def test_calibration_batches_are_all_of_one_size(rows, count, sizes):
    """A ragged last batch crashes entropy and percentile calibrators; few rows are one batch."""
    reader = quantize._BatchReader(rows[:count])
    assert [len(batch["input"]) for batch in iter(reader.get_next, None)] == sizes


def test_quantizing_twice_gives_the_same_bytes(onnx_model, rows):
    """A release can be built again and compared."""
    assert quantize_onnx(onnx_model, rows) == quantize_onnx(onnx_model, rows)


@given(total=st.integers(1, 60), count=st.integers(1, 80), seed=st.integers(0, 9))
def test_calibration_rows_are_drawn_without_repeats(total, count, seed):
    """As many as asked for or as there are, each at most once, the same for a seed."""
    rows = np.arange(total, dtype=np.float32)
    drawn = calibration_rows(rows, count, seed)
    assert len(drawn) == len(set(drawn)) == min(total, count)
    assert set(drawn) <= set(rows)
    assert np.array_equal(drawn, calibration_rows(rows, count, seed))


def test_calibration_rows_span_what_training_saw():
    """A rare reading that calibration missed would saturate; extremes of each channel come along, whatever the seed."""
    rows = np.random.default_rng(0).normal(size=(500, 6, 3)).astype(np.float32)
    rows[7, 2, 1], rows[300, 5, 2] = 50.0, -40.0
    for seed in range(5):
        drawn = calibration_rows(rows, 8, seed)
        assert np.array_equal(drawn.min(axis=(0, 1)), rows.min(axis=(0, 1)))
        assert np.array_equal(drawn.max(axis=(0, 1)), rows.max(axis=(0, 1)))


def test_calibration_rows_are_not_the_first_ones():
    """Data sorted by class would calibrate on one class only."""
    assert calibration_rows(np.arange(1000, dtype=np.float32), 100, 0).max() > 900
