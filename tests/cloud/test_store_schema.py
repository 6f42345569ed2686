"""What the store's file holds: older ones are carried over, and other tools can read it."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from cloud import store_schema
from cloud.sample_store import Fate, StoredLabel, StoredSample
from cloud.sqlite_store import INSERT_SAMPLE, SqliteSampleStore
from shoal.errors import ConfigError
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER

EPOCH = bytes(range(16))
WHO, WHAT = ("device", "gateway"), ("release", "score", "label")

# As the first version wrote it; before that, `samples` had no boots.
FIRST = """
CREATE TABLE samples (device TEXT, epoch BLOB, seq INTEGER, model TEXT, gateway TEXT, reason INTEGER, reference TEXT,
  captured_at_us INTEGER, received_at_us INTEGER, reading BLOB, device_release INTEGER, device_score REAL,
  device_label INTEGER, gateway_release INTEGER, gateway_score REAL, gateway_label INTEGER, boot_id BLOB,
  since_boot_us INTEGER, digest BLOB, PRIMARY KEY (device, epoch, seq));
CREATE TABLE labels (device TEXT, epoch BLOB, seq INTEGER, label INTEGER, source INTEGER, author TEXT,
  labelled_at_us INTEGER, PRIMARY KEY (device, epoch, seq));
CREATE TABLE quarantine (id INTEGER PRIMARY KEY, gateway TEXT, reason TEXT, received_at_us INTEGER, payload BLOB);
CREATE TABLE boots (boot_id BLOB PRIMARY KEY, began_at_us INTEGER NOT NULL, is_exact INTEGER NOT NULL);
CREATE VIEW dated_samples AS
  SELECT samples.*, COALESCE(boots.began_at_us + samples.since_boot_us, samples.captured_at_us) AS dated_at_us
  FROM samples LEFT JOIN boots USING (boot_id);
"""

# Brings a file up to date, and is killed on its way: in the middle of the statement of that number.
KILLED = """
import os, signal, sqlite3, sys
from sqlite_utils import Database
from cloud.store_schema import bring_up_to_date
db = Database(sqlite3.connect(sys.argv[1], isolation_level=None))
statements = 0
def count(sql):
    global statements
    statements += 1
    if statements == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
db.conn.set_trace_callback(count)
bring_up_to_date(db)
"""

OPENS = """
import sys
from pathlib import Path
from cloud.sqlite_store import SqliteSampleStore
print("opens", flush=True)
SqliteSampleStore(Path(sys.argv[1]))
"""


def sample(seq):
    return StoredSample("cam-00", EPOCH, seq, "digits", "gw", 1, f"d/{seq}", 5, 1000 + seq, b"r", 1, 0.5, 3, 1, 0.1, 4)


def label(seq, value=7, author="ann", source=LABEL_SOURCE_PERSON, **fields):
    return StoredLabel("cam-00", EPOCH, seq, value, source, author, 1_700_000_000_500_000, **fields)


@pytest.fixture
def old(tmp_path):
    """A store of the first version: two samples, a label, a word on a sample that has not come, a refused payload."""
    path = tmp_path / "samples.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA journal_mode=WAL;" + FIRST)
        db.executemany(INSERT_SAMPLE, [(*sample(seq), sample(seq).digest) for seq in (1, 2)])
        db.executemany("INSERT INTO labels VALUES ('cam-00', ?, ?, ?, 1, 'ann', 9)", [(EPOCH, 1, 7), (EPOCH, 5, 8)])
        db.execute("INSERT INTO quarantine VALUES (1, 'gw', 'no epoch at all', 77, x'00')")
        db.execute("INSERT INTO boots VALUES (x'01', 5, 1)")
        db.commit()
    return path


def contents(path):
    """Everything that the first version's tables hold."""
    with closing(sqlite3.connect(path)) as db:
        columns = ", ".join(store_schema.SAMPLE_COLUMNS)
        words = "device, epoch, seq, label, source, author, labelled_at_us"
        queries = (f"SELECT {columns} FROM samples", f"SELECT {words} FROM labels", "SELECT * FROM quarantine")
        return [db.execute(query).fetchall() for query in (*queries, "SELECT * FROM boots")]


def test_store_of_the_first_version_is_carried_over(old):
    """Nothing of it is lost or changed, and all that is new works on it."""
    before = contents(old)
    with closing(SqliteSampleStore(old)) as store:
        assert contents(old) == before
        assert (store.count_labelled("digits"), store.count_quarantined()) == (1, 1)
        assert store.add([sample(1), sample(3), sample(5)]) == [Fate.DUPLICATE, Fate.STORED, Fate.STORED]
        assert store.count_labelled("digits") == 2
        assert store._db.execute("SELECT rowid FROM quarantine_fts WHERE quarantine_fts MATCH 'epoch'").fetchall()
        assert [word.label for word in store.labels.find(words="ann")] == [7, 8]


def test_store_from_before_boots_is_carried_over(old):
    """Its samples stay, with no boot."""
    with closing(sqlite3.connect(old)) as db:
        db.execute("DROP VIEW dated_samples")
        for name in ("boot_id", "since_boot_us"):
            db.execute(f"ALTER TABLE samples DROP COLUMN {name}")
        db.commit()
    with closing(SqliteSampleStore(old)) as store:
        rows = store._db.execute("SELECT seq, dated_at_us, boot_id FROM dated_samples").fetchall()
        assert rows == [(1, 5, None), (2, 5, None)]


def schema(path):
    with closing(sqlite3.connect(path)) as db:
        return set(db.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall())


def test_carried_over_or_new_is_the_same(old, tmp_path):
    """One schema, however the file came to it: same tables, columns, views and triggers."""
    SqliteSampleStore(old).close()
    SqliteSampleStore(tmp_path / "new.sqlite").close()
    names = [{row[:2] for row in schema(path)} for path in (old, tmp_path / "new.sqlite")]
    assert names[0] == names[1]
    with closing(sqlite3.connect(old)) as one, closing(sqlite3.connect(tmp_path / "new.sqlite")) as other:
        for kind, name in names[0]:
            if kind in ("table", "view"):
                query = f"PRAGMA table_xinfo({name})"
                assert one.execute(query).fetchall() == other.execute(query).fetchall()


def test_killed_on_the_way_leaves_the_file_as_it_was(old):
    """SIGKILL at every tenth statement: nothing has changed, nothing is lost, and the next process ends it."""
    before, was = contents(old), schema(old)
    for statement in range(1, 10_000, 10):
        done = subprocess.run([sys.executable, "-c", KILLED, str(old), str(statement)], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9
        assert contents(old) == before
        assert schema(old) - was == set()
    assert statement > 30
    with closing(SqliteSampleStore(old)) as store:
        assert store.count_labelled("digits") == 1
    assert contents(old) == before


def test_two_processes_at_once_bring_it_up_to_date_once(old):
    """The second waits for the first and finds it done."""
    with closing(sqlite3.connect(old, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")  # so that neither is done before the other has begun
        both = [subprocess.Popen([sys.executable, "-c", OPENS, str(old)], stdout=subprocess.PIPE) for _ in range(2)]
        assert [process.stdout.readline() for process in both] == [b"opens\n"] * 2
        db.execute("COMMIT")
    for process in both:
        process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]
    with closing(sqlite3.connect(old)) as db:
        steps = db.execute("SELECT name FROM _sqlite_migrations").fetchall()
    assert len(steps) == len(set(steps)) > 3


def test_open_store_waits_for_nobody(tmp_path):
    """A reader comes in while somebody writes: a file that is up to date is not written when it is opened."""
    path = tmp_path / "samples.sqlite"
    with closing(SqliteSampleStore(path)) as writer, store_schema.immediate(writer._db):
        writer._db.execute("INSERT INTO boots VALUES (x'01', 5, 1)")
        with closing(Database(sqlite3.connect(path, timeout=0, isolation_level=None))) as db:
            store_schema.bring_up_to_date(db)


def test_store_of_a_later_version_is_refused(tmp_path):
    """What this version does not know it would break."""
    path = tmp_path / "samples.sqlite"
    with closing(SqliteSampleStore(path)) as store:
        store._db["_sqlite_migrations"].insert({"migration_set": "samples", "name": "colours", "applied_at": "later"})
    with pytest.raises(ConfigError, match="a later version of Shoal has changed the store: colours"):
        SqliteSampleStore(path)


def test_every_table_and_column_is_documented(tmp_path):
    """What a person finds in the file, docs/store.md explains."""
    path = tmp_path / "samples.sqlite"
    SqliteSampleStore(path).close()
    page = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    names = {name for kind, name, _ in schema(path) if kind in ("table", "view")}
    own = {name for name in names if "_fts_" not in name}
    assert [name for name in sorted(own) if f"`{name}`" not in page] == []
    columns = set(store_schema.SAMPLE_COLUMNS) - {f"{who}_{what}" for who in WHO for what in WHAT}
    assert [name for name in sorted(columns) if f"`{name}`" not in page] == []


@pytest.fixture
def sqlite_utils(tmp_path):
    """Run the command of that name on a store with two samples and words on them; return its rows."""
    path = tmp_path / "samples.sqlite"
    with closing(SqliteSampleStore(path)) as store:
        store.add([sample(1), sample(2)])
        store.add_labels(
            [label(1, 7, note="blurred at the edge"), label(1, 8, "bob"), label(2, 4, "t-1", LABEL_SOURCE_TEACHER)]
        )
        store.set_aside("gw-01", "the key is stored with other bytes", b"\0", 1_700_000_000_500_000)

    def run(*arguments):
        command, *rest = arguments
        done = subprocess.run(
            [sys.executable, "-m", "sqlite_utils", command, str(path), *rest],
            check=True,
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)

    return run


def test_tools_read_it_with_names_and_dates(sqlite_utils):
    """As a person wants it: text dates, hex epochs, names of sources and reasons, without a word of SQL."""
    first, second = sqlite_utils("rows", "samples_readable")
    assert first | {"label": None} == {
        "device": "cam-00",
        "epoch": EPOCH.hex(),
        "seq": 1,
        "model": "digits",
        "gateway": "gw",
        "reason": "score",
        "reference": "d/1",
        "dated_at": "1970-01-01T00:00:00.000Z",
        "received_at": "1970-01-01T00:00:00.001Z",
        "bytes": 1,
        "device_release": 1,
        "device_score": 0.5,
        "device_label": 3,
        "gateway_release": 1,
        "gateway_score": 0.1,
        "gateway_label": 4,
        "label": None,
        "label_source": "person",
        "is_hard": 0,
        "dropped_at": None,
    }
    assert (second["label"], second["label_source"], second["is_hard"]) == (4, "teacher", 1)
    ann, *_ = sqlite_utils("rows", "labels_readable")
    assert (ann["author"], ann["source"], ann["labelled_at"]) == ("ann", "person", "2023-11-14T22:13:20.500Z")
    (conflict,) = sqlite_utils("rows", "conflicts")
    assert sorted(conflict["words"].split(", ")) == ["ann: 7", "bob: 8"]
    (refused,) = sqlite_utils("rows", "quarantine_readable")
    assert refused["received_at"] == "2023-11-14T22:13:20.500Z"


def test_tools_search_it(sqlite_utils):
    """Reasons of what was set aside, and authors and notes of labels, by their words."""
    assert [row["id"] for row in sqlite_utils("search", "quarantine", "other bytes")] == [1]
    assert sqlite_utils("search", "quarantine", "colours") == []
    assert [row["author"] for row in sqlite_utils("search", "labels", "blurred")] == ["ann"]
