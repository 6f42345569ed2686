"""The outbox on a disk that refuses: what fails is tried again, and is neither lost nor counted twice."""

import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.delivery.outbox import Item, Key, Outbox

pytestmark = pytest.mark.device

_EPOCH = b"e" * 16


def item(seq, payload=b"0123456789"):
    return Item(Key("cam", _EPOCH, seq), "digits", payload)


class FlakyDatabase:
    """A connection that fails once, before the statement that `fail_in` counts down to."""

    def __init__(self, db):
        self._db = db
        self.fail_in = None

    def __getattr__(self, name):
        return getattr(self._db, name)

    def _maybe_fail(self):
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise sqlite3.OperationalError("disk I/O error")

    def execute(self, *arguments):
        self._maybe_fail()
        return self._db.execute(*arguments)

    def executemany(self, *arguments):
        self._maybe_fail()
        return self._db.executemany(*arguments)


class FlakyMachine(RuleBasedStateMachine):
    """Few keys, so that what was settled is taken again; commits that fail at any of their statements."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "o.sqlite"
        self.box = self.open()
        self.new, self.waiting, self.leaving = [], [], Counter()
        self.on_disk, self.books, self.counted = set(), Counter(), 0

    def open(self):
        box = Outbox(self.path)
        box._store.db = FlakyDatabase(box._store.db)
        return box

    def teardown(self):
        self.box._store.db.close()
        self.folder.cleanup()

    @rule(seq=st.integers(0, 3))
    def put(self, seq):
        assert self.box.put(item(seq))
        if seq not in self.new and seq not in self.waiting:
            self.new.append(seq)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), outcome=st.sampled_from(["answered", "quarantined"]))
    def settle(self, data, outcome):
        seq = data.draw(st.sampled_from(self.waiting))
        assert self.box.settle(item(seq).key, outcome)
        self.waiting.remove(seq)
        self.leaving[outcome] += 1

    @rule()
    def count(self):
        self.box.count("cam", "produced")
        self.counted += 1

    @rule()
    def commit(self):
        assert [key.seq for key in self.box.commit()] == self.new
        self.books += self.leaving + Counter(accepted=len(self.new), produced=self.counted)
        self.waiting += self.new
        self.new, self.leaving, self.counted = [], Counter(), 0
        self.on_disk = set(self.waiting)

    @precondition(lambda self: self.box.is_dirty)
    @rule(at=st.integers(0, 4))
    def fail_to_commit(self, at):
        """At BEGIN, at each of the three statements, or at COMMIT."""
        self.box._store.db.fail_in = at
        with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
            self.box.commit()
        assert not self.box._store.db.in_transaction

    @rule()
    def crash(self):
        self.box._store.db.close()
        self.box = self.open()
        self.waiting = sorted(self.on_disk)
        self.new, self.leaving, self.counted = [], Counter(), 0

    @invariant()
    def disk_holds_what_was_committed_and_nothing_else(self):
        with sqlite3.connect(self.path) as other:
            assert {seq for (seq,) in other.execute("SELECT seq FROM items")} == self.on_disk
            found = Counter(dict(other.execute("SELECT name, value FROM counters")))
        other.close()
        assert +found == +self.books
        settled = found["answered"] + found["quarantined"]
        assert found["accepted"] == settled + len(self.on_disk)
        assert sorted(key.seq for key in self.box.waiting_keys()) == sorted(self.waiting)


FlakyMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestFlakyMachine = FlakyMachine.TestCase


def test_full_disk_refuses_and_takes_everything_once_there_is_room(tmp_path):
    """SQLite's own rollback is not undone a second time, and the first error is the one that is raised."""
    box = Outbox(tmp_path / "o.sqlite")
    pages = box._store.db.execute("PRAGMA page_count").fetchone()[0]
    box._store.db.execute(f"PRAGMA max_page_count = {pages}")
    for seq in range(5):
        box.put(item(seq, bytes(20_000)))
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            box.commit()
    assert box.take(0.0, 10, 1.0) == []
    box._store.db.execute("PRAGMA max_page_count = 1000")
    assert [key.seq for key in box.commit()] == list(range(5))
    assert box.counters() == {"accepted": 5}
    box.close()


def test_number_that_sqlite_cannot_hold_is_refused_before_it_spoils_a_commit(tmp_path):
    """The wire's numbers are unsigned; one that got in would fail every commit from then on."""
    box = Outbox(tmp_path / "o.sqlite")
    with pytest.raises(ValueError, match="sequence number"):
        box.put(item(1 << 63))
    box.put(item((1 << 63) - 1))
    assert len(box.commit()) == 1
    box.close()


def test_peer_that_asks_for_patience_for_ever_costs_no_memory(tmp_path):
    """Each postponement leaves an old entry behind; they are swept out, and what is due stays due."""
    box = Outbox(tmp_path / "o.sqlite")
    for seq in range(10):
        box.put(item(seq))
    box.commit()
    for turn in range(1000):
        box.make_due([item(seq).key for seq in range(10)], 5.0 + turn)
    assert len(box._schedule._heaps[""]) < 100
    assert box.next_due() == 1004.0
    assert [entry.key.seq for entry, _ in box.take(1004.0, 99, 1.0)] == list(range(10))
    box.close()


_WRITER = """
import sqlite3, sys
from pathlib import Path
from shoal.delivery.outbox import Item, Key, Outbox
box = Outbox(Path(sys.argv[1]))
print("open", flush=True)
failed = 0
for turn in range(30):
    for seq in range(turn * 7, turn * 7 + 7):
        box.put(Item(Key("cam", b"e" * 16, seq), "digits", b"x" * 50))
    try:
        accepted = box.commit()
    except sqlite3.OperationalError:
        failed += 1
        continue
    for key in accepted:
        print(key.seq)
print("failed", failed, flush=True)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="left out: needs strace")
@pytest.mark.parametrize("call", ["fdatasync:error=EIO:when=15+4", "pwrite64:error=ENOSPC:when=40+25"])
def test_disk_that_fails_now_and_then_loses_nothing_that_was_accepted(tmp_path, call):
    """Real system calls fail; what a failed commit held comes with the next that succeeds."""
    path = tmp_path / "o.sqlite"
    traced = ["strace", "-f", "-qq", "-o", tmp_path / "trace", "-e", f"trace={call.partition(':')[0]}"]
    command = [*traced, "-e", f"inject={call}", sys.executable, "-c", _WRITER, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("left out: tracing is not allowed here")
    first, *accepted, last = done.stdout.splitlines()
    assert (first, done.returncode) == ("open", 0), done.stderr
    assert int(last.removeprefix("failed ")) > 0
    box = Outbox(path)
    assert {int(seq) for seq in accepted} <= {key.seq for key in box.waiting_keys()}
    assert box.counters()["accepted"] == box.in_flight
    box.close()
