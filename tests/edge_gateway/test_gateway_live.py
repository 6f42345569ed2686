"""The whole gateway over a real broker: questions in, answers out, promises kept."""

import random
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_gateway import engine
from edge_gateway.gateway import Gateway, GatewayConfig, serving_group
from shoal.codec import encode
from shoal.delivery.outbox import Limits, Outbox
from shoal.errors import ModelError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route, topic
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import release_pb2
from shoal.v1.sample_pb2 import SampleAck, SampleAckGroup
from shoal.v1.sensor_pb2 import Scalars, SensorData

_PATIENCE_S = 10.0
_EPOCH = b"e" * 16


def linear(path, factor=1.0, batch="n"):
    """Two inputs times a factor, as an ONNX file."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
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
        config = GatewayConfig(
            site=name, node="gw", models=["digits"], sample_linger_s=0.0, retry_after_s=0.5, **settings
        )
        self.gateway = Gateway(
            config, self.link("gw", "gateway"), self.outbox, rng=random.Random(1), clock=self.loop.clock
        )
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


def test_no_promise_leaves_before_its_commit(site, monkeypatch):
    """A disk that fails takes the reply with it: the device asks again."""

    def broken():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(site.outbox, "commit", broken)
    site.ask((1, 1.0, 1.0))
    with pytest.raises(OSError, match="Input/output"):
        site.until(lambda: bool(site.replies))
    monkeypatch.undo()
    assert not site.replies


def test_malformed_bytes_are_answered_and_hold_nobody_up(site):
    """The next question is answered as ever."""
    name = topic(Route.INFER, site=site.name, node="cam")
    site.device._client.publish(name, b"\xff\xff\xff", qos=1)
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


@pytest.mark.parametrize("batch", ["n", 1])
def test_engine_takes_free_and_single_batches(tmp_path, batch):
    """A model that takes one row at a time is given one row at a time."""
    runtime = engine.load(linear(tmp_path / "m.onnx", 2.0, batch))
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(runtime.run(rows), rows * 2)
    assert runtime.input_shape == (2,)


def test_engine_says_why_it_refuses(tmp_path):
    """A fixed batch, and bytes that are no model."""
    with pytest.raises(ModelError, match="free batch or 1"):
        engine.load(linear(tmp_path / "m.onnx", 1.0, 4))
    (tmp_path / "rubbish.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"rubbish\.onnx"):
        engine.load(tmp_path / "rubbish.onnx")


def test_messages_stay_below_the_limit():
    """What the tests send is what the codec takes."""
    assert len(encode(pb.InferenceRequest(rows=[row(1, 1.0)]))) < 100
