"""Which retained blobs this publisher may have left on a broker. Written before the first byte goes out."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path


class BlobLedger:
    """Digests in SQLite. A blob is here from before it is published until the broker has confirmed its clearing."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute("CREATE TABLE IF NOT EXISTS blob (sha256 BLOB PRIMARY KEY)")

    def add(self, digests: Iterable[bytes]) -> None:
        self._write("INSERT OR IGNORE INTO blob VALUES (?)", digests)

    def remove(self, digests: Iterable[bytes]) -> None:
        self._write("DELETE FROM blob WHERE sha256 = ?", digests)

    def digests(self) -> set[bytes]:
        return {row[0] for row in self._database.execute("SELECT sha256 FROM blob")}

    def close(self) -> None:
        self._database.close()

    def _write(self, statement: str, digests: Iterable[bytes]) -> None:
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany(statement, [(item,) for item in digests])
