"""The device's books under any interleaving of readings, commits, messages, failures and kills."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from device_agent.change import DeadBandSettings
from device_agent.policy import PolicyConfig
from shoal.delivery.outbox import Limits
from shoal.errors import LinkError
from shoal.v1 import inference_pb2 as pb

pytestmark = pytest.mark.device

ERRORS = [None, LinkError("quota exceeded"), LinkError("not authorized", permanent=True)]
STATUSES = [
    pb.STATUS_OK,
    pb.STATUS_INVALID_ARGUMENT,
    pb.STATUS_NOT_FOUND,
    pb.STATUS_RESOURCE_EXHAUSTED,
    pb.STATUS_DEADLINE_EXCEEDED,
    pb.STATUS_INTERNAL,
    pb.STATUS_UNSPECIFIED,
    99,
]
# Unchanged, below the threshold, above it, and one that no model can take.
VALUES = st.sampled_from([0.0, 0.1, 0.7, 5.0, 8.0, float("nan")])


class Books(RuleBasedStateMachine):
    """Drives one device; what is on disk must add up after every step."""

    def __init__(self, make_rig):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.rig = make_rig(
            Path(self.directory.name),
            limits=Limits(max_items=8),
            window=3,
            policy=PolicyConfig(audit_share=0.1, max_share=0.8, max_per_minute=12),
            change=DeadBandSettings(threshold=0.2),
            retry_after_s=5.0,
            max_rows=4,
        )
        self.used = set()
        self.asked = set()
        self.settled = set()
        self.settled_on_disk = set()
        self.counted = 0

    def teardown(self):
        self.rig.close()
        self.directory.cleanup()

    @rule(values=st.lists(VALUES, min_size=1, max_size=4))
    def read(self, values):
        for value in values:
            seq = self.rig.read(value).seq
            assert seq not in self.used
            self.used.add(seq)

    @rule()
    def commit(self):
        self.rig.outbox.commit()
        self.settled_on_disk |= self.settled

    @rule(later_s=st.sampled_from([0.0, 1.0, 5.0, 60.0]))
    def tick(self, later_s):
        self.rig.now += later_s
        before = len(self.rig.questions)
        self.rig.device.tick(self.rig.now)
        for question in self.rig.questions[before:]:
            numbers = {row.reading.seq for row in question.rows}
            assert not numbers & self.settled_on_disk
            assert question.replay or not numbers & self.asked
            self.asked |= numbers

    @rule(error=st.sampled_from(ERRORS))
    def acknowledge(self, error):
        if error is not None and error.permanent:
            waiting = {key.seq for key in self.rig.outbox.waiting_keys()}
            self.rig.link.acknowledge(error)
            self.settled |= waiting - {key.seq for key in self.rig.outbox.waiting_keys()}
        else:
            self.rig.link.acknowledge(error)

    @rule()
    def connect(self):
        if not self.rig.link.connected:
            self.rig.link.connect()

    @rule()
    def disconnect(self):
        self.rig.link.disconnect()

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), status=st.sampled_from(STATUSES))
    def reply(self, data, status):
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.asked)), min_size=1, max_size=5))
        self.rig.reply(*numbers, status=status)
        if status in (pb.STATUS_OK, pb.STATUS_INVALID_ARGUMENT):
            self.settled |= set(numbers)

    @rule(killed=st.booleans())
    def restart(self, killed):
        if killed:
            self.settled &= self.settled_on_disk
        else:
            self.settled_on_disk |= self.settled
        self.rig.restart(killed=killed)

    @rule()
    def activate(self):
        self.rig.activate(threshold=0.5)

    @invariant()
    def books_add_up_on_disk(self):
        self.rig.check_ledger()

    @invariant()
    def counters_only_grow(self):
        counters = self.rig.counters()
        counted = sum(counters.values()) - counters["in_flight"]
        assert counted >= self.counted
        self.counted = counted

    @rule()
    def settle_all(self):
        """With a patient broker and gateway everything that is owed is answered."""
        if not self.rig.link.connected:
            self.rig.link.connect()
        for _ in range(10):
            self.commit()
            self.tick(5.0)
            self.rig.link.acknowledge()
            waiting = [key.seq for key in self.rig.outbox.waiting_keys()]
            assert set(waiting) <= self.used
            if asked := self.asked.intersection(waiting):
                self.rig.reply(*sorted(asked))
                self.settled |= asked
        self.commit()
        assert self.rig.counters()["in_flight"] == 0


def test_books_add_up_under_any_interleaving(make_rig):
    """Pins both equations of the ledger on disk, numbers used once, replays marked and nothing owed for ever."""
    run_state_machine_as_test(
        partial(Books, make_rig), settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
