"""The transfer against a simulated broker: whatever it withholds, damages or repeats, and in whatever order."""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.release.chunks import digest
from shoal.release.transfer import WINDOW, Subscribe, Transfer, Unsubscribe

pytestmark = pytest.mark.device


def make(count: int, **options) -> tuple[Transfer, dict[bytes, bytes]]:
    blobs = {digest(data): data for data in (b"blob %d" % number for number in range(count))}
    return Transfer(random.Random(1), Counter(), **options), blobs


def lengths(blobs: dict[bytes, bytes]) -> dict[bytes, int]:
    return {sha256: len(data) for sha256, data in blobs.items()}


class TransferMachine(RuleBasedStateMachine):
    """The model: which topics are subscribed, which blobs were accepted."""

    @initialize(count=st.integers(1, 50))
    def begin(self, count):
        self.transfer, self.blobs = make(count)
        self.subscribed: set[bytes] = set()
        self.accepted: set[bytes] = set()
        self.now = 0.0
        self.apply(self.transfer.want(lengths(self.blobs), self.now))

    def apply(self, actions):
        for action in actions:
            if isinstance(action, Subscribe):
                assert action.sha256 not in self.subscribed
                self.subscribed.add(action.sha256)
            else:
                self.subscribed.remove(action.sha256)

    @rule(pick=st.integers(0, 49), damage=st.sampled_from(["", "flip", "long", "empty", "other"]))
    def arrive(self, pick, damage):
        sha256, data = list(self.blobs.items())[pick % len(self.blobs)]
        payload = {
            "": data,
            "flip": b"\xff" + data[1:],
            "long": data + b"x" * 1000,
            "empty": b"",
            "other": next(iter(self.blobs.values())),
        }[damage]
        expected = sha256 in self.subscribed and payload == data
        accepted, actions = self.transfer.receive(sha256, payload, self.now)
        assert accepted == expected
        self.apply(actions)
        if accepted:
            assert sha256 not in self.accepted
            self.accepted.add(sha256)

    @rule(seconds=st.floats(0.01, 100))
    def wait(self, seconds):
        self.now += seconds
        self.apply(self.transfer.tick(self.now))

    @rule(pick=st.integers(0, 49))
    def want_again(self, pick):
        sha256 = list(self.blobs)[pick % len(self.blobs)]
        if sha256 not in self.accepted:
            self.apply(self.transfer.want({sha256: len(self.blobs[sha256])}, self.now))

    @invariant()
    def keeps_its_window_full_and_bounded(self):
        missing = len(self.blobs) - len(self.accepted)
        assert self.transfer.in_flight == self.subscribed
        assert len(self.subscribed) == min(WINDOW, missing)
        assert self.transfer.idle == (missing == 0)


TestTransferMachine = TransferMachine.TestCase
TestTransferMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_absent_blobs_do_not_block_the_others():
    """Sixteen blobs that the broker lacks fill the window only until they time out."""
    transfer, blobs = make(40)
    absent = set(list(blobs)[:WINDOW])
    now, got = 0.0, set()
    transfer.want(lengths(blobs), now)
    while now < 600 and len(got) < 24:
        for sha256 in transfer.in_flight - absent:
            accepted, _ = transfer.receive(sha256, blobs[sha256], now)
            assert accepted
            got.add(sha256)
        now += 1.0
        transfer.tick(now)
    assert len(got) == 24


def test_bad_blob_is_asked_again_soon_and_ever_more_slowly():
    """A retained topic that holds rubbish must not become a hot loop."""
    transfer, blobs = make(1)
    [sha256] = blobs
    transfer.want(lengths(blobs), 0.0)
    asked_at, now = [], 0.0
    while now < 120.0:
        transfer.receive(sha256, b"rubbish", now)
        if any(isinstance(action, Subscribe) for action in transfer.tick(now)):
            asked_at.append(now)
        now += 0.125
    assert asked_at[0] < 1.0
    assert 5 < len(asked_at) < 20
    assert transfer.counters["blobs_bad"] >= len(asked_at)


def test_nodes_that_lost_the_same_blob_retry_apart():
    """Jitter: two transfers with other seeds time out at other times."""
    due = []
    for seed in (1, 2, 3):
        transfer = Transfer(random.Random(seed), Counter())
        transfer.want({b"x" * 32: 1}, 0.0)
        now = 0.0
        while not transfer.tick(now):
            now += 0.01
        due.append(round(now, 2))
    assert len(set(due)) == 3
    assert all(3.7 <= when <= 6.3 for when in due)


def test_blob_of_another_length_than_announced_is_bad():
    """The index that announced it is not signed; what does not fit it is not even hashed."""
    transfer, blobs = make(1)
    [(sha256, data)] = blobs.items()
    transfer.want({sha256: len(data) + 1}, 0.0)
    assert transfer.receive(sha256, data, 0.0) == (False, [])
    assert transfer.counters["blobs_bad"] == 1


def test_forgotten_blobs_make_room():
    """What no plan names any longer is unsubscribed, and the next in line asked for."""
    transfer, blobs = make(20)
    transfer.want(lengths(blobs), 0.0)
    first = list(blobs)[:4]
    actions = transfer.forget(first, 0.0)
    assert [item.sha256 for item in actions if isinstance(item, Unsubscribe)] == first
    assert sum(isinstance(item, Subscribe) for item in actions) == 4
    assert transfer.receive(first[0], blobs[first[0]], 0.0)[0] is False
