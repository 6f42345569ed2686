"""A device's books under any interleaving of readings, messages, refusals, failures, full disks and kills."""

import contextlib
import sqlite3
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from device_agent.change import DeadBandSettings
from device_agent.policy import PolicyConfig
from device_agent.readings import AnsweredBy
from shoal.delivery.outbox import Hold, Limits
from shoal.errors import LinkError
from shoal.v1 import inference_pb2 as pb

pytestmark = pytest.mark.device

LIMITS = Limits(max_items=8, quarantine_items=4)
HOLD = Hold(max_s=5.0, max_items=3)
REFUSED = LinkError("not authorized", permanent=True)
LATER = [pb.STATUS_NOT_FOUND, pb.STATUS_RESOURCE_EXHAUSTED, pb.STATUS_INTERNAL, pb.STATUS_UNSPECIFIED, 99]
# Unchanged, below the threshold, above it, and one that no model can take.
VALUES = st.sampled_from([0.0, 0.1, 0.7, 5.0, 8.0, float("nan")])
# Of values in a reading: it needs more pages than a full disk has, and it fits no message.
LARGE, TOO_LARGE = 3000, 6000
MAX_ROW_BYTES = 20_000
OPEN_ROWS, RETRY_S = 6, 5.0


class Model:
    """What the books must say, by the rules of docs/devices.md and not by the outbox's code.

    `disk` is what a kill leaves: numbers that wait, the quarantine, the counters.
    """

    def __init__(self, *, holds):
        self.holds = holds
        self.disk = ([], [], Counter())
        self.is_alarm = {}
        self.start()

    def start(self):
        """A process that finds the disk as it is."""
        self.owed = list(self.disk[0])
        self.new = set()
        self.moved, self.set_aside = [], []
        self.counts = Counter()
        self.dirty_at = None
        self.open = {}
        self.unacknowledged = []

    @property
    def is_dirty(self):
        return bool(self.new or +self.counts)

    def commit(self):
        _, quarantine, counters = self.disk
        counters = counters + self.counts + Counter(accepted=len(self.new))
        quarantine = quarantine + self.moved + self.set_aside
        forgotten = max(0, len(quarantine) - LIMITS.quarantine_items)
        counters["quarantine.forgotten"] += forgotten
        self.disk = (list(self.owed), quarantine[forgotten:], counters)
        self.new, self.moved, self.set_aside, self.counts, self.dirty_at = set(), [], [], Counter(), None

    def commit_due(self, now, *, is_connected):
        if not self.holds or not is_connected:
            self.commit()
        elif self.is_dirty:
            self.dirty_at = now if self.dirty_at is None else self.dirty_at
            if now - self.dirty_at >= HOLD.max_s:
                self.commit()

    def read(self, outcome, *, size):
        seq, reason = outcome.seq, outcome.reason
        self.counts["produced"] += 1
        if reason.startswith("kept"):
            self.counts[reason] += 1
            return
        self.is_alarm[seq] = reason == "asked.score"
        if size == TOO_LARGE:
            self.set_aside.append((seq, "TOO_LARGE"))
            self.counts += Counter(accepted=1, quarantined=1)
            return
        if len(self.owed) == LIMITS.max_items:
            telemetry = [waiting for waiting in self.owed if not self.is_alarm[waiting]]
            if not (self.is_alarm[seq] and telemetry):
                self.counts += Counter({"accepted": 1, "dropped.full": 1})
                return
            self.leave(telemetry[0], "dropped.displaced")
        self.owed.append(seq)
        self.new.add(seq)
        if self.holds and len(self.new) == HOLD.max_items:
            self.commit()
        self.counts[reason] += 1

    def knows(self, seq):
        """Whether it waits, and may have been sent."""
        return seq in self.owed and (self.holds or seq not in self.new)

    def leave(self, seq, outcome):
        self.owed.remove(seq)
        if seq in self.new:
            self.new.remove(seq)
            self.counts["accepted"] += 1
        self.counts[outcome] += 1

    def settle(self, seq):
        if self.knows(seq):
            self.leave(seq, "answered")

    def refuse(self, seq, status):
        if self.knows(seq):
            (self.set_aside if seq in self.new else self.moved).append((seq, status))
            self.leave(seq, "quarantined")


class Books(RuleBasedStateMachine):
    """Drives one device; memory and disk must be what the model says after every step."""

    def __init__(self, make_rig, *, holds):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.rig = make_rig(
            Path(self.directory.name),
            limits=LIMITS,
            hold=HOLD if holds else None,
            window=3,
            policy=PolicyConfig(audit_share=0.1, max_share=0.8, max_per_minute=60),
            change=DeadBandSettings(threshold=0.2),
            retry_after_s=RETRY_S,
            max_rows=4,
        )
        self.model = Model(holds=holds)
        self.used = set()
        self.asked = set()
        self.refusable = []

    def teardown(self):
        self.rig.close()
        self.directory.cleanup()

    # -- readings and time -------------------------------------------------------------------------------------------

    def take(self, value, size=1):
        outcome = self.rig.read(*[value] * size)
        assert outcome.seq not in self.used
        self.used.add(outcome.seq)
        self.model.read(outcome, size=size)

    @rule(values=st.lists(VALUES, min_size=1, max_size=4))
    def read(self, values):
        for value in values:
            self.take(value)

    @rule(size=st.sampled_from([LARGE, TOO_LARGE]))
    def read_large(self, size):
        self.take(5.0, size)

    @rule(later_s=st.sampled_from([0.0, 1.0, 5.0, 60.0]))
    def step(self, later_s):
        """One beat of the agent: commit what is due, send what is due."""
        settled = self.used - set(self.model.owed) - self.model.new
        before = len(self.rig.link.sent)
        self.model.commit_due(self.rig.now + later_s, is_connected=self.rig.link.connected)
        for question in self.rig.step(later_s):
            numbers = [row.reading.seq for row in question.rows]
            assert not settled.intersection(numbers)
            assert question.replay or not self.asked.intersection(numbers)
            self.asked.update(numbers)
            self.model.open[self.rig.correlation(question)] = (self.rig.now + RETRY_S, numbers)
            assert sum(len(numbers) for until, numbers in self.model.open.values() if until > self.rig.now) <= OPEN_ROWS
        for _, message, correlation, _ in self.rig.link.sent[before:]:
            if isinstance(message, pb.InferenceRequest):
                self.model.unacknowledged.append(correlation)
                self.refusable.append(correlation)

    @rule()
    def commit_on_a_full_disk(self):
        """What does not fit stays where it was, and comes with a later commit."""
        db = self.rig.outbox._store.db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        try:
            self.rig.outbox.commit()
        except sqlite3.OperationalError as exc:
            assert "full" in str(exc)  # noqa: PT017  whether it is raised depends on how much came since the last commit
        else:
            self.model.commit()
        finally:
            db.execute("PRAGMA max_page_count = 1000000")

    @rule(killed=st.booleans(), finds_broker=st.booleans())
    def restart(self, killed, finds_broker):
        if not killed:
            self.model.commit()
        self.rig.restart(killed=killed)
        self.model.start()
        if finds_broker:
            self.rig.link.connect()

    @rule()
    def activate(self):
        self.rig.activate(threshold=0.5)

    # -- the broker and the gateway ----------------------------------------------------------------------------------

    @rule()
    def connect(self):
        if not self.rig.link.connected:
            self.rig.link.connect()

    @rule()
    def disconnect(self):
        self.rig.link.disconnect()
        self.fail_messages()

    @rule(error=st.sampled_from([None, LinkError("quota exceeded"), REFUSED]))
    def acknowledge(self, error):
        self.rig.link.acknowledge(error)
        self.fail_messages(error) if error is not None else self.model.unacknowledged.clear()

    def fail_messages(self, error=None):
        for correlation in self.model.unacknowledged:
            _, numbers = self.model.open.pop(correlation, (0.0, []))
            if error is REFUSED:
                for seq in numbers:
                    self.model.refuse(seq, "REFUSED_BY_BROKER")
        self.model.unacknowledged.clear()

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), status=st.sampled_from([pb.STATUS_OK, pb.STATUS_OK, pb.STATUS_INVALID_ARGUMENT, *LATER]))
    def reply(self, data, status):
        """To any question of any time, and with repetitions."""
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.asked)), min_size=1, max_size=5))
        waiting = [seq for seq in dict.fromkeys(numbers) if self.model.knows(seq)]
        heard = len(self.rig.outcomes)
        self.rig.reply(*numbers, status=status)
        for seq in numbers:
            if status == pb.STATUS_OK:
                self.model.settle(seq)
            elif status == pb.STATUS_INVALID_ARGUMENT:
                self.model.refuse(seq, "INVALID_ARGUMENT")
            else:
                name = pb.Status.Name(status).removeprefix("STATUS_").lower() if status != 99 else "unknown"
                self.model.counts[f"replies.{name}"] += 1
        told = [outcome.seq for outcome in self.rig.outcomes[heard:] if outcome.by is AnsweredBy.GATEWAY]
        assert len(told) == len(set(told))
        assert set(told) <= set(waiting if status == pb.STATUS_OK else [])

    @precondition(lambda self: self.refusable)
    @rule(data=st.data())
    def refuse_whole(self, data):
        """By the data of any message ever sent, of this process or of one before it."""
        correlation = data.draw(st.sampled_from(self.refusable))
        self.rig.refuse_whole(correlation)
        until, numbers = self.model.open.pop(correlation, (0.0, []))
        if self.rig.now < until:
            for seq in numbers:
                self.model.refuse(seq, "INVALID_ARGUMENT")

    @rule()
    def settle_all(self):
        """With a patient broker and gateway everything that is owed is answered."""
        self.connect()
        for _ in range(10):
            self.step(5.0)
            self.acknowledge(None)
            if asked := self.asked.intersection(self.model.owed):
                self.rig.reply(*sorted(asked))
                for seq in sorted(asked):
                    self.model.settle(seq)
        assert self.rig.outbox.owed == 0

    # -- what must be so ---------------------------------------------------------------------------------------------

    @invariant()
    def disk_is_what_the_model_says(self):
        waiting, quarantine, counters = self.model.disk
        with contextlib.closing(sqlite3.connect(self.rig.path)) as db:
            assert [seq for (seq,) in db.execute("SELECT seq FROM items ORDER BY id")] == waiting
            assert db.execute("SELECT seq, status FROM quarantine ORDER BY id").fetchall() == quarantine
            found = Counter(dict(db.execute("SELECT name, value FROM counters")))
        found.pop("model_errors", None)
        assert +found == +counters
        self.rig.check_ledger()

    @invariant()
    def memory_is_what_the_model_says(self):
        box, model = self.rig.outbox, self.model
        assert box.owed == len(model.owed) <= LIMITS.max_items
        assert [key.seq for key in box.waiting_keys()] == [seq for seq in model.owed if seq not in model.new]
        assert not model.holds or len(model.new) < HOLD.max_items


@pytest.mark.parametrize("holds", [False, True])
def test_books_add_up_under_any_interleaving(make_rig, monkeypatch, holds):
    """Pins the ledger on disk in both modes, numbers used once, replays marked and nothing owed for ever."""
    monkeypatch.setattr("device_agent.questions.MAX_ROW_BYTES", MAX_ROW_BYTES)
    monkeypatch.setattr("device_agent.questions._MAX_OPEN_ROWS", OPEN_ROWS)
    run_state_machine_as_test(
        partial(Books, make_rig, holds=holds), settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
