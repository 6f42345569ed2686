"""Ingest between a real broker and a real store."""

import time
import uuid
from contextlib import closing

import pytest

from cloud.ingest import Ingest
from cloud.sample_store import MAX_SEQ
from cloud.sqlite_store import SqliteSampleStore
from shoal.codec import encode
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.routes import CLOUD_SITE, Route, topic
from shoal.v1 import command_pb2 as pb
from shoal.v1.inference_pb2 import ASK_REASON_SCORE, Answer
from shoal.v1.node_pb2 import NodeState
from shoal.v1.sample_pb2 import Sample, SampleBatch, SampleGroup
from shoal.v1.sensor_pb2 import TIME_QUALITY_SYNCED, Scalars, SensorData

PATIENCE_S = 20.0
NOW = 1_800_000_000.0
NOW_US = 1_800_000_000_000_000
EPOCH = bytes(range(16))
GATEWAY = "gw-01"


class WatchedStore(SqliteSampleStore):
    """Says when something is committed, and breaks when it is told to."""

    def __init__(self, path, events):
        super().__init__(path)
        self.events = events
        self.is_broken = False

    def add(self, samples):
        if self.is_broken:
            self.events.append("broken")
            raise RuntimeError("the disk is gone")
        fates = super().add(samples)
        self.events.append("commit")
        return fates


class WatchedLink(Link):
    """Says when an ack and when a PUBACK leaves; loses its PUBACKs when it is told to."""

    events: list
    loses_pubacks = False
    # Those that other tests left retained would be acknowledged among the events of this one.
    hears_states = False

    def subscribe(self, route, handler, **arguments):
        if route is not Route.STATE or self.hears_states:
            super().subscribe(route, handler, **arguments)

    def publish(self, route, message, **arguments):
        if route is Route.ACK:
            self.events.append("ack")
        return super().publish(route, message, **arguments)

    def _send_ack(self, client, packet_id):
        self.events.append("puback")
        if not self.loses_pubacks:
            super()._send_ack(client, packet_id)

    def kill(self):
        """End as a killed process does: the socket closes, and nobody says goodbye."""
        self._client.on_disconnect = None
        self._client._sock_close()


class Rig:
    """An ingest and a gateway on one loop; the loop ends when a condition holds."""

    def __init__(self, url, path):
        self.url = url
        self.site = f"site-{uuid.uuid4().hex[:12]}"
        self.events = []
        self.store = WatchedStore(path, self.events)
        self.loop = Loop()
        self.loop.on_idle(lambda _: self.ingest.flush())
        self.acks = []
        self.results = []
        self.gateway = Link(parse_broker_url(url, session_expiry_s=0), node_identity(self.site, GATEWAY, "gateway"))
        self.gateway.subscribe(Route.ACK, lambda d: self.acks.append(d.message), site=self.site, node=GATEWAY)
        self.gateway.subscribe(Route.RESULT, self.results.append, site=CLOUD_SITE, node="ingest")
        self.gateway.attach(self.loop)
        self.link = None
        self.start_ingest()

    def start_ingest(self, session_expiry_s=0, *, hears_states=False):
        if self.link is not None:
            self.link.close()
        self.link = WatchedLink(
            parse_broker_url(self.url, session_expiry_s=session_expiry_s), service_identity("ingest")
        )
        self.link.events = self.events
        self.link.hears_states = hears_states
        self.ingest = Ingest(self.link, self.store, wall_clock=lambda: NOW)
        self.link.attach(self.loop)
        self.until(lambda: self.link.connected and self.gateway.connected)
        self.settle()

    def until(self, is_so):
        deadline = time.monotonic() + PATIENCE_S
        late = self.loop.call_at(deadline, lambda _: None)
        self.loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
        late.cancel()
        assert is_so(), self.events

    def settle(self):
        """Wait until the broker has served everything that both links sent so far."""
        done = []
        for link in (self.link, self.gateway):
            service = link.identity.client_id
            # None that ingest itself reads.
            state = Route.CLOUD_STATE if link is self.link else Route.PRESENCE
            segments = {"service": service} if link is self.link else {"site": self.site, "node": service}
            assert link.publish(state, b"", on_done=done.append, **segments)
        self.until(lambda: len(done) == 2)

    def send(self, *groups, gateway=GATEWAY, node=GATEWAY):
        message = SampleBatch(gateway=gateway, groups=groups)
        assert self.gateway.publish(Route.SAMPLE, message, site=self.site, node=node)

    def receive(self, *groups):
        """Hand ingest a message without the broker, and without a flush."""
        payload = encode(SampleBatch(gateway=GATEWAY, groups=groups))
        name = topic(Route.SAMPLE, site=self.site, node=GATEWAY)
        self.link._inbox.receive(name, payload, retained=False, ack=lambda: self.events.append("puback"))

    def command(self, action, expires_at_us=NOW_US + 1):
        command = pb.Command(id=uuid.uuid4().bytes, expires_at_us=expires_at_us, add_labels=action)
        count = len(self.results)
        assert self.gateway.publish(
            Route.COMMAND, command, expiry_s=10, correlation=b"c", site=CLOUD_SITE, node="ingest"
        )
        self.until(lambda: len(self.results) > count)
        delivery = self.results[-1]
        assert (delivery.message.id, delivery.correlation) == (command.id, b"c")
        return delivery.message.status, delivery.message.message

    def close(self):
        self.link.close()
        self.gateway.close()
        self.loop.close()
        self.store.close()


@pytest.fixture
def rig(mosquitto, tmp_path):
    with closing(Rig(mosquitto.url, tmp_path / "samples.sqlite")) as rig:
        yield rig


def sample(seq, value=1.0, **fields):
    reading = SensorData(seq=seq, captured_at_us=5, scalars=Scalars(values=[value]), reference=f"row/{seq}")
    return Sample(reading=reading, reason=ASK_REASON_SCORE, **fields)


def group(*samples, **fields):
    return SampleGroup(**{"device": "cam-00", "epoch": EPOCH, "model": "digits", "samples": samples} | fields)


def table(store, name="samples"):
    store._db.conn.row_factory = None
    cursor = store._db.conn.execute(f"SELECT * FROM {name}")
    columns = [column[0] for column in cursor.description]
    return [dict(zip(columns, row, strict=True)) for row in cursor]


# -- samples -----------------------------------------------------------------------------------------------------------


def test_more_batches_than_the_broker_takes_acks_are_all_acknowledged(rig):
    """An ack that finds the window full waits for room: dropped, its gateway would send everything again."""
    rig.link._window = 2
    for seq in range(20):
        rig.receive(group(sample(seq)))
    rig.ingest.flush()
    assert rig.events == ["commit", "ack", "puback", "ack", "puback", "ack"]
    rig.until(lambda: len(rig.acks) == 20)
    assert [list(ack.groups[0].stored) for ack in rig.acks] == [[seq] for seq in range(20)]
    assert rig.events.count("commit") == 1


def test_reading_with_a_doubtful_time_is_dated_by_the_state_of_its_boot(rig):
    """Both come over the broker; what cannot be a boot is left out, and the sample stored all the same."""
    rig.start_ingest(hears_states=True)
    doubtful = sample(1)
    doubtful.reading.boot_id, doubtful.reading.since_boot_us = b"b" * 16, 5_000_000
    odd = sample(2)
    odd.reading.boot_id, odd.reading.since_boot_us = b"short", (1 << 64) - 1
    state = NodeState(boot_id=b"b" * 16, since_boot_us=8_000_000, at_us=NOW_US, time_quality=TIME_QUALITY_SYNCED)
    rig.send(group(doubtful, odd))
    assert rig.gateway.publish(Route.STATE, state, site=rig.site, node=GATEWAY)
    rig.until(lambda: rig.acks and table(rig.store, "boots"))
    assert [row["dated_at_us"] for row in table(rig.store, "dated_samples")] == [NOW_US - 3_000_000, 5]


def test_flood_is_stored_in_parts(rig):
    """While a transaction runs, gateways wait: a long queue is acknowledged in between."""
    for number in range(5):
        rig.receive(group(*(sample(number * 1000 + seq) for seq in range(1000))))
    assert rig.events.count("commit") == 1
    assert rig.ingest.counters["samples.stored"] == 3000
    rig.ingest.flush()
    assert rig.ingest.counters["samples.stored"] == 5000


def test_samples_are_stored_with_what_both_models_said_and_acknowledged(rig):
    """The row holds everything of the message, absent answers as NULL; the ack names each number by its group."""
    answered = sample(1, device_answer=Answer(release=2, score=0.75, label=0), gateway_answer=Answer(release=3))
    rig.send(group(answered, sample(2)), group(sample(1), device="cam-01"))
    rig.until(lambda: rig.acks)
    (ack,) = rig.acks
    assert [(item.device, item.epoch, list(item.stored), list(item.quarantined)) for item in ack.groups] == [
        ("cam-00", EPOCH, [1, 2], []),
        ("cam-01", EPOCH, [1], []),
    ]
    first, second, _ = table(rig.store)
    answers = ("device_release", "device_score", "device_label", "gateway_release", "gateway_score", "gateway_label")
    assert [first[name] for name in answers] == [2, 0.75, 0, 3, 0.0, None]
    assert [second[name] for name in answers] == [None] * 6
    names = ("gateway", "model", "reason", "reference", "captured_at_us", "received_at_us")
    assert [first[name] for name in names] == [GATEWAY, "digits", ASK_REASON_SCORE, "row/1", 5, NOW_US]
    assert SensorData.FromString(first["reading"]) == answered.reading
    assert rig.ingest.counters["samples.stored"] == 3


def test_ack_follows_the_commit_and_puback_the_ack(rig):
    """Whatever kills ingest in between, nobody was promised what is not on disk."""
    rig.send(group(sample(1)))
    rig.until(lambda: rig.acks)
    assert rig.events == ["commit", "ack", "puback"]


def test_store_that_breaks_promises_nothing_and_the_sample_comes_again(rig):
    """No ack and no PUBACK: the broker still has the message and gives it to the next process."""
    rig.start_ingest(session_expiry_s=60)
    rig.store.is_broken = True
    rig.send(group(sample(1), sample(2, device_answer=Answer(release=1))), group(sample(3), device="NO ID"))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        rig.until(lambda: rig.events)
    assert rig.events == ["broken"]
    assert (rig.store.count(), rig.store.count_quarantined()) == (0, 0)
    rig.link.kill()
    rig.store.is_broken = False
    rig.start_ingest(session_expiry_s=60)
    rig.until(lambda: rig.acks)
    assert [(list(item.stored), list(item.quarantined)) for item in rig.acks[0].groups] == [([1, 2], []), ([], [3])]
    assert rig.events == ["broken", "commit", "ack", "puback"]
    assert (rig.store.count(), rig.store.count_quarantined()) == (2, 1)


def test_kill_between_commit_and_puback_changes_nothing(rig):
    """The message comes again, is a duplicate, and is acknowledged as stored again."""
    rig.start_ingest(session_expiry_s=60)
    rig.link.loses_pubacks = True
    rig.send(group(sample(1)))
    rig.until(lambda: rig.acks)
    before = table(rig.store)
    rig.link.kill()
    rig.start_ingest(session_expiry_s=60)
    rig.until(lambda: len(rig.acks) == 2)
    assert rig.acks[0] == rig.acks[1]
    assert table(rig.store) == before
    assert rig.ingest.counters["samples.duplicate"] == 1


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (group(sample(7), device="Not An Id"), "groups.device"),
        (group(sample(7), model=""), "groups.model"),
        (group(sample(7), epoch=b"short"), "epoch"),
        (group(Sample(reading=SensorData(seq=7))), "reading"),
        (group(Sample(reading=SensorData(seq=7, device="cam-09", scalars=Scalars()))), "reading.device"),
        (group(Sample(reading=SensorData(seq=7, epoch=bytes(16), scalars=Scalars()))), "reading.epoch"),
        (group(Sample(reading=SensorData(seq=7, reference="x" * 65, scalars=Scalars()))), "reading.reference"),
        (group(sample(MAX_SEQ + 1)), "reading.seq"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_sample_is_set_aside_and_nothing_waits_behind_it(rig, broken, field):
    """It is acknowledged as quarantined, with the field at fault beside its bytes; its neighbours are stored."""
    rig.send(group(sample(1)), broken, group(sample(2)))
    rig.send(group(sample(3)))
    rig.until(lambda: len(rig.acks) == 2)
    (bad,) = broken.samples
    answers = [(list(item.stored), list(item.quarantined)) for item in rig.acks[0].groups]
    assert answers == [([1], []), ([], [bad.reading.seq]), ([2], [])]
    assert [row["seq"] for row in table(rig.store)] == [1, 2, 3]
    (row,) = table(rig.store, "quarantine")
    assert row["reason"].startswith(f"{field}: ")
    assert (row["gateway"], row["received_at_us"]) == (GATEWAY, NOW_US)
    assert Sample.FromString(row["payload"]) == bad
    assert rig.ingest.counters["samples.malformed"] == 1


def test_same_key_with_other_bytes_is_quarantined(rig):
    """The first word stays, the second is kept for people, and the gateway need not send it again."""
    rig.send(group(sample(1, value=1.0)))
    rig.send(group(sample(1, value=2.0), sample(2)))
    rig.until(lambda: len(rig.acks) == 2)
    (answer,) = rig.acks[1].groups
    assert (list(answer.stored), list(answer.quarantined)) == ([2], [1])
    assert SensorData.FromString(table(rig.store)[0]["reading"]).scalars.values == [1.0]
    (row,) = table(rig.store, "quarantine")
    assert SensorData.FromString(row["payload"]).scalars.values == [2.0]
    assert row["reason"] == "the key is stored with other bytes"
    assert rig.ingest.counters == {"samples.stored": 2, "samples.conflict": 1}


@pytest.mark.parametrize("refused", [{"gateway": "gw-02"}, {"gateway": ""}, {"node": "gw-02"}])
def test_batch_of_another_gateway_is_refused(rig, refused):
    """Access control ties a gateway to its topic, so the message may name no other; what follows is stored."""
    rig.send(group(sample(1)), **refused)
    rig.send(group(sample(2)))
    rig.until(lambda: rig.acks)
    assert [row["seq"] for row in table(rig.store)] == [2]
    assert rig.link.counters["bad_payloads"] == 1
    assert rig.events.count("puback") == 2


def test_everything_that_has_arrived_shares_a_transaction(rig):
    """One commit and one fsync for whatever the socket had; each batch has its own ack and PUBACK."""
    for seq in range(3):
        rig.receive(group(sample(seq)))
    assert rig.events == []
    rig.ingest.flush()
    assert rig.events == ["commit", "ack", "puback", "ack", "puback", "ack", "puback"]
    rig.ingest.flush()
    assert rig.events.count("commit") == 1
    rig.until(lambda: len(rig.acks) == 3)
    assert [list(ack.groups[0].stored) for ack in rig.acks] == [[0], [1], [2]]


def test_ingest_processes_share_the_work(rig):
    """A second process takes some of the samples, and none is stored or acknowledged twice."""
    second = Link(parse_broker_url(rig.url, session_expiry_s=0), service_identity("ingest-2"))
    ingest = Ingest(second, rig.store, wall_clock=lambda: NOW)
    rig.loop.on_idle(lambda _: ingest.flush())
    second.attach(rig.loop)
    rig.until(lambda: second.connected)
    done = []
    assert second.publish(Route.CLOUD_STATE, b"", on_done=done.append, service="ingest-2")
    rig.until(lambda: done)
    for seq in range(8):
        rig.send(group(sample(seq)))
    rig.until(lambda: len(rig.acks) == 8)
    rig.settle()
    second.close()
    assert sorted(ack.groups[0].stored[0] for ack in rig.acks) == list(range(8))
    assert 0 < ingest.counters["samples.stored"] < 8


def test_batch_that_is_too_long_is_refused(rig):
    """A transaction is bounded: one sample more than fits, and none of the message is looked at."""
    rig.receive(group(*[Sample()] * 4096), group(Sample()))
    assert rig.link.counters["bad_payloads"] == 1
    assert rig.events == ["puback"]
    rig.ingest.flush()
    assert rig.store.count_quarantined() == 0


# -- labels ------------------------------------------------------------------------------------------------------------


def labels(*items, source=pb.LABEL_SOURCE_PERSON):
    return pb.AddLabels(source=source, author="ann", labels=items)


def label(seq=1, **fields):
    return pb.Label(**{"device": "cam-00", "epoch": EPOCH, "seq": seq, "label": 4} | fields)


def test_labels_are_stored_and_the_command_is_answered(rig):
    """They may come before their samples; who gave them, and when they came, is kept."""
    assert rig.command(labels(label(1), label(2))) == (pb.COMMAND_STATUS_DONE, "2 labels stored")
    assert table(rig.store, "labels")[0] == {
        "device": "cam-00",
        "epoch": EPOCH,
        "seq": 1,
        "label": 4,
        "source": pb.LABEL_SOURCE_PERSON,
        "author": "ann",
        "labelled_at_us": NOW_US,
        "note": "",
        "settles": 0,
    }
    rig.send(group(sample(1)))
    rig.until(lambda: rig.acks)
    assert rig.store.count_labelled("digits") == 1
    assert rig.ingest.counters["labels"] == 2


@pytest.mark.parametrize(
    ("action", "field"),
    [
        (labels(label(1), source=pb.LABEL_SOURCE_UNSPECIFIED), "source"),
        (labels(label(1), label(2, device="Not An Id")), "labels.device"),
        (labels(label(1), label(2, epoch=b"short")), "epoch"),
        (labels(label(1), label(MAX_SEQ + 1)), "labels.seq"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_without_source_or_key_are_refused(rig, action, field):
    """The answer names the field, and none of the command's labels is stored."""
    status, message = rig.command(action)
    assert (status, message.partition(":")[0]) == (pb.COMMAND_STATUS_REFUSED, field)
    assert table(rig.store, "labels") == []


def test_labels_that_come_too_late_are_not_stored(rig):
    """A command's expiry is compared with ingest's own clock."""
    status, _ = rig.command(labels(label(1)), expires_at_us=NOW_US)
    assert status == pb.COMMAND_STATUS_EXPIRED
    assert table(rig.store, "labels") == []
