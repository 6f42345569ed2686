"""The outbox: nothing accepted is lost, nothing is counted twice."""

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.delivery.outbox import Item, Key, Limits, Outbox, group_by_model, lane_by_device

pytestmark = pytest.mark.device

_EPOCH = b"e" * 16
_LIMITS = Limits(max_items=6, max_bytes=60)


def item(seq, device="cam", payload=b"0123456789", model="digits"):
    return Item(Key(device, _EPOCH, seq), model, payload)


class OutboxMachine(RuleBasedStateMachine):
    """Against a model: what was committed, what is settled, and what a crash takes."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "outbox.sqlite"
        self.box = Outbox(self.path, _LIMITS)
        self.now = 0.0
        self.seq = 0
        self.new = []
        self.waiting = []
        self.settled = Counter()
        self.uncommitted = Counter()
        self.accepted = 0

    def teardown(self):
        self.box.close()
        self.folder.cleanup()

    @rule()
    def put(self):
        self.seq += 1
        room = len(self.waiting) + len(self.new) < _LIMITS.max_items
        assert self.box.put(item(self.seq)) == room
        if room:
            self.new.append(self.seq)

    @rule()
    def commit(self):
        accepted = self.box.commit()
        assert [key.seq for key in accepted] == self.new
        self.waiting += self.new
        self.accepted += len(self.new)
        self.settled += self.uncommitted
        self.new, self.uncommitted = [], Counter()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), outcome=st.sampled_from(["answered", "quarantined"]))
    def settle(self, data, outcome):
        seq = data.draw(st.sampled_from(self.waiting))
        key = Key("cam", _EPOCH, seq)
        assert self.box.settle(key, outcome)
        assert not self.box.settle(key, outcome)
        self.waiting.remove(seq)
        self.uncommitted[outcome] += 1

    @rule(limit=st.integers(1, 8))
    def take(self, limit):
        taken = [entry.key.seq for entry, _ in self.box.take(self.now, limit, 10.0)]
        assert len(taken) == len(set(taken)) <= limit
        assert set(taken) <= set(self.waiting)

    @rule()
    def time_passes(self):
        self.now += 11.0
        taken = self.box.take(self.now, 100, 10.0)
        assert sorted(entry.key.seq for entry, _ in taken) == sorted(self.waiting)

    @rule()
    def crash(self):
        """What was not committed is gone; settled ones that were not committed come back."""
        again = Outbox(self.path, _LIMITS)
        committed = self.accepted - self.settled.total()
        assert again.in_flight == committed
        assert all(attempts == 1 for _, attempts in again.take(0.0, 100, 10.0))
        self.box._store.close()
        self.box = again
        self.waiting = [key.seq for key in again.waiting_keys()]
        self.new, self.uncommitted = [], Counter()
        self.now = 0.0

    @invariant()
    def books_balance(self):
        counters = self.box.counters()
        assert counters["accepted"] == self.accepted
        assert {name: n for name, n in counters.items() if name != "accepted"} == dict(self.settled)
        assert self.box.in_flight == len(self.waiting)
        assert self.box.size_bytes <= _LIMITS.max_bytes


OutboxMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestOutboxMachine = OutboxMachine.TestCase


@pytest.fixture
def box(tmp_path):
    made = Outbox(tmp_path / "outbox.sqlite", lane_of=lane_by_device)
    yield made
    made.close()


def test_nothing_is_sent_before_it_is_committed(box):
    """Accepted means on disk."""
    box.put(item(1))
    assert box.take(0.0, 10, 1.0, "cam") == []
    box.commit()
    assert [entry for entry, _ in box.take(0.0, 10, 1.0, "cam")] == [item(1)]


def test_what_was_taken_is_due_again_after_its_time(box):
    """With the number of earlier attempts, and at once when asked for."""
    box.put(item(1))
    box.commit()
    assert box.take(0.0, 10, 5.0, "cam")[0][1] == 0
    assert box.take(4.9, 10, 5.0, "cam") == []
    assert box.next_due("cam") == 5.0
    assert box.take(5.0, 10, 5.0, "cam")[0][1] == 1
    box.make_due([item(1).key], 6.0)
    assert box.take(6.0, 10, 5.0, "cam")[0][1] == 2
    assert box.next_due("cam") == 11.0


def test_lanes_do_not_wait_for_each_other(box):
    """A link that is down holds up its own device alone."""
    for device in ("cam", "mic"):
        box.put(item(1, device))
    box.commit()
    assert [entry.key.device for entry, _ in box.take(0.0, 10, 5.0, "mic")] == ["mic"]
    assert [entry.key.device for entry, _ in box.take(0.0, 10, 5.0, "cam")] == ["cam"]


def test_same_key_waits_once(box):
    """A device's repetition does not become two samples."""
    assert box.put(item(1))
    assert box.put(item(1))
    box.commit()
    assert box.put(item(1))
    box.commit()
    assert (box.in_flight, box.counters()["accepted"]) == (1, 1)


def test_bytes_are_bounded(tmp_path):
    """Not the number alone."""
    box = Outbox(tmp_path / "o.sqlite", Limits(max_items=100, max_bytes=25))
    assert [box.put(item(seq)) for seq in range(3)] == [True, True, False]
    box.close()


def test_epoch_is_born_with_the_store(tmp_path):
    """It stays with the disk, and another disk has another."""
    first, second = Outbox(tmp_path / "a.sqlite"), Outbox(tmp_path / "b.sqlite")
    epoch = first.epoch("cam")
    assert len(epoch) == 16
    assert epoch not in (first.epoch("mic"), second.epoch("cam"))
    first.close()
    again = Outbox(tmp_path / "a.sqlite")
    assert again.epoch("cam") == epoch
    again.close()
    second.close()


def test_sequence_numbers_are_never_used_twice(tmp_path):
    """A crash skips some."""
    box = Outbox(tmp_path / "a.sqlite")
    first = box.reserve_seqs("cam", 10)
    box._store.close()
    again = Outbox(tmp_path / "a.sqlite")
    assert list(first) + list(again.reserve_seqs("cam", 5)) == list(range(15))
    again.close()


def test_one_message_has_one_owner_and_one_history():
    """Fresh and replayed rows, devices and models do not mix."""
    taken = [(item(1), 0), (item(2), 0), (item(3), 1), (item(4, "mic"), 0), (item(5, model="shuttle"), 0)]
    assert [[entry.key.seq for entry in group] for group in group_by_model(taken).values()] == [[1, 2], [3], [4], [5]]


_WRITER = """
import sys
from pathlib import Path
from shoal.delivery.outbox import Item, Key, Outbox
box = Outbox(Path(sys.argv[1]))
first = int(sys.argv[2])
for round in range(10_000):
    for seq in range(first + round * 7, first + round * 7 + 7):
        box.put(Item(Key("cam", b"e" * 16, seq), "digits", b"x" * 50))
    for key in box.commit():
        print(key.seq)
    sys.stdout.flush()
"""


def test_killed_in_the_middle_it_keeps_all_that_it_accepted(tmp_path):
    """SIGKILL at any time, again and again."""
    path = tmp_path / "o.sqlite"
    promised = set()
    for turn in range(4):
        child = subprocess.Popen([sys.executable, "-c", _WRITER, path, str(turn * 100_000)], stdout=subprocess.PIPE)
        for _ in range(20 + 31 * turn):
            promised.add(int(child.stdout.readline()))
        os.kill(child.pid, signal.SIGKILL)
        promised |= {int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")}
        child.stdout.close()
        child.wait()
    box = Outbox(path)
    kept = {key.seq for key in box.waiting_keys()}
    assert promised <= kept
    assert box.counters()["accepted"] == len(kept)
    box.close()
