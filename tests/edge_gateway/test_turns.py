"""Devices take turns before their questions are unpacked: whole packets in, whole packets out."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_gateway.deploy import local_model
from edge_gateway.lanes import LaneConfig
from edge_gateway.rehearsal import SITE, Rehearsal, packet_of
from shoal.routes import Route, topic_bytes
from shoal.tensors import to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import SensorData
from shoal.wire import PUBLISH, encode_publish, packet_bounds, parse_publish

_BATCH = 4
_CROWD = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "x"],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "y"],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return local_model("m", path)


@pytest.fixture
def gateway(served):
    lanes = LaneConfig(max_batch_size=_BATCH, max_waiting_per_device=_CROWD)
    with Rehearsal("m", served, lanes) as rehearsal:
        yield rehearsal


def question(device, seq, **fields):
    reading = SensorData(seq=seq, tensor=to_tensor(np.array([seq, 1], np.float32)))
    rows = [pb.InferenceRow(reading=reading)]
    return packet_of(pb.InferenceRequest(device=device, epoch=b"e" * 16, model="m", rows=rows, **fields))


def replies(gateway):
    """What was sent since the last call: device, sequence number and status of each reply."""
    sent, gateway.link.sent = gateway.link.sent, []
    found = []
    for data in sent:
        if data[0] & 0xF0 == PUBLISH:
            publish = parse_publish(data, 0, *packet_bounds(data, 0, len(data)))
            rows = pb.InferenceReply.FromString(publish.payload).rows
            found += [(publish.topic.split("/")[4], row.seq, row.status) for row in rows]
    return found


def receive(gateway, device, seqs, **fields):
    for seq in seqs:
        gateway.link.receive(question(device, seq, **fields))


def test_question_behind_a_flood_waits_for_one_row_a_batch(gateway):
    """What came before it is answered after it, but for the batch that was full already and the flood's own turn."""
    receive(gateway, "flood", range(16))
    receive(gateway, "cam", [100])
    gateway.gateway.flush(0.0)
    assert [seq for _, seq, _ in replies(gateway)] == [0, 1, 2, 3]
    gateway.gateway.flush(0.0)
    assert [seq for _, seq, _ in replies(gateway)] == [4, 100, 5, 6]
    gateway.flush(0.0)
    assert [seq for _, seq, _ in replies(gateway)] == list(range(7, 16))
    assert not gateway.gateway.is_behind


def test_question_that_comes_while_a_batch_runs_has_its_turn_in_the_next(gateway):
    """The gateway goes back to its socket between batches, and says so to its loop."""
    woken = []
    gateway.gateway._wake = lambda: woken.append(1)
    receive(gateway, "flood", range(16))
    gateway.gateway.flush(0.0)
    assert (len(woken), gateway.gateway.is_behind) == (1, True)
    receive(gateway, "cam", [100])
    replies(gateway)
    gateway.gateway.flush(0.0)
    assert ("cam", 100, pb.STATUS_OK) in replies(gateway)
    gateway.flush(0.0)
    assert len(replies(gateway)) == 16 - 2 * _BATCH + 1
    # Once for each batch but the last.
    assert len(woken) == 4


def test_fresh_questions_fill_the_batch_before_replays_do(gateway):
    """Replays are unpacked in their turn, but take no room from what is fresh."""
    receive(gateway, "busy", range(_BATCH))
    receive(gateway, "back", range(10, 18), replay=True)
    receive(gateway, "cam", range(100, 106))
    gateway.gateway.flush(0.0)
    replies(gateway)
    gateway.gateway.flush(0.0)
    assert [device for device, _, _ in replies(gateway)] == ["cam"] * _BATCH
    gateway.flush(0.0)
    assert [device for device, _, _ in replies(gateway)] == ["cam"] * 2 + ["back"] * 8


def test_crowd_of_one_device_is_refused_before_its_turn(gateway):
    """It would keep room of the receive-maximum that all devices share; others still come in."""
    receive(gateway, "flood", range(_BATCH + _CROWD + 3))
    receive(gateway, "cam", [100])
    assert gateway.gateway.counters["requests"] == _BATCH + 3
    gateway.flush(0.0)
    found = replies(gateway)
    refused = [seq for _, seq, status in found if status == pb.STATUS_RESOURCE_EXHAUSTED]
    assert refused == [_BATCH + _CROWD, _BATCH + _CROWD + 1, _BATCH + _CROWD + 2]
    assert sum(status == pb.STATUS_OK for _, _, status in found) == _BATCH + _CROWD + 1


def test_malformed_question_is_answered_in_its_turn(gateway):
    """It is neither lost nor in the way of the one behind it, and is acknowledged once."""
    receive(gateway, "cam", range(_BATCH))
    name = topic_bytes(Route.INFER, site=SITE, node="cam")
    gateway.link.receive(encode_publish(name, b"\xff", qos=1, retain=False, packet_id=7, properties=b""))
    receive(gateway, "cam", [100])
    gateway.gateway.flush(0.0)
    assert len(replies(gateway)) == _BATCH
    gateway.gateway.flush(0.0)
    assert [status for *_, status in replies(gateway)] == [pb.STATUS_INVALID_ARGUMENT, pb.STATUS_OK]


def test_malformed_question_is_answered_when_there_is_room(gateway, monkeypatch):
    """Samples on their way to the cloud may fill the window; the refusal waits for it as answers do."""
    name = topic_bytes(Route.INFER, site=SITE, node="cam")
    with monkeypatch.context() as full:
        full.setattr(gateway.link, "publish", lambda *_, **__: False)
        gateway.link.receive(encode_publish(name, b"\xff", qos=1, retain=False, packet_id=7, properties=b""))
        receive(gateway, "cam", [100])
        gateway.flush(0.0)
    assert replies(gateway) == []
    gateway.flush(0.0)
    assert [status for *_, status in replies(gateway)] == [pb.STATUS_INVALID_ARGUMENT, pb.STATUS_OK]


def test_patience_counts_from_arrival_and_not_from_the_turn(gateway):
    """A question that nobody waits for any more when its turn comes is not run."""
    now = 50.0
    gateway.gateway._clock = lambda: now
    receive(gateway, "flood", range(_BATCH))
    receive(gateway, "cam", [100], answer_only=True, answer_within_ms=1000)
    gateway.gateway.flush(now)
    replies(gateway)
    now = 51.5
    gateway.gateway.flush(now)
    assert replies(gateway) == [("cam", 100, pb.STATUS_DEADLINE_EXCEEDED)]


def test_questions_that_wait_count_among_those_under_way(served):
    """QoS 0 knows no receive-maximum: what has no room is dropped, whether or not it was unpacked."""
    with Rehearsal("m", served, LaneConfig(max_batch_size=_BATCH, max_waiting_per_device=100)) as gateway:
        object.__setattr__(gateway.gateway.config, "max_open", 10)
        receive(gateway, "cam", range(15))
        assert gateway.gateway.counters["requests.dropped"] == 5
        gateway.flush(0.0)
        assert [seq for _, seq, _ in replies(gateway)] == list(range(10))


def test_what_waits_for_its_turn_is_answered_before_the_end(gateway):
    """A gateway that is told to stop leaves no question to be asked again."""
    receive(gateway, "cam", range(4 * _BATCH))
    gateway.gateway.close()
    assert [seq for _, seq, _ in replies(gateway)] == list(range(4 * _BATCH))
