"""ONNX Runtime behind the one interface that roles know."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
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


@pytest.mark.parametrize("batch", ["n", 1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_free_and_fixed_batches_answer_alike(tmp_path, batch, count):
    """A model that takes k rows at a time is given k rows at a time, and nobody sees what filled the last call."""
    runtime = engine.load(save(tmp_path / "m.onnx", shape=(batch, 2)))
    rows = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
    np.testing.assert_array_equal(runtime.run(rows), -rows)
    assert runtime.input_shape == (2,)


@pytest.mark.parametrize("shape", [(2, 2), (1, -1)], ids=["fails on others", "mixes rows"])
def test_batch_that_is_free_only_on_paper_is_run_as_the_model_can(tmp_path, shape):
    """A Reshape inside says what the input does not: one row at a time, or not at all."""
    path = save(tmp_path / "m.onnx", "Reshape", initial=(int64("s", *shape),))
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    if shape == (2, 2):
        with pytest.raises(ModelError, match="fails on zeros"):
            engine.load(path)
    else:
        np.testing.assert_array_equal(engine.load(path).run(rows), rows)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT8, TensorProto.FLOAT16])
def test_inputs_have_the_element_type_that_the_model_wants(tmp_path, kind):
    """The wire's values are converted; the first output comes back as float32, the others as they are."""
    runtime = engine.load(save(tmp_path / "m.onnx", "Identity", kind=kind))
    rows = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(runtime.run(rows), rows)
    assert runtime.run(rows).dtype == np.float32
    assert runtime.run_all(rows)[0].dtype == runtime.inputs[0].dtype


def test_several_inputs_share_a_row_and_several_outputs_all_come(tmp_path):
    """In the model's own order, one after the other."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "ab"],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("sum", "difference")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    runtime = engine.load(tmp_path / "m.onnx")
    assert runtime.input_shape == (4,)
    assert runtime.outputs == ["sum", "difference"]
    total, difference = runtime.run_all(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32))
    assert total.tolist() == [[4, 6], [12, 14]]
    assert difference.tolist() == [[-2, -2], [-2, -2]]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"shape": ("n", "m")}, "only its batch may be free"),
        ({"shape": ()}, "single value"),
        ({"node": "Identity", "kind": TensorProto.STRING}, "expected one of tensor.float."),
        ({"node": "Split", "outputs": ("y", "z"), "initial": (int64("s", 1, 1),), "shape": (2, 2)}, "for 2 rows"),
    ],
)
def test_model_that_cannot_be_served_is_refused_with_what_it_is(tmp_path, model, message):
    """Before it is swapped in."""
    with pytest.raises(ModelError, match=message):
        engine.load(save(tmp_path / "m.onnx", **model))


@pytest.mark.parametrize("count", [1, 3])
def test_third_party_files_are_served_as_they_are(shared_data, count):
    """Whatever lies among the real models: every output is onnxruntime's own, bit by bit, row by row."""
    for path in sorted((shared_data / "models_onnx").glob("*.onnx")):
        runtime = engine.load(path)
        rows = np.random.default_rng(count).random((count, *runtime.input_shape), dtype=np.float32)
        alone = onnxruntime.InferenceSession(path)
        expected = [alone.run(None, {alone.get_inputs()[0].name: row[None]}) for row in rows]
        for index, output in enumerate(runtime.run_all(rows)):
            np.testing.assert_array_equal(output, np.concatenate([each[index] for each in expected]))


def test_answers_of_one_call_outlive_the_next(tmp_path):
    """Bound arrays are used again; what was handed out is not."""
    runtime = engine.load(save(tmp_path / "m.onnx"))
    first = runtime.run(np.ones((3, 2), np.float32))
    runtime.run(np.full((3, 2), 7.0, np.float32))
    assert (first == -1).all()


def test_threads_share_a_session(tmp_path):
    """Each call has arrays of its own."""
    runtime = engine.load(save(tmp_path / "m.onnx"))
    values = [np.full((size, 2), float(size * 100 + turn), np.float32) for turn in range(50) for size in (1, 2, 3, 5)]
    with ThreadPoolExecutor(4) as pool:
        for given, answer in zip(values, pool.map(runtime.run, values), strict=True):
            np.testing.assert_array_equal(answer, -given)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09" * 50])
def test_bytes_that_are_no_model_are_refused_by_name(tmp_path, content):
    """Whatever kind of exception the runtime has for them."""
    path = tmp_path / "rubbish.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"rubbish\.onnx"):
        engine.load(path)


def test_failing_call_is_a_model_error(tmp_path):
    """The runtime's own exceptions have no common base."""
    runtime = engine.load(save(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="inference failed"):
        runtime.run(np.zeros((3, 5), np.float32))


def test_runtime_names_itself_and_its_provider():
    """What NodeState says."""
    assert engine.runtime_name().startswith("onnxruntime 1.")
    assert engine.runtime_name().endswith("CPUExecutionProvider")
