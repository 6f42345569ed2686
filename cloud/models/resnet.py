"""Residual networks with basic blocks, for pictures laid out (n, height, width, channel).

Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 2; ResNet-8 as in MLPerf Tiny.
"""

from collections.abc import Sequence

import torch
from torch import nn

from cloud.models.layers import NormedConvolution


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = NormedConvolution(inputs, outputs, 3, stride)
        self.second = NormedConvolution(outputs, outputs, 3)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_same else NormedConvolution(inputs, outputs, 1, stride)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(maps).relu()) + self.shortcut(maps)
        return result.relu()


class ResNet(nn.Module):
    """A stem, stages of basic blocks that halve the picture from the second on, an average and a linear layer."""

    def __init__(self, stem: nn.Module, widths: Sequence[int], blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        inputs = (widths[0], *widths)
        stages = [
            _Block(inputs[stage] if index == 0 else width, width, stride=2 if stage > 0 and index == 0 else 1)
            for stage, width in enumerate(widths)
            for index in range(blocks)
        ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map (n, height, width, channel) to logits (n, classes)."""
        maps = self.stages(self.stem(rows.permute(0, 3, 1, 2)))
        logits: torch.Tensor = self.head(maps.mean((2, 3)))
        return logits


def resnet8(channels: int, classes: int) -> ResNet:
    """For pictures of 32x32; those of 8x8 end as maps of 2x2."""
    return ResNet(nn.Sequential(NormedConvolution(channels, 16, 3), nn.ReLU()), (16, 32, 64), 1, classes)


def resnet18(channels: int, classes: int) -> ResNet:
    """For pictures of 224x224."""
    stem = nn.Sequential(NormedConvolution(channels, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    return ResNet(stem, (64, 128, 256, 512), 2, classes)
