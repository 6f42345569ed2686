import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cloud import gate
from cloud.export import to_onnx, to_tflite, to_torch_dynamic
from shoal.errors import ModelError
from shoal.v1 import release_pb2 as pb


@pytest.fixture(scope="module")
def module(brief_task):
    torch.manual_seed(0)
    return brief_task.build_model(pb.TIER_DEVICE).eval()


@pytest.fixture(scope="module")
def exported(module, brief_task):
    return to_onnx(module, brief_task.shape)


@pytest.fixture(scope="module")
def rows(brief_task):
    return np.random.default_rng(0).normal(size=(5, *brief_task.shape)).astype(np.float32)


def expected(module, rows):
    with torch.no_grad():
        return module(torch.from_numpy(rows)).numpy()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_answers_as_torch_at_any_batch(module, exported, rows, count):
    """The batch dimension is free and the layout is the task's."""
    answers = gate.onnx_runner(exported)(rows[:count])
    assert np.allclose(answers, expected(module, rows[:count]), atol=1e-5)


def test_onnx_names_its_tensors(exported):
    """Quantization and gateways rely on `input` and `output`."""
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    assert [node.name for node in (*session.get_inputs(), *session.get_outputs())] == ["input", "output"]


def test_onnx_bytes_depend_on_the_weights_only(module, exported, brief_task):
    """The same weights hash the same; no notes or paths of the build machine travel."""
    assert to_onnx(module, brief_task.shape) == exported
    proto = onnx.load_from_string(exported)
    assert not any(part.metadata_props for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info))
    assert str(Path(__file__).parents[2]).encode() not in exported


def test_tflite_answers_as_torch(module, rows, brief_task, capfd):
    """Batch 1, same layout, same answers, and nothing on standard output."""
    model = to_tflite(module, brief_task.shape)
    assert capfd.readouterr().out == ""
    assert np.allclose(gate.tflite_runner(model)(rows), expected(module, rows), atol=1e-5)


@pytest.mark.parametrize(("export", "name"), [(to_onnx, "ONNX"), (to_tflite, "TFLite")])
def test_module_that_cannot_be_exported_is_refused(export, name):
    """A task whose module branches on its data keeps the old model."""

    class Branching(torch.nn.Module):
        def forward(self, rows):
            return rows if rows.sum() > 0 else -rows

    with pytest.raises(ModelError, match=f"cannot export to {name}"):
        export(Branching(), (3,))


def test_torch_users_get_int8_linear_layers(brief_task, rows):
    """Loads without Shoal's classes, answers at any batch nearly as float, and is smaller; the module stays float."""
    torch.manual_seed(0)
    module = brief_task.build_model(pb.TIER_GATEWAY).eval()
    exported = to_torch_dynamic(module, brief_task.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        loaded = torch.jit.load(io.BytesIO(exported))
    exact = expected(module, rows)
    for count in (1, 5):
        answers = loaded(torch.from_numpy(rows[:count])).numpy()
        assert 0 < np.abs(answers - exact[:count]).max() < 0.05 * np.abs(exact).max()
    assert len(exported) < 0.95 * sum(4 * value.numel() for value in module.parameters())
    assert all(value.dtype == torch.float32 for value in module.parameters())


def test_module_without_linear_layers_has_no_dynamic_export():
    """Would be a float model under the name of an int8 one."""
    with pytest.raises(ModelError, match="no linear layer"):
        to_torch_dynamic(torch.nn.Conv2d(1, 2, 3), (1, 8, 8))
