"""The real data that the simulated fleet reads: two sets that ship inside installed packages.

Only the `stream` rows reach devices; the others made the first release. A device that read a row which training has
seen would flatter every accuracy in the report.
"""

import gzip
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError

_SHUTTLE_STREAM = slice(12000, 49097)
_DIGITS_FIRST_STREAMED = 700
_DIGITS_SPLIT_SEED = 20
_HELD_OUT_SEED = 21
_HELD_OUT_SHARE = 0.4


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """Readings in the sensor's own units, the truth about them, and who may see it.

    Attributes:
        name: first part of every reference to a row.
        values: (n, *shape) float32, read-only.
        labels: (n,) int64: the class, or 1 for an anomaly.
        stream: (m,) int64, the rows that devices read, in their order.
        held_out: (n,) bool: streamed like the others but never labelled, so that no release is trained on them.
    """

    name: str
    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    stream: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    def __post_init__(self) -> None:
        for array in (self.values, self.labels, self.stream, self.held_out):
            array.setflags(write=False)


def load_shuttle() -> DataSet:
    """Read Statlog Shuttle: values (49097, 9), streamed in the order of flight, none held out.

    Raises:
        ConfigError: the installed `river` does not hold the data.

    Source: https://archive.ics.uci.edu/dataset/148/statlog+shuttle, as in river 0.26.
    """
    table = _load_table("river", "datasets/shuttle.csv.gz", (49097, 10), skip_rows=1)
    rows = np.arange(len(table), dtype=np.int64)
    return DataSet(
        name="shuttle",
        values=table[:, :9],
        labels=table[:, 9].astype(np.int64),
        stream=rows[_SHUTTLE_STREAM],
        held_out=np.zeros(len(table), dtype=np.bool_),
    )


def load_digits() -> DataSet:
    """Read the digits: values (1797, 8, 8, 1), raw pixels 0 to 16; two streamed images in five are held out.

    Raises:
        ConfigError: the installed `scikit-learn` does not hold the data.

    Source: https://archive.ics.uci.edu/dataset/80, as in scikit-learn's `load_digits`.
    """
    # Read as a file: importing sklearn.datasets takes a second.
    table = _load_table("sklearn", "datasets/data/digits.csv.gz", (1797, 65), skip_rows=0)
    stream = np.random.default_rng(_DIGITS_SPLIT_SEED).permutation(len(table))[_DIGITS_FIRST_STREAMED:]
    held_out = np.zeros(len(table), dtype=np.bool_)
    held_out[np.random.default_rng(_HELD_OUT_SEED).permutation(stream)[: round(_HELD_OUT_SHARE * len(stream))]] = True
    return DataSet(
        name="digits",
        values=table[:, :64].reshape(-1, 8, 8, 1),
        labels=table[:, 64].astype(np.int64),
        stream=stream,
        held_out=held_out,
    )


def _load_table(package: str, path: str, shape: tuple[int, int], skip_rows: int) -> NDArray[np.float32]:
    # Found without importing the package: river takes a second and we want only its file.
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(place) / path for place in spec.submodule_search_locations or ()]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise ConfigError(f"{path} of package {package} is missing: install the `simulator` extra")
    try:
        lines = gzip.decompress(place.read_bytes()).decode().splitlines()
        table = np.loadtxt(lines, delimiter=",", skiprows=skip_rows, dtype=np.float32)
    except (OSError, EOFError, ValueError) as exc:
        raise ConfigError(f"{place} cannot be read: {exc}") from exc
    if table.shape != shape or not math.isfinite(table.sum()):
        raise ConfigError(f"{place}: {table.shape} or not finite, expected {shape} finite numbers")
    return table
