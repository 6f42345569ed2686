"""What the simulator knows and the system under test does not: every reading with the truth about it.

One CSV file for each fleet process, one line for each reading and one for each reply; whoever judges a run reads it.
"""

import csv
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Entry:
    """One line.

    Attributes:
        event: `read` (the device's own answer) or `reply` (the gateway's).
        predicted: the class answered; empty where there is none.
        bytes_json: what the reading takes as JSON in protobuf's canonical mapping.
        bytes_json_compact: the same in the shortest JSON that carries device, number, time and values.
    """

    at: float
    event: str
    device: str
    seq: int
    reference: str
    phase: str
    label: int
    held_out: int
    reason: str
    release: int
    score: float
    predicted: int | None
    latency_ms: float
    bytes_json: int
    bytes_json_compact: int


_COLUMNS = [field.name for field in fields(Entry)]
# Makes a line that a kill cut short unreadable wherever it was cut: too many columns, or a last one that is no number.
_CUT = ",cut\r\n"


class Journal:
    """Appends entries; `flush` makes them readable to others. What a kill cut short stays, as a line of its own."""

    def __init__(self, path: Path) -> None:
        is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file: IO[str] = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if self._file.tell() == 0:
            self._writer.writerow(_COLUMNS)
        elif is_cut:
            self._file.write(_CUT)

    def write(self, entry: Entry) -> None:
        self._writer.writerow(astuple(entry))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JournalReader:
    """Reads a journal while it grows: each call of `new` returns the complete lines since the last.

    Lines that a kill cut short are left out: nobody was told of what they say.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> Iterator[Entry]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = self._rest + file.read()
            self._offset = file.tell()
        complete, newline, self._rest = data.rpartition(b"\n")
        if newline:
            for line in complete.decode(errors="replace").split("\n"):
                entry = _parse(line)
                if entry is not None:
                    yield entry


def _parse(line: str) -> Entry | None:
    """Read one line for itself: a quote that a kill left open must not swallow those behind it.

    Returns None for the line of names, and for one that was cut.
    """
    try:
        return _entry(next(csv.reader([line]), []))
    except (ValueError, csv.Error):
        return None


def _entry(row: list[str]) -> Entry:
    cells = dict(zip(_COLUMNS, row, strict=True))
    return Entry(
        at=float(cells["at"]),
        event=cells["event"],
        device=cells["device"],
        seq=int(cells["seq"]),
        reference=cells["reference"],
        phase=cells["phase"],
        label=int(cells["label"]),
        held_out=int(cells["held_out"]),
        reason=cells["reason"],
        release=int(cells["release"]),
        score=float(cells["score"]),
        predicted=int(cells["predicted"]) if cells["predicted"] else None,
        latency_ms=float(cells["latency_ms"]),
        bytes_json=int(cells["bytes_json"]),
        bytes_json_compact=int(cells["bytes_json_compact"]),
    )


def unix_time() -> float:
    return time.time()
