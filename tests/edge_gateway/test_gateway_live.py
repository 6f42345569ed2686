"""The whole gateway over a real broker: questions in, answers out, promises kept."""

import contextlib
import random
import socket
import sqlite3
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_gateway.gateway import Gateway, GatewayConfig
from edge_gateway.lanes import LaneConfig
from shoal.codec import MAX_ROW_BYTES, encode
from shoal.delivery.outbox import Key, Limits, Outbox
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Address, Route, serving_group, topic
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import release_pb2
from shoal.v1.sample_pb2 import SampleAck, SampleAckGroup
from shoal.v1.sensor_pb2 import Scalars, SensorData
from shoal.v1.tensor_pb2 import D_TYPE_FLOAT32, Tensor

_PATIENCE_S = 10.0
_EPOCH = b"e" * 16


def linear(path, factor=1.0, width=2):
    """Some inputs times a factor, as an ONNX file."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def release(number, threshold=0.4):
    return release_pb2.ReleaseSpec(
        model="digits",
        release=number,
        input=release_pb2.InputSchema(shape=[2], mean=[0.0], std=[1.0]),
        score=release_pb2.SCORE_KIND_UNCERTAINTY,
        artefacts=[
            release_pb2.Artefact(tier=release_pb2.TIER_GATEWAY, threshold=threshold, sha256=bytes([number]) * 32)
        ],
    )


class Site:
    """A gateway, a device and the cloud, on one loop."""

    def __init__(self, url, name, folder, **settings):
        self.loop = Loop()
        self.url = url
        self.name = name
        self.replies = []
        self.samples = []
        self.outbox = Outbox(folder / "outbox.sqlite", settings.pop("limits", Limits()))
        own = {key: settings.pop(key) for key in ("devices", "max_open") if key in settings}
        config = GatewayConfig(
            site=name,
            node="gw",
            models=["digits"],
            sample_linger_s=0.0,
            retry_after_s=0.5,
            lanes=LaneConfig(**settings),
            **own,
        )
        self.gateway = Gateway(config, self.link("gw", "gateway"), self.outbox, rng=random.Random(1), loop=self.loop)
        self.device = self.link("cam")
        self.device.subscribe(
            Route.REPLY, lambda delivery: self.replies.append(delivery.message), site=name, node="cam"
        )
        self.cloud = self.link("cloud-1")
        self.cloud.subscribe(Route.SAMPLE, lambda delivery: self.samples.append(delivery.message), site=name)
        self.links = [self.gateway.link, self.device, self.cloud]

    def link(self, node, role="device"):
        config = replace(parse_broker_url(self.url, session_expiry_s=0), backoff_max_s=0.05)
        return Link(config, node_identity(self.name, node, role))

    def start(self):
        for link in self.links:
            link.attach(self.loop)
        self.loop.on_idle(self.gateway.flush)
        self.loop.call_every(0.02, self.gateway.tick)
        self.until(lambda: all(link.connected and link.is_idle for link in self.links))

    def until(self, ready):
        deadline = self.loop.clock() + _PATIENCE_S
        self.loop.run(until=lambda: ready() or self.loop.clock() > deadline)
        assert ready(), "it did not come in time"

    def ask(self, *rows, model="digits", node="cam", **fields):
        request = pb.InferenceRequest(
            **{"device": node, "epoch": _EPOCH, "model": model, "rows": [row(*item) for item in rows], **fields}
        )
        assert self.device.publish(Route.INFER, request, site=self.name, node=node)

    def answers(self, count):
        self.until(lambda: sum(len(reply.rows) for reply in self.replies) >= count)
        return [item for reply in self.replies for item in reply.rows]

    def close(self):
        for link in self.links:
            link.close()
        self.loop.close()
        self.outbox.close()


def row(seq, *values):
    return pb.InferenceRow(reading=SensorData(seq=seq, scalars=Scalars(values=values)), reason=pb.ASK_REASON_SCORE)


@pytest.fixture
def make_site(broker, tmp_path, request):
    made = []

    def make(**settings):
        site = Site(broker.url, f"s{abs(hash(request.node.nodeid)) % 10**12}", tmp_path, **settings)
        made.append(site)
        return site

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(make_site, tmp_path):
    """A gateway that serves release 1."""
    made = make_site()
    made.gateway.activate("digits", release(1), linear(tmp_path / "one.onnx"))
    made.start()
    return made


def test_answers_are_onnxruntimes_own(site, tmp_path):
    """The label and the score that the model file gives, for every row of a message."""
    values = np.random.default_rng(1).normal(size=(20, 2)).astype(np.float32)
    site.ask(*((index, *value) for index, value in enumerate(values)))
    answers = site.answers(20)
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx")
    logits = session.run(None, {"x": values})[0]
    assert [item.answer.label for item in answers] == logits.argmax(axis=1).tolist()
    certainty = np.exp(logits).max(axis=1) / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose([item.answer.score for item in answers], 1 - certainty, atol=1e-6)
    assert {item.status for item in answers} == {pb.STATUS_OK}


def test_promised_sample_stays_until_the_clouds_ack(site):
    """It is sent again until then, and only the ack lets it go."""
    site.ask((1, 1.0, 1.0), (2, 0.0, 9.0))
    assert [item.sample_promised for item in site.answers(2)] == [True, False]
    site.until(lambda: len(site.samples) >= 2)
    assert site.outbox.in_flight == 1
    ack = SampleAck(groups=[SampleAckGroup(device="cam", epoch=_EPOCH, stored=[1])])
    assert site.cloud.publish(Route.ACK, ack, site=site.name, node="gw")
    site.until(lambda: site.outbox.in_flight == 0)
    site.until(lambda: not site.outbox.is_dirty)
    assert site.outbox.counters()["samples.stored"] == 1


def test_no_promise_leaves_before_its_commit(site, tmp_path, monkeypatch):
    """What a reply promises is on disk, for another process to read, before the reply is handed to the link."""
    publish, missing = site.gateway.link.publish, []

    def look_then_publish(route, message, **options):
        if route is Route.REPLY:
            with contextlib.closing(sqlite3.connect(tmp_path / "outbox.sqlite")) as other:
                stored = {seq for (seq,) in other.execute("SELECT seq FROM items")}
            missing.append({item.seq for item in message.rows if item.sample_promised} - stored)
        return publish(route, message, **options)

    monkeypatch.setattr(site.gateway.link, "publish", look_then_publish)
    for seq in range(20):
        site.ask((seq, 1.0, 1.0))
    assert all(item.sample_promised for item in site.answers(20))
    assert missing == [set()] * 20


def test_disk_that_fails_holds_back_reply_and_acknowledgement(make_site, tmp_path, monkeypatch):
    """Both follow the commit, in this order, as soon as the disk takes it."""
    site, left = make_site(), []
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx"))
    monkeypatch.setattr(site.gateway.link, "publish", lambda route, *_, **__: left.append(route) or True)
    request = pb.InferenceRequest(device="cam", epoch=_EPOCH, model="digits", rows=[row(1, 1.0, 1.0)])
    address = Address(Route.INFER, site=site.name, node="cam")
    site.gateway._on_request(Delivery(address, b"", request, False, 1, b"", "", lambda: left.append("ack")))
    with monkeypatch.context() as disk:

        def broken():
            raise sqlite3.OperationalError("disk I/O error")

        disk.setattr(site.outbox, "commit", broken)
        with pytest.raises(sqlite3.OperationalError):
            site.gateway.flush(1.0)
    assert left == []
    site.gateway.flush(2.0)
    assert left == [Route.REPLY, "ack"]
    assert site.outbox.in_flight == 1


def test_malformed_bytes_are_answered_and_hold_nobody_up(site):
    """The next question is answered as ever."""
    name = topic(Route.INFER, site=site.name, node="cam")
    site.device._client.publish(name, b"\xff\xff\xff", qos=0)
    site.ask((1, 0.0, 1.0))
    answers = site.answers(2)
    assert [item.status for item in answers] == [pb.STATUS_INVALID_ARGUMENT, pb.STATUS_OK]
    assert site.gateway.link.counters["bad_payloads"] == 1


def test_request_in_anothers_name_is_refused(site):
    """The answer goes to the sender's own topic and names the field."""
    site.ask((1, 0.0, 1.0), device="somebody")
    (answer,) = site.answers(1)
    assert (answer.status, answer.field) == (pb.STATUS_INVALID_ARGUMENT, "device")


def test_model_that_is_not_here_is_not_found(make_site):
    """Neither an unknown one, nor one whose release has not come yet."""
    site = make_site()
    site.start()
    site.ask((1, 0.0, 1.0))
    site.ask((2, 0.0, 1.0), model="other")
    assert [item.status for item in site.answers(2)] == [pb.STATUS_NOT_FOUND] * 2


def test_full_queue_asks_for_patience(make_site, tmp_path):
    """Rows that would not fit are refused, not dropped."""
    site = make_site(max_batch_size=2, max_waiting=3)
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx"))
    site.start()
    site.ask(*((index, 0.0, 1.0) for index in range(4)))
    assert {item.status for item in site.answers(4)} == {pb.STATUS_RESOURCE_EXHAUSTED}


def test_full_outbox_makes_no_promise(make_site, tmp_path):
    """What cannot be kept is not promised."""
    site = make_site(limits=Limits(max_items=1))
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx"))
    site.start()
    site.ask((1, 1.0, 1.0), (2, 1.0, 1.0))
    assert [(item.status, item.sample_promised) for item in site.answers(2)] == [
        (pb.STATUS_OK, True),
        (pb.STATUS_RESOURCE_EXHAUSTED, False),
    ]


def test_late_answer_only_question_is_not_run(make_site, tmp_path):
    """Any other late one is: it may owe a sample."""
    site = make_site(max_delay_s=0.05, max_batch_size=8)
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx"))
    site.start()
    site.loop.call_every(0.01, site.gateway.flush)
    site.ask((1, 0.0, 1.0), answer_only=True, answer_within_ms=1)
    site.ask((2, 0.0, 1.0), answer_within_ms=1)
    assert {item.seq: item.status for item in site.answers(2)} == {
        1: pb.STATUS_DEADLINE_EXCEEDED,
        2: pb.STATUS_OK,
    }


def test_swap_of_models_drops_no_question(site, tmp_path):
    """Every row is answered once, by one release or the other."""
    for index in range(40):
        site.ask((index, 0.0, 1.0))
        if index == 20:
            site.until(lambda: len(site.replies) > 5)
            site.gateway.activate("digits", release(2), linear(tmp_path / "two.onnx", -1.0))
    answers = site.answers(40)
    assert sorted(item.seq for item in answers) == list(range(40))
    labels = {(item.answer.release, item.answer.label) for item in answers}
    assert labels == {(1, 1), (2, 0)}


def test_repeated_question_is_answered_again_and_stored_once(site):
    """QoS 1 and retries repeat."""
    for _ in range(3):
        site.ask((1, 1.0, 1.0))
    assert len(site.answers(3)) == 3
    assert site.outbox.counters()["accepted"] == 1


def test_gateway_with_a_list_hears_those_devices_alone(make_site, tmp_path):
    """Unshared, and exactly their topics."""
    site = make_site(devices=("cam",))
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx"))
    site.start()
    stranger = pb.InferenceRequest(device="mic", epoch=_EPOCH, model="digits", rows=[row(1, 0.0, 1.0)])
    assert site.device.publish(Route.INFER, stranger, site=site.name, node="mic")
    site.ask((2, 0.0, 1.0))
    site.answers(1)
    assert site.gateway.counters["requests"] == 1


def test_equal_gateways_share_a_group_and_others_do_not():
    """Members must be able to answer for each other."""
    assert serving_group(["a", "b"], []) == serving_group(["b", "a"], [])
    assert serving_group(["a"], []) != serving_group(["a", "b"], [])
    assert serving_group(["a"], ["b"]) != serving_group(["a", "b"], [])


# -- what a hostile or broken peer sends --------------------------------------------------------------------------


def padded(size_bytes):
    """A reading with a field of a newer schema, so large that its sample would not fit one message."""
    return SensorData.FromString(
        SensorData(seq=1, scalars=Scalars(values=[1.0, 1.0])).SerializeToString()
        + b"\xa2\x06"  # field 100, length-delimited
        + _varint(size_bytes)
        + bytes(size_bytes)
    )


def _varint(value):
    return pb.RowReply(seq=value).SerializeToString()[1:]


def tensor_of(*shape):
    return SensorData(seq=1, tensor=Tensor(dtype=D_TYPE_FLOAT32, shape=shape))


@pytest.mark.parametrize(
    ("reading", "fields", "field"),
    [
        (padded((1 << 20) - 200), {}, "rows[0]"),
        (SensorData(seq=1 << 63, scalars=Scalars(values=[1.0, 1.0])), {}, "rows[0].reading.seq"),
        (SensorData(seq=1, device="x" * 900_000), {}, "rows[0].reading.device"),
        (tensor_of(0, *[(1 << 32) - 1] * 3), {}, "rows[0].reading.tensor"),
        (tensor_of(*[1 << 31] * 4), {}, "rows[0].reading.tensor.data"),
        (SensorData(), {"device": "\0" * 900_000}, "device"),
        (SensorData(), {"model": "\0" * 900_000}, "model"),
        (SensorData(), {"model": ""}, "model"),
        (SensorData(), {"epoch": b"e" * 900_000}, "epoch"),
    ],
    ids=["padded", "seq", "row-device", "shape-0", "shape-product", "device", "model", "no-model", "epoch"],
)
def test_hostile_request_is_answered_by_name_and_has_no_other_effect(site, reading, fields, field):
    """The gateway goes on, promises nothing, and its answer quotes no more than fits."""
    rows = [pb.InferenceRow(reading=reading, reason=pb.ASK_REASON_AUDIT)]
    hostile = pb.InferenceRequest(**{"device": "cam", "epoch": _EPOCH, "model": "digits", "rows": rows, **fields})
    assert site.device.publish(Route.INFER, hostile, site=site.name, node="cam")
    site.ask((7, 0.0, 9.0))
    refused, answered = site.answers(2)
    assert (refused.status, refused.field) == (pb.STATUS_INVALID_ARGUMENT, field)
    assert (answered.seq, answered.status) == (7, pb.STATUS_OK)
    assert refused.ByteSize() < 2000
    assert site.outbox.in_flight == 0


def test_many_rows_of_long_refusals_fit_one_reply(site):
    """Each row's message is bounded, and so is the reply."""
    long = pb.InferenceRow(reading=SensorData(device="\0" * 3000))
    request = pb.InferenceRequest(device="cam", epoch=_EPOCH, model="digits", rows=[long] * 256)
    assert site.device.publish(Route.INFER, request, site=site.name, node="cam")
    assert {item.status for item in site.answers(256)} == {pb.STATUS_INVALID_ARGUMENT}


def test_row_that_breaks_the_model_spoils_no_other_row_of_its_batch(make_site, tmp_path):
    """One device's absurd value costs the others nothing."""
    site = make_site()
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx", 10.0))
    site.start()
    site.ask((1, 0.0, 1.0), (2, 3e38, 1.0), (3, 0.0, 1.0))
    assert {item.seq: item.status for item in site.answers(3)} == {
        1: pb.STATUS_OK,
        2: pb.STATUS_INTERNAL,
        3: pb.STATUS_OK,
    }
    assert site.gateway.counters["model_errors"] == 1


def test_largest_reading_that_is_taken_reaches_the_cloud(site):
    """What fits a question fits a sample, with both answers and all names."""
    rows = [pb.InferenceRow(reading=padded(MAX_ROW_BYTES - 100), reason=pb.ASK_REASON_AUDIT)]
    request = pb.InferenceRequest(device="cam", epoch=_EPOCH, model="digits", rows=rows)
    assert site.device.publish(Route.INFER, request, site=site.name, node="cam")
    assert site.answers(1)[0].sample_promised
    site.until(lambda: site.samples)
    assert site.samples[0].groups[0].samples[0].reading.seq == 1


def test_release_of_another_shape_swapped_in_under_waiting_rows_stops_nothing(make_site, tmp_path):
    """They were unpacked for the old one: their devices ask again, new rows are answered."""
    site = make_site(max_delay_s=0.2)
    site.gateway.activate("digits", release(1), linear(tmp_path / "m.onnx"))
    site.start()
    site.ask((1, 0.0, 1.0))
    site.until(lambda: site.gateway.counters["requests"] == 1)
    wide = release(2)
    wide.input.shape[:] = [3]
    site.gateway.activate("digits", wide, linear(tmp_path / "wide.onnx", width=3))
    site.ask((2, 0.0, 0.0, 1.0))
    site.until(lambda: site.gateway.counters["requests"] == 2)
    site.gateway.flush(site.loop.clock() + 1.0)
    assert {item.seq: (item.status, item.answer.release) for item in site.answers(2)} == {
        1: (pb.STATUS_INTERNAL, 0),
        2: (pb.STATUS_OK, 2),
    }


def test_question_between_the_clouds_ack_and_its_commit_is_promised_again(site):
    """Its sample left the books and comes back onto them in one and the same commit."""
    site.ask((1, 1.0, 1.0))
    site.answers(1)
    site.until(lambda: site.samples)
    assert site.outbox.settle(Key("cam", _EPOCH, 1), "samples.stored")
    site.ask((1, 1.0, 1.0))
    site.until(lambda: len(site.replies) == 2)
    assert site.replies[1].rows[0].sample_promised
    assert site.outbox.in_flight == 1
    assert (site.outbox.counters()["accepted"], site.outbox.counters()["samples.stored"]) == (2, 1)


def test_acknowledgement_follows_the_reply(site, monkeypatch):
    """While a reply finds no room its question stays the broker's, and receive-maximum holds the flood back."""
    acked = []
    real = site.gateway.link._send_ack
    monkeypatch.setattr(
        site.gateway.link, "_send_ack", lambda client, number: (acked.append(len(site.replies)), real(client, number))
    )
    site.gateway.link._client.disconnect()
    site.until(lambda: site.gateway.link.counters["connects"] == 2)
    site.until(lambda: site.gateway.link.is_subscribed)
    monkeypatch.setattr(site.gateway.link, "_window", 0)
    site.ask((1, 0.0, 1.0))
    site.until(lambda: site.gateway.counters["requests"] == 1)
    site.gateway.flush(site.loop.clock())
    assert (acked, site.replies) == ([], [])
    monkeypatch.setattr(site.gateway.link, "_window", 10)
    site.answers(1)
    assert len(acked) == 1


def test_requests_without_acknowledgement_are_bounded_too(make_site):
    """QoS 0 knows no receive-maximum: what waits for its reply is counted and cut."""
    site = make_site(max_open=2)
    acks = []
    request = pb.InferenceRequest(device="cam", epoch=_EPOCH, model="digits", rows=[row(1, 0.0, 1.0)])
    address = Address(Route.INFER, site=site.name, node="cam")
    for _ in range(3):
        site.gateway._on_request(Delivery(address, b"", request, False, 1, b"", "", lambda: acks.append(1)))
    assert (site.gateway.counters["requests"], site.gateway.counters["requests.dropped"], len(acks)) == (2, 1, 1)


def test_broken_link_loses_no_other_devices_questions(site):
    """Replies that found no connection are counted; the device asks again and is answered."""
    site.ask((1, 0.0, 1.0))
    site.until(lambda: site.gateway.counters["requests"] == 1 or site.replies)
    site.gateway.link._client.socket().shutdown(socket.SHUT_RDWR)
    site.until(lambda: site.gateway.link.counters["connects"] == 2 and site.gateway.link.is_subscribed)
    site.ask((2, 0.0, 1.0))
    site.until(lambda: any(reply.rows[0].seq == 2 for reply in site.replies))
    assert not site.gateway._open


def test_messages_stay_below_the_limit():
    """What the tests send is what the codec takes."""
    assert len(encode(pb.InferenceRequest(rows=[row(1, 1.0)]))) < 100
