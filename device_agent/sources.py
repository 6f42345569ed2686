"""Where readings come from."""

import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from device_agent.readings import Reading
from shoal.errors import ConfigError

# What is left of a reference's 64 bytes holds the colon and any row number.
_NAME_BYTES = 40


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
        # Cut in bytes: that is what a reference is limited by.
        name = self._path.stem.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                self._check_columns(rows.fieldnames or ())
                for number, row in enumerate(rows, start=1):
                    yield Reading(self._values(row, number), int(time.time() * 1e6), f"{name}:{number}")
        except OSError as exc:
            raise ConfigError(f"source {self._path}: {exc.strerror}") from exc
        except (UnicodeDecodeError, csv.Error) as exc:
            raise ConfigError(f"source {self._path}: {exc}") from exc

    def _check_columns(self, header: Sequence[str]) -> None:
        missing = [column for column in self._columns if column not in header]
        if missing:
            found = ", ".join(header) or "none"
            raise ConfigError(f"source {self._path}: no column {', '.join(missing)}; there are {found}")

    def _values(self, row: dict[str, str], number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        values = [self._value(row[column], number, column) for column in self._columns]
        with np.errstate(over="ignore"):  # too large for a float32 is infinite, which the gateway refuses by name
            return np.array(values, dtype=np.float32)

    def _value(self, cell: str | None, number: int, column: str) -> float:
        try:
            return float(cell or "")
        except ValueError as exc:
            where = f"source {self._path}, row {number}, column {column}"
            raise ConfigError(f"{where}: {cell or 'nothing'!r} is not a number") from exc
