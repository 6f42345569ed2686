"""What a gateway says of a question that it cannot use, and what the device makes of it."""

import pytest

from device_agent.config import DeviceConfig
from device_agent.questions import Questions
from edge_gateway.deploy import local_model
from edge_gateway.lanes import LaneConfig
from edge_gateway.rehearsal import SITE, Rehearsal
from shoal.codec import encode
from shoal.delivery.outbox import Outbox
from shoal.inbox import Inbox
from shoal.routes import Route, topic_bytes
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import Scalars, SensorData
from shoal.wire import PUBLISH, correlation_property, encode_publish, packet_bounds, parse_publish
from tests.edge_gateway.test_gateway_live import linear

NODE, MODEL = "cam-01", "m"


class Wire:
    """A link that keeps what is published, and hands in what comes back."""

    connected = True

    def __init__(self):
        self.sent = []
        self.inbox = Inbox({})

    def subscribe(self, route, handler, **_):
        self.inbox.register(route, handler, ack_late=False)

    def on_connect(self, _hook):
        """It is connected already."""

    def room(self):
        return 1 - len(self.sent)

    def publish(self, _route, message, *, correlation, **_):
        self.sent.append((message, correlation))
        return True


def spoil_name(question):
    question.device = "somebody-else"
    return encode(question)


def spoil_epoch(question):
    question.epoch = b"short"
    return encode(question)


def spoil_bytes(question):
    return encode(question) + b"\xff"


@pytest.mark.parametrize(("spoil", "field"), [(spoil_name, "device"), (spoil_epoch, "epoch"), (spoil_bytes, "")])
def test_question_refused_as_a_whole_is_not_asked_for_ever(tmp_path, spoil, field):
    """Pins both ends of the contract: a reply without epoch refuses the message with its correlation data."""
    wire, outbox = Wire(), Outbox(tmp_path / "o.sqlite")
    config = DeviceConfig(SITE, NODE, MODEL)
    questions = Questions(config, wire, outbox, clock=lambda: 0.0, lane="", on_answer=lambda *_: None)
    reading = SensorData(seq=7, scalars=Scalars(values=[1.0]))
    assert questions.ask(pb.InferenceRow(reading=reading, reason=pb.ASK_REASON_NO_MODEL), 0.0)
    outbox.commit()
    questions.tick(0.0)
    ((question, correlation),) = wire.sent
    packet = encode_publish(
        topic_bytes(Route.INFER, site=SITE, node=NODE),
        spoil(question),
        qos=1,
        retain=False,
        packet_id=1,
        properties=correlation_property(correlation),
    )
    with Rehearsal(MODEL, local_model(MODEL, linear(tmp_path / "m.onnx")), LaneConfig()) as gateway:
        (data,) = [sent for sent in gateway.ask([packet]) if sent[0] & 0xF0 == PUBLISH]
    reply = parse_publish(data, 0, *packet_bounds(data, 0, len(data)))
    assert outbox.in_flight == 1
    wire.inbox.receive(reply.topic, reply.payload, retained=False, ack=lambda: None, correlation=reply.correlation)
    outbox.commit()
    found = outbox._store.db.execute("SELECT seq, status, field FROM quarantine").fetchall()
    assert (found, outbox.in_flight) == ([(7, "INVALID_ARGUMENT", field)], 0)
    outbox.close()
