"""Promised samples on their way to the cloud."""

from collections import Counter

import pytest

from edge_gateway.forwarder import Forwarder, sample_counters
from shoal.codec import encode
from shoal.delivery.outbox import Item, Key, Outbox
from shoal.errors import LinkError
from shoal.inbox import Inbox
from shoal.routes import Route, topic
from shoal.v1.sample_pb2 import Sample, SampleAck, SampleAckGroup
from shoal.v1.sensor_pb2 import SensorData
from shoal.v1.tensor_pb2 import Tensor

_EPOCH, _OTHER = b"e" * 16, b"f" * 16


class Cloud:
    """The other end of the gateway's link: takes batches, and says of each what became of it."""

    def __init__(self):
        self.connected = True
        self.window = 100
        self.refuses = False
        self.batches = []
        self.done = []
        self.inbox = Inbox(Counter())

    def subscribe(self, route, handler, *, ack_late=False, **_segments):
        self.inbox.register(route, handler, ack_late=ack_late)

    def room(self):
        return self.window - len(self.done) if self.connected else 0

    def publish(self, route, message, *, on_done=None, **_segments):
        if self.refuses or self.room() <= 0:
            return False
        assert route is Route.SAMPLE
        encode(message)
        self.batches.append(message)
        self.done.append(on_done)
        return True

    def answer(self, error=None):
        done, self.done = self.done, []
        for each in done:
            each(error)

    def acknowledge(self, *seqs, kind="stored", device="cam", epoch=_EPOCH):
        ack = SampleAck(groups=[SampleAckGroup(**{"device": device, "epoch": epoch, kind: seqs})])
        name = topic(Route.ACK, site="a", node="gw")
        self.inbox.receive(name, encode(ack), retained=False, ack=lambda: None)

    def seqs(self):
        """What came since the last time, message by message."""
        batches, self.batches = self.batches, []
        return [[sample.reading.seq for group in batch.groups for sample in group.samples] for batch in batches]


@pytest.fixture
def cloud():
    return Cloud()


@pytest.fixture
def outbox(tmp_path):
    made = Outbox(tmp_path / "o.sqlite")
    yield made
    made.close()


@pytest.fixture
def forwarder(cloud, outbox):
    return Forwarder(cloud, outbox, "a", "gw", linger_s=1.0, retry_after_s=10.0)


def promise(outbox, *seqs, device="cam", epoch=_EPOCH, model="m", size_bytes=10):
    for seq in seqs:
        sample = Sample(reading=SensorData(seq=seq, tensor=Tensor(data=bytes(size_bytes))))
        assert outbox.put(Item(Key(device, epoch, seq), model, sample.SerializeToString()))
    outbox.commit()


def test_samples_leave_oldest_first_and_wait_for_company(cloud, outbox, forwarder):
    """One message for what comes within `linger_s`."""
    promise(outbox, 1)
    forwarder.tick(0.0)
    promise(outbox, 2, 3)
    forwarder.tick(0.9)
    assert cloud.seqs() == [[1]]
    forwarder.tick(1.0)
    assert cloud.seqs() == [[2, 3]]


def test_only_the_clouds_ack_lets_a_sample_go(cloud, outbox, forwarder):
    """A PUBACK is the broker's and says nothing; without the ack it goes out again."""
    promise(outbox, 1, 2)
    forwarder.tick(0.0)
    cloud.answer()
    cloud.acknowledge(1)
    cloud.seqs()
    forwarder.tick(9.9)
    assert cloud.seqs() == []
    forwarder.tick(10.9)
    assert cloud.seqs() == [[2]]
    outbox.commit()
    assert sample_counters(outbox) == {"samples.promised": 2, "samples.stored": 1, "samples.waiting": 1}


def test_quarantined_sample_leaves_and_is_counted_as_such(cloud, outbox, forwarder):
    """It is in the cloud, set aside for people."""
    promise(outbox, 1)
    cloud.acknowledge(1, kind="quarantined")
    cloud.acknowledge(1)
    outbox.commit()
    assert (outbox.in_flight, outbox.counters()["samples.quarantined"], outbox.counters()["samples.stored"]) == (
        0,
        1,
        0,
    )


@pytest.mark.parametrize("stranger", [{"device": "mic"}, {"epoch": _OTHER}, {"epoch": b""}])
def test_ack_of_what_is_not_here_changes_nothing(cloud, outbox, forwarder, stranger):
    """Device, epoch and number together are the name of a sample."""
    promise(outbox, 1)
    cloud.acknowledge(1, 2**64 - 1, **stranger)
    outbox.commit()
    assert outbox.in_flight == 1


def test_message_groups_samples_by_their_owner(cloud, outbox, forwarder):
    """Device, epoch and model are said once for all samples of a group, and in the order of the outbox."""
    promise(outbox, 1, 2)
    promise(outbox, 1, device="mic")
    promise(outbox, 1, epoch=_OTHER)
    promise(outbox, 3, model="n")
    forwarder.tick(0.0)
    (batch,) = cloud.batches
    assert batch.gateway == "gw"
    found = [(group.device, group.epoch, group.model, len(group.samples)) for group in batch.groups]
    assert found == [("cam", _EPOCH, "m", 2), ("mic", _EPOCH, "m", 1), ("cam", _OTHER, "m", 1), ("cam", _EPOCH, "n", 1)]


def test_messages_are_cut_by_size_and_by_number(cloud, outbox, forwarder):
    """A large one goes alone; no message is larger than the contract allows, nor has more than 128 samples."""
    promise(outbox, *range(3), size_bytes=100_000)
    promise(outbox, 3, size_bytes=1_000_000)
    promise(outbox, *range(4, 300))
    forwarder.tick(0.0)
    found = cloud.seqs()
    assert [seqs[:4] for seqs in found[:3]] == [[0, 1], [2], [3]]
    assert [seq for seqs in found for seq in seqs] == list(range(300))
    assert max(map(len, found)) <= 128


@pytest.mark.parametrize("error", [LinkError("gone"), LinkError("not authorized", permanent=True)])
def test_failed_message_is_sent_again(cloud, outbox, forwarder, caplog, error):
    """At once after a lost connection; where the broker refuses for ever, after the usual time and told to people."""
    promise(outbox, 1)
    forwarder.tick(0.0)
    cloud.answer(error)
    cloud.seqs()
    forwarder.tick(1.0)
    assert cloud.seqs() == ([] if error.permanent else [[1]])
    forwarder.tick(11.0)
    assert cloud.seqs() == [[1]]
    assert [record.levelname for record in caplog.records] == (["ERROR"] if error.permanent else [])


def test_nothing_is_taken_while_the_link_is_down(cloud, outbox, forwarder):
    """And all of it goes out with the connection, not a retry later."""
    promise(outbox, 1)
    cloud.connected = False
    forwarder.tick(0.0)
    cloud.connected = True
    forwarder.tick(0.1)
    assert cloud.seqs() == [[1]]


@pytest.mark.parametrize("refuses", [True, False])
def test_link_without_room_is_not_asked_for_ever(cloud, outbox, forwarder, refuses):
    """A tick ends, whether the link says that it has no room or refuses without a word; nothing is lost."""
    promise(outbox, *range(300))
    cloud.refuses = refuses
    cloud.window = 100 if refuses else 1
    forwarder.tick(0.0)
    first = [seq for seqs in cloud.seqs() for seq in seqs]
    assert len(first) == (0 if refuses else 128)
    cloud.refuses, cloud.window = False, 100
    cloud.answer()
    forwarder.tick(1.0)
    assert sorted(first + [seq for seqs in cloud.seqs() for seq in seqs]) == list(range(300))
