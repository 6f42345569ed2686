import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cloud import gate
from cloud.export import to_onnx, to_tflite
from cloud.models.layers import fold_for_export
from cloud.models.resnet import resnet8, resnet18

SHAPE = (16, 16, 1)


@pytest.fixture(scope="module")
def trained():
    """A ResNet-8 whose batch norms have seen data, so that folding has something to fold."""
    torch.manual_seed(0)
    module = resnet8(channels=1, classes=4)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.uniform_(part.bias, -1.0, 1.0)
    for _ in range(3):
        module(torch.randn(16, *SHAPE) * 3 + 1)
    return module.eval()


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(1, 3, size=(4, *SHAPE)).astype(np.float32)


def answers(module, rows):
    with torch.no_grad():
        return module(torch.from_numpy(rows)).numpy()


def test_folding_changes_no_answer_and_leaves_no_batch_norm(trained, rows):
    """Export may fold; the module given stays as it was, for training goes on with it."""
    folded = fold_for_export(trained)
    assert np.allclose(answers(folded, rows), answers(trained, rows), atol=1e-4)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in trained.modules())


def test_resnet_answers_the_same_in_both_runtimes(trained, rows):
    """Residual additions and strides survive both exporters, and ONNX holds no node for batch norm."""
    folded = fold_for_export(trained)
    model = to_onnx(folded, SHAPE)
    expected = answers(trained, rows)
    assert np.allclose(gate.onnx_runner(model)(rows), expected, atol=1e-4)
    assert np.allclose(gate.tflite_runner(to_tflite(folded, SHAPE))(rows), expected, atol=1e-4)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load_from_string(model).graph.node}


@pytest.mark.parametrize(
    ("module", "weights"),
    [(resnet8(channels=3, classes=10), 78_042), (resnet18(channels=3, classes=1000), 11_689_512)],
)
def test_networks_have_the_papers_weights(module, weights):
    """ResNet-18 has as many as everybody's; ResNet-8's were counted by hand from its table of layers."""
    assert sum(value.numel() for value in module.parameters()) == weights


def test_resnet18_halves_pictures_five_times():
    """224 pixels become maps of 7x7."""
    module = fold_for_export(resnet18(channels=3, classes=10))
    with torch.no_grad():
        maps = module.stages(module.stem(torch.zeros(1, 3, 224, 224)))
    assert maps.shape == (1, 512, 7, 7)
