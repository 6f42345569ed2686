"""Networks that give back what they have seen before: the error on the rest is the anomaly's score.

Rows are (n, channel) or (n, time, channel), and so are the outputs.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def autoencoder(shape: tuple[int, ...], widths: Sequence[int]) -> nn.Module:
    """Squeeze a row through `widths` and back; no activation at the bottleneck or the output."""
    values = math.prod(shape)
    sizes = [values, *widths, *widths[-2::-1], values]
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(wide, narrow))
        if index not in (len(widths) - 1, len(sizes) - 2):
            layers.append(nn.ReLU())
    return _shaped(shape, *layers)


class CrossPredictor(nn.Module):
    """Tells every value of a row from all the others, by a small network of its own, and never from itself.

    A bottleneck may learn to pass an anomaly through; here no value has a way to its own output. Two layers with masked
    weights do for all values at once.

    Source: the masks are those of Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), with
    every value but one's own let through; that deviations from what the other sensors say are the score is from Deng
    and Hooi, "Graph Neural Network-Based Anomaly Detection in Multivariate Time Series" (2021).
    """

    others: torch.Tensor
    own: torch.Tensor

    def __init__(self, shape: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        values = math.prod(shape)
        self._shape = shape
        self.inner = nn.Linear(values, values * hidden)
        self.outer = nn.Linear(values * hidden, values)
        own = torch.eye(values).repeat_interleave(hidden, 0)
        self.register_buffer("others", 1 - own)
        self.register_buffer("own", own.T.contiguous())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        seen = nn.functional.linear(rows.flatten(1), self.inner.weight * self.others, self.inner.bias).relu()
        told = nn.functional.linear(seen, self.outer.weight * self.own, self.outer.bias)
        return told.reshape(-1, *self._shape)

    def folded(self) -> nn.Module:
        """Return two plain layers, with the masks in their weights."""
        layers = (self.inner, self.others), (self.outer, self.own)
        for layer, mask in layers:
            layer.weight.data *= mask
        plain = (self.inner, nn.ReLU(), self.outer)
        return (
            nn.Sequential(*plain)
            if len(self._shape) == 1
            else nn.Sequential(nn.Flatten(), *plain, nn.Unflatten(1, self._shape))
        )


def _shaped(shape: tuple[int, ...], *layers: nn.Module) -> nn.Module:
    """Let layers of flat rows take and give rows of this shape."""
    return nn.Sequential(*layers) if len(shape) == 1 else nn.Sequential(nn.Flatten(), *layers, nn.Unflatten(1, shape))
