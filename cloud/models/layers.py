"""Layers that the exporters, the pruner and the models must agree on."""

import copy
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class LinearOfMaps(nn.Module):
    """A linear layer on feature maps (n, c, h, w), whose columns are in TFLite's order, channels last.

    So its converter adds no transpose. A layer of its own, because the pruner must know which columns are a channel's.
    """

    def __init__(self, channels: int, pixels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * pixels, outputs)
        self._pixels = pixels
        self._is_channels_last = True

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        ordered = maps.permute(0, 2, 3, 1) if self._is_channels_last else maps
        result: torch.Tensor = self.linear(ordered.flatten(1))
        return result

    def swap_layout(self) -> None:
        """Order columns the other way, and the maps with them: answers stay the same."""
        shape = (self._pixels, -1) if self._is_channels_last else (-1, self._pixels)
        weight = self.linear.weight.detach()
        self.linear.weight.data = weight.reshape(len(weight), *shape).transpose(1, 2).flatten(1)
        self._is_channels_last = not self._is_channels_last


@runtime_checkable
class Foldable(Protocol):
    """A layer that trains in one form and ships in another that answers the same."""

    def folded(self) -> nn.Module: ...


class NormedConvolution(nn.Module):
    """A convolution without bias, then batch norm; ships as one convolution.

    Left apart, the norm is a node that int8 rounds once more.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.convolution(maps))
        return result

    def folded(self) -> nn.Module:
        return fuse_conv_bn_eval(self.convolution, self.norm)


def fold_for_export(module: nn.Module) -> nn.Module:
    """Return a copy, ready for export, in which each `Foldable` has the form in which it ships."""
    return _folded(copy.deepcopy(module).eval())


def _folded(module: nn.Module) -> nn.Module:
    if isinstance(module, Foldable):
        return module.folded()
    for name, child in module.named_children():
        setattr(module, name, _folded(child))
    return module
