"""Makes the models, by Shoal's own tool chain; a process of its own, because that takes seconds to import.

    python -m benchmarks.gateway.build_models FOLDER MODEL...

Their weights are random: they cost what trained ones do, for no operator here looks at the values. Readings are bytes 0
to 255, and each model scales them itself. `mlp` is float 3072-128-10, `cnn` the gateway's int8 model of the digits task,
`resnet18` int8 at 224x224.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gateway.models import MODELS
from cloud.export import to_onnx
from cloud.models.cnn import Cnn
from cloud.models.layers import fold_for_export
from cloud.models.resnet import resnet18
from cloud.quantize import quantize_onnx

_SEED = 5
_CALIBRATION_ROWS = 64


class _Scaled(nn.Module):
    """Bytes in, as floats, brought to [0, 1] by the first operation."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.inner(rows * (1 / 255))
        return result


def _mlp() -> nn.Module:
    return _Scaled(nn.Sequential(nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10)))


def _cnn() -> nn.Module:
    """The gateway's own model of the digits task, 8x8 images."""
    return _Scaled(Cnn((8, 8, 1), 10, (32, 64, 64), hidden=64))


def _resnet18() -> nn.Module:
    return _Scaled(fold_for_export(resnet18(channels=3, classes=1000)))


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
