"""The models that both servers run: made once into a cache folder, by Shoal's own tool chain. Their weights are random.

Random weights cost what trained ones do: no operator here looks at the values. Readings are bytes 0 to 255, and each
model scales them itself.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cloud.export import to_onnx
from cloud.quantize import quantize_onnx
from cloud.tasks.digits import DigitsTask
from shoal.v1.release_pb2 import Tier

_SEED = 5
_CALIBRATION_ROWS = 64


@dataclass(frozen=True, slots=True)
class BenchModel:
    """One model and how it is asked.

    Attributes:
        batch: rows of one call at most, for the gateway and for onnxruntime alone.
        paced_rps: a rate that every contender keeps up with, at which latency is compared; 0 where there is none.
    """

    name: str
    shape: tuple[int, ...]
    is_int8: bool
    batch: int
    paced_rps: int
    make: Callable[[], nn.Module]


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


MODELS = {
    model.name: model
    for model in (
        BenchModel("mlp", (3072,), is_int8=False, batch=32, paced_rps=1000, make=_mlp),
        BenchModel("cnn", (8, 8, 1), is_int8=True, batch=32, paced_rps=1000, make=_cnn),
        BenchModel("resnet18", (224, 224, 3), is_int8=True, batch=8, paced_rps=0, make=_resnet18),
    )
}


def build_model(model: BenchModel, path: Path) -> None:
    """Write the ONNX file."""
    torch.manual_seed(_SEED)
    data = to_onnx(model.make(), model.shape)
    if model.is_int8:
        rows = np.random.default_rng(_SEED).integers(0, 256, (_CALIBRATION_ROWS, *model.shape))
        data = quantize_onnx(data, rows.astype(np.float32))
    path.write_bytes(data)
