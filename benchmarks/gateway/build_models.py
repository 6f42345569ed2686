"""Makes the models, by Shoal's own tool chain; a process of its own, because that takes seconds to import.

    python -m benchmarks.gateway.build_models FOLDER MODEL...

Their weights are random: they cost what trained ones do, for no operator here looks at the values. Readings are bytes 0
to 255, and each model scales them itself. `mlp` is float 3072-128-10, `cnn` the gateway's int8 model of the digits task,
`resnet18` int8 at 224x224.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gateway.models import MODELS
from cloud.export import to_onnx
from cloud.quantize import quantize_onnx
from cloud.tasks.digits import DigitsTask
from shoal.v1.release_pb2 import Tier

_SEED = 5
_CALIBRATION_ROWS = 64


class _Scaled(nn.Module):
    """Bytes in, as floats, brought to [0, 1] by the first operation; images are laid out channels last."""

    def __init__(self, inner: nn.Module, *, is_image: bool) -> None:
        super().__init__()
        self.inner = inner
        self.is_image = is_image

    def forward(self, rows: Tensor) -> Tensor:
        scaled = rows * (1 / 255)
        result: Tensor = self.inner(scaled.permute(0, 3, 1, 2) if self.is_image else scaled)
        return result


class _Block(nn.Module):
    """ResNet's basic block (He et al. 2015, figure 2), without batch norm: a deployed one is folded into its weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu()) + self.shortcut(x)
        return result.relu()


def _mlp() -> nn.Module:
    return _Scaled(nn.Sequential(nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10)), is_image=False)


def _cnn() -> nn.Module:
    """The gateway's own model of the digits task, 8x8 images."""
    return _Scaled(DigitsTask().build_model(Tier.TIER_GATEWAY), is_image=False)


def _resnet18() -> nn.Module:
    widths = (64, 64, 128, 256, 512)
    blocks = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        blocks += [_Block(inputs, outputs, 1 if index == 0 else 2), _Block(outputs, outputs, 1)]
    stem = (nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    return _Scaled(nn.Sequential(*stem, *blocks, *head), is_image=True)


_MAKERS = {"mlp": _mlp, "cnn": _cnn, "resnet18": _resnet18}
_FLOAT = frozenset({"mlp"})


def build_model(name: str, path: Path) -> None:
    """Write the ONNX file."""
    torch.manual_seed(_SEED)
    shape = MODELS[name].shape
    data = to_onnx(_MAKERS[name](), shape)
    if name not in _FLOAT:
        rows = np.random.default_rng(_SEED).integers(0, 256, (_CALIBRATION_ROWS, *shape))
        data = quantize_onnx(data, rows.astype(np.float32))
    path.write_bytes(data)


def main(folder: str, *names: str) -> None:
    for name in names:
        path = Path(folder) / f"{name}.onnx"
        build_model(name, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
