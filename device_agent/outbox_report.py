"""What waits in a device's outbox, what was set aside, and how large one must be."""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ConfigError

# Of a row beside its payload: key, model, index, SQLite's own share; measured on 10,000 rows.
_ROW_OVERHEAD_BYTES = 130


@dataclass(frozen=True, slots=True)
class OutboxReport:
    """The store as last committed."""

    waiting: int
    waiting_bytes: int
    quarantined: int
    by_model: dict[str, int]
    counters: dict[str, int]
    file_bytes: int


def read_outbox(path: Path) -> OutboxReport:
    """Read a store without touching it; its agent may run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    with _reading(path) as store:
        waiting, size = store.execute("SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0) FROM items").fetchone()
        (quarantined,) = store.execute("SELECT COUNT(*) FROM quarantine").fetchone()
        by_model = dict(store.execute("SELECT model, COUNT(*) FROM items GROUP BY model ORDER BY model"))
        counters = dict(store.execute("SELECT name, SUM(value) FROM counters GROUP BY name ORDER BY name"))
    return OutboxReport(waiting, size, quarantined, by_model, counters, path.stat().st_size)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One reading that was refused for ever: `payload` is an InferenceRow, empty where it was too large to keep."""

    device: str
    epoch: bytes
    seq: int
    model: str
    status: str
    field: str
    message: str
    refused_at: int
    size_bytes: int
    payload: bytes


def read_quarantine(path: Path) -> list[Quarantined]:
    """What a store has set aside, oldest first; its agent may run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    query = (
        "SELECT device, epoch, seq, model, status, field, message, refused_at, size_bytes, payload FROM quarantine"
        " ORDER BY id"
    )
    with _reading(path) as store:
        return [Quarantined(*row) for row in store.execute(query)]


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.exists():
        raise ConfigError(f"{path}: no outbox yet: the agent makes it when it first starts")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            yield store
    except sqlite3.Error as exc:
        raise ConfigError(f"{path}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class OutboxSize:
    """Settings that hold so much, and what that takes of the disk."""

    outbox_items: int
    outbox_bytes: int
    disk_bytes: int


def size_for(rate_hz: float, hours: float, share: float, reading_bytes: int) -> OutboxSize:
    """How large an outbox must be to lose nothing while the gateway is silent.

    Args:
        rate_hz: readings a second.
        hours: of silence.
        share: of the readings that are asked about; 1 in an outage of the model too.
        reading_bytes: of one asked reading: 50 and its values, 4 bytes for each number.

    Raises:
        ConfigError: a figure that cannot be.
    """
    if not (rate_hz > 0 and hours > 0 and 0 < share <= 1 and reading_bytes > 0):
        raise ConfigError(
            f"rate {rate_hz}, hours {hours}, share {share}, bytes {reading_bytes}: all above 0, share at most 1"
        )
    items = math.ceil(rate_hz * hours * 3600 * share)
    payload = items * reading_bytes
    return OutboxSize(items, payload, payload + items * _ROW_OVERHEAD_BYTES)
