"""CSV files, replayed."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from device_agent.readings import Reading
from device_agent.sources.feed import Feed, call_at_pace, now_us, short_name
from shoal.errors import ConfigError
from shoal.loop import Timer


class CsvSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="csv"):
    """`kind = "csv"`: a file to replay."""

    path: str
    columns: Annotated[list[str], Meta(min_length=1)]
    rate_hz: Annotated[float, Meta(gt=0)] = 1.0
    header: bool = True
    delimiter: Annotated[str, Meta(min_length=1, max_length=1)] = ","
    repeat: bool = False


class CsvSource:
    """Replays columns of a CSV file, by the names in its header or, where it has none, by number from 1.

    `reference` is `name:row`.
    """

    def __init__(self, settings: CsvSettings) -> None:
        self._settings = settings
        self._path = Path(settings.path)
        self._name = short_name(self._path.stem)
        self._readings = self.readings()
        self._taken = 0
        self._timer: Timer | None = None

    def start(self, feed: Feed) -> None:
        def poll() -> None:
            reading = next(self._readings, None)
            if reading is not None:
                self._taken += 1
                feed.take(reading)
            elif self._settings.repeat and self._taken:
                self._taken = 0
                self._readings = self.readings()
                feed.gap()
            else:
                self.close()
                feed.end()

        self._timer = call_at_pace(feed, self._settings.rate_hz, poll)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def readings(self) -> Iterator[Reading]:
        """Read the file once from its start.

        Raises:
            ConfigError: no such file or column, or a cell that is not a number; file, row and column are named.
        """
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = csv.reader(file, delimiter=self._settings.delimiter)
                header = next(rows, []) if self._settings.header else None
                places = self._places(header)
                for number, row in enumerate(filter(None, rows), start=1):
                    yield Reading(self._values(row, places, number), now_us(), f"{self._name}:{number}")
        except OSError as exc:
            raise ConfigError(f"source {self._path}: {exc.strerror}") from exc
        except (UnicodeDecodeError, csv.Error) as exc:
            raise ConfigError(f"source {self._path}: {exc}") from exc

    def _places(self, header: Sequence[str] | None) -> list[int]:
        columns = self._settings.columns
        if header is None:
            wrong = [column for column in columns if not column.isdecimal() or int(column) < 1]
            if wrong:
                raise ConfigError(f"source {self._path}: column {', '.join(wrong)}; without a header they are 1, 2")
            return [int(column) - 1 for column in columns]
        missing = [column for column in columns if column not in header]
        if missing:
            found = ", ".join(header) or "none"
            raise ConfigError(f"source {self._path}: no column {', '.join(missing)}; there are {found}")
        return [header.index(column) for column in columns]

    def _values(self, row: Sequence[str], places: Sequence[int], number: int) -> NDArray[np.float32]:
        cells = [row[place] if place < len(row) else "" for place in places]
        values = [self._value(cell, number, at) for at, cell in enumerate(cells)]
        with np.errstate(over="ignore"):  # too large for a float32 is infinite, which the gateway refuses by name
            return np.array(values, dtype=np.float32)

    def _value(self, cell: str, number: int, at: int) -> float:
        try:
            return float(cell)
        except ValueError as exc:
            where = f"source {self._path}, row {number}, column {self._settings.columns[at]}"
            raise ConfigError(f"{where}: {cell or 'nothing'!r} is not a number") from exc
