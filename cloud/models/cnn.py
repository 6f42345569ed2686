"""A small convolutional network for pictures laid out (n, height, width, channel)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from cloud.models.layers import LinearOfMaps


class Cnn(nn.Module):
    """3x3 convolutions, each but the first halving the picture, then one or two linear layers.

    Never transposes between layers but at both ends, where the converters can fold it.

    Args:
        shape: (height, width, channel) of a picture.
        classes: how many logits come out.
        widths: channels of each convolution.
        hidden: of the linear layer before the last; 0 for none.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, widths: Sequence[int], hidden: int = 0) -> None:
        super().__init__()
        height, width, channels = shape
        inputs = (channels, *widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs[index], outputs, 3, stride=1 if index == 0 else 2, padding=1)
            for index, outputs in enumerate(widths)
        )
        shrink = 2 ** (len(widths) - 1)
        pixels = -(-height // shrink) * -(-width // shrink)
        self.hidden = LinearOfMaps(widths[-1], pixels, hidden) if hidden else None
        self.head = nn.Linear(hidden, classes) if hidden else LinearOfMaps(widths[-1], pixels, classes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map (n, height, width, channel) to logits (n, classes)."""
        maps = rows.permute(0, 3, 1, 2)
        for convolution in self.convolutions:
            maps = functional.relu(convolution(maps))
        features = maps if self.hidden is None else functional.relu(self.hidden(maps))
        logits: torch.Tensor = self.head(features)
        return logits
