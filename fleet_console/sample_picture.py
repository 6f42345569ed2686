"""A reading as something to look at: a file, and a few lines of text for terminals without a desktop."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from shoal.errors import PayloadError
from shoal.tensors import to_array
from shoal.v1.sensor_pb2 import SensorData

_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp", "image/gif": ".gif"}
_IMAGE_DIMENSIONS = 3
_GREY_OR_COLOUR = (1, 3)
_SHADES = " .:-=+*#%@"
_WIDEST = 40
_INCHES = (5.0, 4.0)
_DPI = 100


def draw(reading: SensorData, stem: Path) -> Path:
    """Write a reading beside others that are called so, and return where: `stem` with the suffix of its kind.

    A tensor of three dimensions is a picture of height, width and channels; one of two is a window of time and
    channels, drawn as a line for each; scalars are bars. An encoded image is written as it came.

    Raises:
        PayloadError: there is nothing to draw.
    """
    if reading.WhichOneof("value") == "image":
        path = stem.with_suffix(_SUFFIXES.get(reading.image.media_type, ".bin"))
        path.write_bytes(reading.image.data)
        return path
    values = _values(reading)
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    if _is_picture(values):
        axes.imshow(_shaded(values), cmap="gray", interpolation="nearest")
        axes.set_axis_off()
    elif values.ndim == 1:
        axes.bar(np.arange(len(values)), values)
        axes.set_xlabel("channel")
    else:
        window = values.reshape(len(values), -1)
        for channel in range(window.shape[1]):
            axes.plot(window[:, channel], label=str(channel), linewidth=1)
        axes.set_xlabel("reading of the window")
    path = stem.with_suffix(".png")
    figure.savefig(path)
    return path


def sketch(reading: SensorData) -> str:
    """A small grey picture in characters; nothing for everything else."""
    if reading.WhichOneof("value") != "tensor":
        return ""
    values = _values(reading)
    if not _is_picture(values) or values.shape[2] != 1 or max(values.shape) > _WIDEST:
        return ""
    levels = (_shaded(values) * (len(_SHADES) - 1)).round().astype(int)
    # A character is about twice as high as wide.
    return "\n".join("".join(_SHADES[level] * 2 for level in row) for row in levels)


def _values(reading: SensorData) -> NDArray[Any]:
    kind = reading.WhichOneof("value")
    if kind == "scalars":
        values: NDArray[Any] = np.array(reading.scalars.values, dtype=np.float64)
    elif kind == "tensor":
        values = to_array(reading.tensor).astype(np.float64)
    else:
        raise PayloadError("carries no value", field="reading")
    if values.size == 0:
        raise PayloadError("holds no number", field=f"reading.{kind}")
    return np.atleast_1d(np.nan_to_num(values, posinf=0.0, neginf=0.0))


def _is_picture(values: NDArray[Any]) -> bool:
    return values.ndim == _IMAGE_DIMENSIONS and values.shape[2] in _GREY_OR_COLOUR


def _shaded(values: NDArray[Any]) -> NDArray[Any]:
    """From 0 to 1, as matplotlib wants them: (height, width) or (height, width, 3)."""
    low, span = values.min(), np.ptp(values)
    shaded = (values - low) / span if span else np.zeros_like(values)
    return shaded[:, :, 0] if shaded.shape[2] == 1 else shaded
