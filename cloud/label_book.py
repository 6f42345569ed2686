"""The words on samples, as people and programs that label ask for them."""
# ruff: noqa: S608  built from our own names

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from enum import Enum, unique
from typing import NamedTuple

from sqlite_utils import Database

from cloud.labels import Decision, Word, decide
from cloud.sample_store import SampleKey, StoredLabel, StoredSample
from cloud.store_schema import immediate

_COLUMNS = ", ".join(field.name for field in fields(StoredLabel))
_SAMPLE = ", ".join(StoredSample._fields)
_OF_KEY = "device = ? AND epoch = ? AND seq = ?"
_PUT = f"""
INSERT INTO labels ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (device, epoch, seq, source, author) DO UPDATE SET label = excluded.label,
  labelled_at_us = excluded.labelled_at_us, note = excluded.note, settles = excluded.settles
  WHERE excluded.labelled_at_us >= labels.labelled_at_us
"""
_CONFLICTS = """
SELECT device, epoch, seq FROM effective_labels JOIN samples USING (device, epoch, seq)
WHERE is_conflict AND model = ? AND reading IS NOT NULL
ORDER BY effective_labels.label IS NOT NULL, samples.rowid LIMIT ?
"""
# Where device and gateway differ one of them is wrong for certain; then what the better model doubted most.
_UNLABELLED = """
SELECT device, epoch, seq FROM samples WHERE model = ? AND reading IS NOT NULL AND NOT EXISTS (
  SELECT 1 FROM effective_labels AS known
  WHERE known.device = samples.device AND known.epoch = samples.epoch AND known.seq = samples.seq)
ORDER BY COALESCE(device_label <> gateway_label, 0) DESC, COALESCE(gateway_score, device_score, 0) DESC, rowid DESC
LIMIT ?
"""


@unique
class Why(Enum):
    """Why a sample is worth somebody's look, the most valuable first."""

    CONFLICT = "conflict"
    UNLABELLED = "unlabelled"


class Question(NamedTuple):
    """A sample that somebody should look at."""

    key: SampleKey
    why: Why


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one model's samples that are still here.

    Attributes:
        labelled: with a label that counts.
        undecided: with words and no label, for persons differ.
        conflicts: where words of one source differ, `undecided` among them.
    """

    samples: int
    labelled: int
    undecided: int
    conflicts: int


class LabelBook:
    """Reads and takes back; `SqliteSampleStore.add_labels` writes."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def sample(self, key: SampleKey) -> StoredSample | None:
        """A sample that is still here."""
        query = f"SELECT {_SAMPLE} FROM samples WHERE {_OF_KEY} AND reading IS NOT NULL"
        row = self._db.execute(query, key).fetchone()
        return None if row is None else StoredSample(*row)

    def is_known(self, key: SampleKey) -> bool:
        """Whether a sample has come, dropped since or not."""
        return self._db.execute(f"SELECT 1 FROM samples WHERE {_OF_KEY}", key).fetchone() is not None

    def words(self, key: SampleKey) -> list[StoredLabel]:
        """Everything that was said of a sample, oldest first."""
        query = f"SELECT {_COLUMNS} FROM labels WHERE {_OF_KEY} ORDER BY labelled_at_us, author"
        return [_label(row) for row in self._db.execute(query, key)]

    def decision(self, key: SampleKey) -> Decision | None:
        return decide(
            Word(item.label, item.source, item.author, item.labelled_at_us, item.settles) for item in self.words(key)
        )

    def take_back(self, said: StoredLabel, before: StoredLabel | None) -> None:
        """Undo a word: what its author said before, if anything, stands again."""
        with immediate(self._db) as connection:
            connection.execute(
                f"DELETE FROM labels WHERE {_OF_KEY} AND source = ? AND author = ?",
                (*said.key, said.source, said.author),
            )
            put_words(connection, [before] if before is not None else [])

    def queue(self, model: str, limit: int) -> list[Question]:
        """The samples most worth a person's look, at most so many: conflicts, then what no one labelled."""
        found = [
            Question(SampleKey(*row), Why.CONFLICT) for row in self._db.execute(_CONFLICTS, (model, limit)).fetchall()
        ]
        rest = self._db.execute(_UNLABELLED, (model, limit - len(found))).fetchall()
        return found + [Question(SampleKey(*row), Why.UNLABELLED) for row in rest]

    def unlabelled(self, model: str, after: int, limit: int) -> list[tuple[int, StoredSample]]:
        """Samples of which nobody said anything, by the number of their row, above `after`."""
        query = (
            f"SELECT rowid, {_SAMPLE} FROM samples WHERE model = ? AND rowid > ? AND reading IS NOT NULL"
            " AND NOT EXISTS (SELECT 1 FROM labels WHERE labels.device = samples.device"
            " AND labels.epoch = samples.epoch AND labels.seq = samples.seq) ORDER BY rowid LIMIT ?"
        )
        return [(row[0], StoredSample(*row[1:])) for row in self._db.execute(query, (model, after, limit))]

    def totals(self, model: str) -> Totals:
        (samples,) = self._db.execute(
            "SELECT COUNT(*) FROM samples WHERE model = ? AND reading IS NOT NULL", (model,)
        ).fetchone()
        labelled, undecided, conflicts = self._db.execute(
            "SELECT COUNT(label), COUNT(*) - COUNT(label), COALESCE(SUM(is_conflict), 0)"
            " FROM (SELECT effective_labels.label, is_conflict FROM effective_labels"
            " JOIN samples USING (device, epoch, seq) WHERE model = ? AND reading IS NOT NULL)",
            (model,),
        ).fetchone()
        return Totals(samples, labelled, undecided, conflicts)

    def find(
        self,
        *,
        model: str | None = None,
        source: int | None = None,
        words: str | None = None,
        only_conflicts: bool = False,
        limit: int = -1,
    ) -> Iterator[StoredLabel]:
        """Words by the key of their sample and then oldest first; all by default.

        Args:
            model: of the samples; a word whose sample is not here yet belongs to none.
            source: of the words.
            words: that author or note must hold, in the syntax of SQLite's FTS5.
            only_conflicts: of samples only where words of one source differ.
            limit: at most so many.

        Raises:
            sqlite3.OperationalError: `words` is no query of FTS5.
        """
        query = f"SELECT {_COLUMNS} FROM labels"
        where: dict[str, str | int] = {}
        if model is not None:
            where[
                "EXISTS (SELECT 1 FROM samples WHERE samples.device = labels.device"
                " AND samples.epoch = labels.epoch AND samples.seq = labels.seq AND samples.model = ?)"
            ] = model
        if source is not None:
            where["source = ?"] = source
        if words is not None:
            where["rowid IN (SELECT rowid FROM labels_fts WHERE labels_fts MATCH ?)"] = words
        if only_conflicts:
            where["(device, epoch, seq) IN (SELECT device, epoch, seq FROM effective_labels WHERE is_conflict = ?)"] = 1
        if where:
            query += " WHERE " + " AND ".join(where)
        query += " ORDER BY device, epoch, seq, labelled_at_us, source, author LIMIT ?"
        for row in self._db.execute(query, (*where.values(), limit)):
            yield _label(row)


def put_words(connection: sqlite3.Connection, labels: Iterable[StoredLabel]) -> int:
    """Keep each author's newest word on each sample; within the caller's transaction. Returns how many were given."""
    rows = [astuple(label) for label in labels]
    connection.executemany(_PUT, rows)
    return len(rows)


def _label(row: tuple[str, bytes, int, int, int, str, int, str, int]) -> StoredLabel:
    return StoredLabel(*row[:-1], bool(row[-1]))
