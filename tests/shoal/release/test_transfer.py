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
        self.apply(self.transfer.want(lengths(self.blobs)))

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
        accepted, actions = self.transfer.receive(sha256, payload)
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
            self.apply(self.transfer.want({sha256: len(self.blobs[sha256])}))

    @invariant()
    def keeps_its_window_half_full_and_bounded(self):
        missing = len(self.blobs) - len(self.accepted)
        assert self.transfer.in_flight == self.subscribed
        assert min(WINDOW // 2, missing) <= len(self.subscribed) <= min(WINDOW, missing)
        assert self.transfer.idle == (missing == 0)


TestTransferMachine = TransferMachine.TestCase
TestTransferMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_absent_blobs_do_not_block_the_others():
    """Sixteen blobs that the broker lacks fill the window only until they time out."""
    transfer, blobs = make(40)
    absent = set(list(blobs)[:WINDOW])
    now, got = 0.0, set()
    transfer.want(lengths(blobs))
    while now < 600 and len(got) < 24:
        for sha256 in transfer.in_flight - absent:
            accepted, _ = transfer.receive(sha256, blobs[sha256])
            assert accepted
            got.add(sha256)
        now += 1.0
        transfer.tick(now)
    assert len(got) == 24


def test_bad_blob_is_asked_again_soon_and_ever_more_slowly():
    """A retained topic that holds rubbish must not become a hot loop."""
    transfer, blobs = make(1)
    [sha256] = blobs
    transfer.want(lengths(blobs))
    asked_at, now = [], 0.0
    while now < 120.0:
        transfer.receive(sha256, b"rubbish")
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
        transfer.want({b"x" * 32: 1})
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
    transfer.want({sha256: len(data) + 1})
    assert transfer.receive(sha256, data) == (False, [])
    assert transfer.counters["blobs_bad"] == 1


def test_forgotten_blobs_make_room():
    """What no plan names any longer is unsubscribed, and the next in line asked for."""
    transfer, blobs = make(20)
    transfer.want(lengths(blobs))
    first = list(blobs)[:4]
    actions = transfer.forget(first)
    assert [item.sha256 for item in actions if isinstance(item, Unsubscribe)] == first
    assert sum(isinstance(item, Subscribe) for item in actions) == 4
    assert transfer.receive(first[0], blobs[first[0]])[0] is False


def tick_through(transfer: Transfer, start: float, seconds: float) -> float:
    """Tick ten times a second."""
    for step in range(int(seconds * 10) + 1):
        transfer.tick(start + step / 10)
    return start + seconds


def test_node_that_was_busy_asks_for_nothing_twice():
    """Half a minute in one callback is no half minute of silence: what came meanwhile lies unread in the socket."""
    transfer, blobs = make(4)
    transfer.want(lengths(blobs))
    transfer.tick(0.0)
    transfer.tick(30.0)
    transfer.tick(60.0)
    assert transfer.counters["blobs_retried"] == 0
    tick_through(transfer, 60.0, 7.0)
    assert transfer.counters["blobs_retried"] == 4


def test_blobs_that_come_slowly_are_waited_for():
    """One blob every four seconds: each shows that those asked for with it are still on their way."""
    transfer, blobs = make(WINDOW)
    transfer.want(lengths(blobs))
    now = 0.0
    for sha256, data in blobs.items():
        now = tick_through(transfer, now, 3.7)
        assert transfer.receive(sha256, data)[0]
    assert transfer.counters["blobs_retried"] == 0


def test_later_blobs_show_that_an_earlier_one_is_missing():
    """A broker sends in the order of asking, so that what comes later is no reason to wait for what did not."""
    transfer, blobs = make(3 * WINDOW)
    names = list(blobs)
    transfer.want(lengths(blobs))
    transfer.tick(0.0)
    now = 0.1
    for sha256 in names[1:9]:
        transfer.receive(sha256, blobs[sha256])
    transfer.tick(now)
    for sha256 in names[9:16]:
        transfer.receive(sha256, blobs[sha256])
    for sha256 in names[16:22]:
        now = tick_through(transfer, now, 1.0)
        transfer.receive(sha256, blobs[sha256])
    tick_through(transfer, now, 0.5)
    assert transfer.counters["blobs_retried"] == 1


def test_arrivals_do_not_put_off_a_bad_blob():
    """It is here already and wrong: there is nothing to wait for."""
    transfer, blobs = make(2)
    bad, good = blobs
    transfer.want(lengths(blobs))
    transfer.tick(0.0)
    transfer.receive(bad, b"rubbish")
    transfer.receive(good, blobs[good])
    tick_through(transfer, 0.0, 0.5)
    assert transfer.counters["blobs_retried"] == 1


def test_a_full_window_is_asked_for_in_halves():
    """Eight topics go in one packet: an arrival alone asks for nothing until half of the window is free."""
    transfer, blobs = make(40)
    transfer.want(lengths(blobs))
    asked = []
    for sha256 in list(blobs)[:WINDOW]:
        _, actions = transfer.receive(sha256, blobs[sha256])
        asked.append(sum(isinstance(item, Subscribe) for item in actions))
    assert asked == [0] * 7 + [8] + [0] * 7 + [8]
