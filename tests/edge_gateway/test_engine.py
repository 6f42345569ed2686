"""ONNX Runtime behind the one interface that roles know."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_gateway import engine
from shoal.errors import ModelError


def save(path, node="Neg", *, inputs=("x",), outputs=("y",), kind=TensorProto.FLOAT, shape=("n", 2), initial=()):
    """One node as an ONNX file."""
    graph = helper.make_graph(
        [helper.make_node(node, [*inputs, *(tensor.name for tensor in initial)], outputs)],
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        list(initial),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def int64(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


@pytest.mark.parametrize("batch", ["n", 1])
def test_free_and_single_batches_answer_alike(tmp_path, batch):
    """A model that takes one row at a time is given one row at a time."""
    runtime = engine.load(save(tmp_path / "m.onnx", shape=(batch, 2)))
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(runtime.run(rows), -rows)
    assert runtime.input_shape == (2,)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"shape": (4, 2)}, "free batch or 1"),
        ({"shape": ("n", "m")}, "free batch or 1"),
        ({"node": "Add", "inputs": ("x", "z")}, "2 inputs and 1 outputs"),
        ({"node": "Split", "outputs": ("y", "z"), "initial": (int64("s", 1, 1),), "shape": (2, 2)}, "2 outputs"),
        ({"kind": TensorProto.DOUBLE}, "expected tensor.float."),
    ],
)
def test_model_of_another_form_is_refused_with_what_it_is(tmp_path, model, message):
    """One float32 input and one output, of a batch that can be chosen."""
    with pytest.raises(ModelError, match=message):
        engine.load(save(tmp_path / "m.onnx", **model))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09" * 50])
def test_bytes_that_are_no_model_are_refused_by_name(tmp_path, content):
    """Whatever kind of exception the runtime has for them."""
    path = tmp_path / "rubbish.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"rubbish\.onnx"):
        engine.load(path)


def test_failing_batch_is_a_model_error(tmp_path):
    """The runtime's own exceptions have no common base."""
    runtime = engine.load(save(tmp_path / "m.onnx", "Reshape", initial=(int64("s", 2, 2),)))
    with pytest.raises(ModelError, match="inference failed"):
        runtime.run(np.zeros((3, 2), np.float32))


def test_output_with_another_number_of_rows_is_refused(tmp_path):
    """Length in is length out, or answers would go to other devices."""
    runtime = engine.load(save(tmp_path / "m.onnx", "Reshape", initial=(int64("s", 1, -1),)))
    with pytest.raises(ModelError, match="3 rows in, 1 out"):
        runtime.run(np.zeros((3, 2), np.float32))


def test_runtime_names_itself_and_its_provider():
    """What NodeState says."""
    assert engine.runtime_name().startswith("onnxruntime 1.")
    assert engine.runtime_name().endswith("CPUExecutionProvider")
