import copy

import numpy as np
import pytest
import torch
from torch import nn

from cloud.export import to_tflite
from cloud.models.resnet import resnet8
from cloud.prune import ChannelPruner, PruningPlan, count_weights, prune_and_tune, prune_channels, prune_weights
from cloud.tasks.base import TrainingPlan
from shoal.errors import ModelError
from shoal.v1 import release_pb2 as pb
from tests.cloud.toolchain import task_of

TUNING = TrainingPlan(steps=18, batch_rows=64, learning_rate=2e-3)
ROUNDS = 2


@pytest.fixture(scope="module")
def data(brief_task):
    return brief_task.prepare(None)


@pytest.fixture(scope="module")
def cnn(brief_task):
    torch.manual_seed(0)
    return brief_task.build_model(pb.TIER_GATEWAY)


def models():
    torch.manual_seed(0)
    return {
        "cnn": (task_of("digits").build_model(pb.TIER_GATEWAY), (8, 8, 1)),
        "device cnn": (task_of("digits").build_model(pb.TIER_DEVICE), (8, 8, 1)),
        "resnet8": (resnet8(channels=1, classes=10), (16, 16, 1)),
        "autoencoder": (task_of("shuttle").build_model(pb.TIER_GATEWAY), (9,)),
    }


# Layers whose channels can go, those that are added together in one group.
GROUPS = {
    "cnn": [["convolutions.0"], ["convolutions.1"], ["convolutions.2"], ["hidden.linear"]],
    "device cnn": [["convolutions.1"]],
    "resnet8": [
        ["stages.1.first"],
        ["stages.1.second", "stages.1.shortcut"],
        ["stages.2.first"],
        ["stages.2.second", "stages.2.shortcut"],
    ],
    "autoencoder": [["0"], ["2"], ["5"], ["7"]],
}


def silence(module, groups):
    """Make half of the channels of each group answer zero, and the others too loud to be taken."""
    rng = np.random.default_rng(0)
    parts = dict(module.named_modules())
    for group in groups:
        layers = [layer for name in group for layer in parts[name].modules() if hasattr(layer, "weight")]
        width = len(layers[0].weight)
        chosen = torch.from_numpy(rng.permutation(width)[: width // 2])
        for values in (value for layer in layers for value in (layer.weight, layer.bias) if value is not None):
            values.data *= 8
            values.data[chosen] = 0


@pytest.mark.parametrize("name", GROUPS)
def test_channels_that_say_nothing_go_without_a_trace(name):
    """Pins which weights go: a wrong column anywhere, such as behind flattened maps, would change an answer."""
    module, shape = models()[name]
    silence(module.eval(), GROUPS[name])
    rows = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(module.state_dict())
    pruned = prune_channels(module, shape, 0.5)
    with torch.no_grad():
        expected = module(rows)
        assert torch.allclose(pruned(rows), expected, atol=1e-5 * float(expected.abs().max()))
    assert count_weights(pruned) < 0.6 * count_weights(module)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_widths_are_what_kernels_like(cnn):
    """Pins that every width left is a multiple of 16, and the answer as wide as before."""
    pruned = prune_channels(cnn, (8, 8, 1), 0.4)
    widths = [len(layer.weight) for layer in pruned.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert widths == [16, 32, 32, 32, 10]


def tune(task, data, module, path, *, seed=0, rounds=ROUNDS, report=lambda _: None):
    plan = PruningPlan(ratio=0.5, tuning=TUNING, rounds=rounds)
    return prune_and_tune(
        module, plan, task, pb.TIER_GATEWAY, data, seed=seed, checkpoint=path / "prune.ckpt", report=report
    )


@pytest.fixture(scope="module")
def tuned(brief_task, data, cnn, tmp_path_factory):
    return tune(brief_task, data, cnn, tmp_path_factory.mktemp("tuned"))


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_same_seed_gives_the_same_file(brief_task, data, cnn, tuned, tmp_path):
    """Pins that a pruned release can be built again byte for byte, and that another seed is another model."""
    again = tune(brief_task, data, cnn, tmp_path)
    assert to_tflite(again, brief_task.shape) == to_tflite(tuned, brief_task.shape)
    assert not same(tuned, tune(brief_task, data, cnn, tmp_path, seed=1))


def test_killed_pruning_resumes_to_the_same_weights(brief_task, data, cnn, tuned, tmp_path):
    """Pins that a kill in the second round costs nothing but the time since the last checkpoint."""
    seen = []

    def die(line):
        seen.append(line)
        if len([each for each in seen if "epoch=" in each]) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(brief_task, data, cnn, tmp_path, report=die)
    lines = []
    resumed = tune(brief_task, data, cnn, tmp_path, report=lines.append)
    # Of four epochs; the last one that was trained has a checkpoint only where that was worth its time.
    assert [line.split("epoch=")[1].split()[0] for line in lines if "epoch=" in line] in (
        ["2/2"],
        ["1/2", "2/2"],
        ["2/2"] * 2,
    )
    assert same(resumed, tuned)


def test_rounds_end_at_the_same_widths(brief_task, data, cnn, tuned, tmp_path):
    """Pins that two rounds take as much as one, less at a time."""
    lines = []
    once = tune(brief_task, data, cnn, tmp_path, rounds=1)
    assert count_weights(once) == count_weights(tuned)
    tune(brief_task, data, cnn, tmp_path, report=lines.append)
    left = [int(line.split("weights=")[1]) for line in lines if "weights=" in line]
    assert count_weights(cnn) > left[0] > left[1] == count_weights(tuned)


def test_zeroed_weights_change_no_size(cnn):
    """Pins what unstructured pruning does: 30 % of weights are zero, the tensors are as large as ever."""
    pruned = prune_weights(cnn, 0.3)
    weights = [layer.weight for layer in pruned.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    zeros = sum(int((values == 0).sum()) for values in weights)
    assert zeros == pytest.approx(0.3 * sum(values.numel() for values in weights), abs=1)
    shapes = {name: value.shape for name, value in cnn.state_dict().items()}
    assert {name: value.shape for name, value in pruned.state_dict().items()} == shapes
    assert len(to_tflite(pruned, (8, 8, 1))) == len(to_tflite(cnn, (8, 8, 1)))
    assert all((layer.weight != 0).all() for layer in cnn.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


def test_module_without_layers_is_refused():
    """Pins an error that names the reason instead of the library's."""
    with pytest.raises(ModelError, match="no layer to prune"):
        ChannelPruner(nn.Sequential(nn.ReLU()), (4,), 0.5, rounds=1)
