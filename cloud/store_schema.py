"""The tables and views of `samples.sqlite`, and the steps by which older files become this; see docs/store.md.

All steps that a file lacks are one transaction: a kill in the middle leaves the file as it was.
"""
# ruff: noqa: S608  built from our own names and numbers

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from cloud.labels import DECIDED_LABELS, SOURCE_NAME
from shoal.errors import ConfigError
from shoal.v1.inference_pb2 import ASK_REASON_AUDIT, ASK_REASON_SCORE, AskReason

KEY = ("device", "epoch", "seq")
SAMPLE_COLUMNS = {
    "device": str,
    "epoch": bytes,
    "seq": int,
    "model": str,
    "gateway": str,
    "reason": int,
    "reference": str,
    "captured_at_us": int,
    "received_at_us": int,
    "reading": bytes,
    "device_release": int,
    "device_score": float,
    "device_label": int,
    "gateway_release": int,
    "gateway_score": float,
    "gateway_label": int,
    "boot_id": bytes,
    "since_boot_us": int,
    "digest": bytes,
}
_ADDED_LATER = ("boot_id", "since_boot_us")
# An answer with a class is wrong where the label is another. One with a score alone says by why the device asked what
# it took the reading for: 1 where the score made it ask, 0 where only the lot did.
IS_HARD = f"""
COALESCE(gateway_label <> label, 0) OR COALESCE(label <> COALESCE(device_label, CASE
  WHEN device_score IS NULL THEN NULL WHEN reason = {ASK_REASON_SCORE} THEN 1 WHEN reason = {ASK_REASON_AUDIT} THEN 0
  END), 0)
"""
_REASON_NAMES = " ".join(
    f"WHEN {number} THEN '{name.removeprefix('ASK_REASON_').lower()}'" for name, number in AskReason.items()
)

_steps = Migrations("samples")


def bring_up_to_date(db: Database) -> None:
    """Apply the steps that the file lacks; where it lacks none, nothing is written and nobody waited for.

    Raises:
        ConfigError: a later version of Shoal has changed the file.
    """
    own = {step.name for step in _steps.pending(Database(memory=True))}
    later = {step.name for step in _steps.applied(db)} - own
    if later:
        raise ConfigError(f"a later version of Shoal has changed the store: {', '.join(sorted(later))}")
    if _steps.pending(db):
        with immediate(db):
            # Asked again within, for now no other process can apply them too.
            _steps.apply(db)


@contextmanager
def immediate(db: Database) -> Iterator[sqlite3.Connection]:
    """One transaction that writes, from its beginning on; what is raised within undoes it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db.conn
        db.execute("COMMIT")
    except BaseException:
        # Where the disk is full, SQLite may have rolled back by itself.
        if db.conn.in_transaction:
            db.execute("ROLLBACK")
        raise


def _decide_again(row: str) -> str:
    key = " AND ".join(f"{column} = {row}.{column}" for column in KEY)
    return (
        f"DELETE FROM effective_labels WHERE {key};"
        f" INSERT INTO effective_labels SELECT * FROM decided_labels WHERE {key};"
    )


def _iso(column: str) -> str:
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column} / 1e6, 'unixepoch')"


_VIEWS: Mapping[str, str] = MappingProxyType(
    {
        "dated_samples": """
SELECT samples.*, COALESCE(boots.began_at_us + samples.since_boot_us, samples.captured_at_us) AS dated_at_us
FROM samples LEFT JOIN boots USING (boot_id) WHERE dropped_at_us IS NULL
""",
        "samples_readable": f"""
SELECT device, LOWER(HEX(epoch)) AS epoch, seq, model, gateway, CASE reason {_REASON_NAMES} END AS reason, reference,
  {_iso("COALESCE(boots.began_at_us + since_boot_us, captured_at_us)")} AS dated_at,
  {_iso("received_at_us")} AS received_at, LENGTH(reading) AS bytes,
  device_release, device_score, device_label, gateway_release, gateway_score, gateway_label,
  label, {SOURCE_NAME} AS label_source, {IS_HARD} AS is_hard, {_iso("dropped_at_us")} AS dropped_at
FROM samples LEFT JOIN boots USING (boot_id) LEFT JOIN effective_labels USING (device, epoch, seq)
""",
        "labels_readable": f"""
SELECT device, LOWER(HEX(epoch)) AS epoch, seq, label, {SOURCE_NAME} AS source, author,
  {_iso("labelled_at_us")} AS labelled_at, settles, note
FROM labels
""",
        "conflicts": f"""
SELECT device, LOWER(HEX(epoch)) AS epoch, seq, model, effective_labels.label, {SOURCE_NAME} AS source,
  (SELECT GROUP_CONCAT(author || ': ' || said.label, ', ') FROM labels AS said WHERE said.device =
    effective_labels.device AND said.epoch = effective_labels.epoch AND said.seq = effective_labels.seq
    AND said.source = effective_labels.source) AS words
FROM effective_labels LEFT JOIN samples USING (device, epoch, seq) WHERE is_conflict
""",
        "quarantine_readable": f"""
SELECT id, gateway, reason, {_iso("received_at_us")} AS received_at, LENGTH(payload) AS bytes FROM quarantine
""",
    }
)


@_steps()
def samples_and_boots(db: Database) -> None:
    """What the first version made, and the columns that it got later."""
    samples = db.table("samples")
    samples.create(SAMPLE_COLUMNS, pk=KEY, if_not_exists=True)
    for name in _ADDED_LATER:
        if name not in samples.columns_dict:
            samples.add_column(name, SAMPLE_COLUMNS[name])
    db.table("quarantine").create(
        {"id": int, "gateway": str, "reason": str, "received_at_us": int, "payload": bytes}, pk="id", if_not_exists=True
    )
    db.execute(
        "CREATE TABLE IF NOT EXISTS boots"
        " (boot_id BLOB PRIMARY KEY, began_at_us INTEGER NOT NULL, is_exact INTEGER NOT NULL)"
    )


@_steps()
def every_word(db: Database) -> None:
    """One label of a sample becomes one of each author; what counts is kept beside them by triggers.

    A table, and not the view alone: what counts is asked for far more often than something is said, and the view reads
    every word of all samples.
    """
    old = db.table("labels").exists()
    if old:
        db.execute("ALTER TABLE labels RENAME TO old_labels")
    db.execute(
        "CREATE TABLE labels (device TEXT NOT NULL, epoch BLOB NOT NULL, seq INTEGER NOT NULL,"
        " label INTEGER NOT NULL, source INTEGER NOT NULL, author TEXT NOT NULL, labelled_at_us INTEGER NOT NULL,"
        " note TEXT NOT NULL DEFAULT '', settles INTEGER NOT NULL DEFAULT 0,"
        " PRIMARY KEY (device, epoch, seq, source, author))"
    )
    db.execute(f"CREATE VIEW decided_labels AS {DECIDED_LABELS}")
    db.execute(
        "CREATE TABLE effective_labels (device TEXT, epoch BLOB, seq INTEGER, label INTEGER, source INTEGER NOT NULL,"
        " author TEXT NOT NULL, labelled_at_us INTEGER NOT NULL, is_conflict INTEGER NOT NULL,"
        " PRIMARY KEY (device, epoch, seq)) WITHOUT ROWID"
    )
    for event, rows in (("insert", ("new",)), ("update", ("old", "new")), ("delete", ("old",))):
        body = "".join(_decide_again(row) for row in rows)
        db.execute(f"CREATE TRIGGER labels_decide_{event} AFTER {event.upper()} ON labels BEGIN {body} END")
    if old:
        db.execute(
            "INSERT INTO labels (device, epoch, seq, label, source, author, labelled_at_us)"
            " SELECT device, epoch, seq, label, COALESCE(source, 0), COALESCE(author, ''), COALESCE(labelled_at_us, 0)"
            " FROM old_labels WHERE label IS NOT NULL"
        )
        db.execute("DROP TABLE old_labels")


@_steps()
def tombstones(db: Database) -> None:
    """A dropped sample keeps its row, so that it is a duplicate when it is sent again; `reading` is NULL then."""
    db.table("samples").add_column("dropped_at_us", int)


@_steps()
def full_text(db: Database) -> None:
    db.table("quarantine").enable_fts(["gateway", "reason"], create_triggers=True)
    db.table("labels").enable_fts(["author", "note"], create_triggers=True)


@_steps()
def views(db: Database) -> None:
    """Dates as text, epochs as hex digits, numbers of enums as their names."""
    db.execute("DROP VIEW IF EXISTS dated_samples")
    for name, query in _VIEWS.items():
        db.execute(f"CREATE VIEW {name} AS {query}")
