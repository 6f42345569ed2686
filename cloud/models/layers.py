"""Layers that the exporters, the pruner and the models must agree on."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class FlattenChannelsLast(nn.Module):
    """Feature maps (n, c, h, w) to features (n, h * w * c): TFLite's order, so that its converter adds no transpose.

    A layer and not two calls, because the pruner must know which features a channel becomes.
    """

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)


class NormedConvolution(nn.Module):
    """A convolution without bias, then batch norm; `fold_batch_norms` makes one convolution of the two."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.convolution(maps))
        return result


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy, ready for export, that answers the same with no batch norm left in a `NormedConvolution`.

    Left apart, each one is a node that int8 rounds once more.
    """
    folded = copy.deepcopy(module).eval()
    for parent in list(folded.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NormedConvolution):
                setattr(parent, name, fuse_conv_bn_eval(child.convolution, child.norm))
    return folded
