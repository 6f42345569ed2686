"""The two real data sets that ship inside installed packages, and who may see which rows.

The first release is made from the training and held-out rows. Everything else is the fleet's stream, which training
sees only through labelled samples that came back.
"""

import gzip
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud.tasks.base import LabelledSamples
from shoal.errors import ConfigError

SHUTTLE_TRAIN = slice(0, 9000)
SHUTTLE_SELECT = slice(9000, 12000)
SHUTTLE_STREAM = slice(12000, 49097)

DIGITS_INITIAL = 700
DIGITS_HOLDOUT = 140
_DIGITS_SEED = 20


def shuttle_rows() -> LabelledSamples:
    """Return all of Statlog Shuttle: x (49097, 9), y 1 for an anomaly.

    Raises:
        ConfigError: the installed `river` does not hold the data.

    Source: https://archive.ics.uci.edu/dataset/148/statlog+shuttle, as in river 0.26.
    """
    table = _load_table("river", "datasets/shuttle.csv.gz", (49097, 10), skip_rows=1)
    return LabelledSamples(table[:, :9], table[:, 9].astype(np.int64))


def digits_images() -> LabelledSamples:
    """Return all digits in the package's order: x (1797, 8, 8, 1) raw pixels 0 to 16, y the class.

    Raises:
        ConfigError: the installed `scikit-learn` does not hold the data.

    Source: https://archive.ics.uci.edu/dataset/80, as in scikit-learn's `load_digits`.
    """
    # Read as a file, because importing sklearn.datasets takes a second.
    table = _load_table("sklearn", "datasets/data/digits.csv.gz", (1797, 65), skip_rows=0)
    return LabelledSamples(table[:, :64].reshape(-1, 8, 8, 1), table[:, 64].astype(np.int64))


def digits_initial() -> NDArray[np.int64]:
    """Return the rows of the first release, (700,); the last 140 are held out for the gate."""
    return _digits_order()[:DIGITS_INITIAL]


def digits_stream() -> NDArray[np.int64]:
    """Return the rows that the fleet sees, (1097,)."""
    return _digits_order()[DIGITS_INITIAL:]


def _digits_order() -> NDArray[np.int64]:
    return np.random.default_rng(_DIGITS_SEED).permutation(1797)


def load_samples(path: Path) -> LabelledSamples:
    """Read a user's NPZ file with `x` (n, ...) and `y` (n,).

    Raises:
        ConfigError: it is not there, or does not hold finite rows with a label of at least 0 for each.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = np.asarray(file["x"], np.float32), np.asarray(file["y"], np.int64)
            samples = LabelledSamples(x, y)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    if not len(samples) or not np.isfinite(samples.x).all() or samples.y.min() < 0:
        raise ConfigError(f"{path}: {len(samples)} rows, expected some, finite, with labels of at least 0")
    return samples


def _load_table(package: str, path: str, shape: tuple[int, int], skip_rows: int) -> NDArray[np.float32]:
    try:
        packed = resources.files(package).joinpath(path).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as exc:
        raise ConfigError(f"{path} of package {package} is missing: install the `cloud` extra") from exc
    lines = gzip.decompress(packed).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", skiprows=skip_rows, dtype=np.float32)
    if table.shape != shape:
        raise ConfigError(f"{path} of package {package}: {table.shape}, expected {shape}")
    return table
