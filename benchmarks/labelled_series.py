"""Reads folders of labelled series, laid out like NAB's and SKAB's."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.nab_score import Labels


@dataclass(frozen=True)
class Series:
    """One file of NAB: `values` are (row, channel)."""

    name: str
    values: NDArray[np.float64]
    labels: Labels


def load_nab(folder: Path) -> list[Series]:
    """Load `data/**.csv` (timestamp, then one column a channel) with the windows that `combined_windows.json` names.

    Raises:
        SystemExit: there is no file, or one without an entry in `combined_windows.json`; an empty list is an entry.
    """
    windows = json.loads((folder / "combined_windows.json").read_text())
    paths = sorted((folder / "data").rglob("*.csv"))
    names = [path.relative_to(folder / "data").as_posix() for path in paths]
    unknown = [name for name in names if name not in windows]
    if unknown or not names:
        raise SystemExit(
            f"{folder}: {len(names)} csv files in data, without an entry in combined_windows.json: {unknown}"
        )
    return [_load(name, path, windows[name]) for name, path in zip(names, paths, strict=True)]


def _load(name: str, path: Path, windows: list[list[str]]) -> Series:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    at = np.array([row[0] for row in rows], dtype="datetime64[us]")
    values = np.array([row[1:] for row in rows], dtype=np.float64)
    return Series(name, values, Labels(len(rows), tuple(sorted(_rows(at, name, edges) for edges in windows))))


def _rows(at: NDArray[np.datetime64], name: str, edges: list[str]) -> tuple[int, int]:
    """As NAB does: an edge is the first row with just its timestamp."""
    found = [np.flatnonzero(at == np.datetime64(edge)) for edge in edges]
    if len(found) != 2 or not all(len(rows) for rows in found):
        raise SystemExit(f"{name}: window {edges} does not begin and end at timestamps of the file")
    return int(found[0][0]), int(found[1][0])


def load_skab(path: Path) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Load one file of SKAB: readings, (row, channel), and which rows are anomalous; none where no column says so."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    channels = [name for name in rows[0] if name not in {"datetime", "anomaly", "changepoint"}]
    values = np.array([[float(row[name]) for name in channels] for row in rows])
    return values, np.array([float(row.get("anomaly", 0)) > 0 for row in rows])
