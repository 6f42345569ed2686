"""Where readings come from."""

import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from device_agent.readings import Reading
from shoal.errors import ConfigError


class Source(Protocol):
    """Yields readings until there are no more; the agent paces it."""

    def __iter__(self) -> Iterator[Reading]: ...


class CsvSource:
    """Replays the columns of a CSV file that has a header. `reference` is `name:row`.

    Raises (while iterating):
        ConfigError: no such file or column, or a cell that is not a number; file, row and column are named.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = columns

    def __iter__(self) -> Iterator[Reading]:
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                for number, row in enumerate(csv.DictReader(file), start=1):
                    yield Reading(self._values(row, number), int(time.time() * 1e6), f"{self._path.stem[:40]}:{number}")
        except OSError as exc:
            raise ConfigError(f"source {self._path}: {exc.strerror}") from exc

    def _values(self, row: dict[str, str], number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        try:
            return np.array([float(row[column]) for column in self._columns], dtype=np.float32)
        except KeyError as exc:
            raise ConfigError(f"source {self._path}: no column {exc}; there are {', '.join(row)}") from exc
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"source {self._path}, row {number}: {exc}") from exc
