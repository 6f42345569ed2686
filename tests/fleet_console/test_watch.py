"""What `shoal watch` makes of what passes."""

import json
import uuid
from contextlib import closing

import pytest
from paho.mqtt.client import MQTTMessage
from rich.console import Console

from fleet_console.watch import _print, decode_payload, watch
from shoal.codec import encode
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import ROUTES, Route, topic
from shoal.v1.command_pb2 import COMMAND_STATUS_DONE, Command, CommandResult
from shoal.v1.inference_pb2 import STATUS_OK, InferenceReply, InferenceRequest
from shoal.v1.node_pb2 import NodeState, Presence
from shoal.v1.release_pb2 import BundleEntry, TrustBundle
from shoal.v1.sample_pb2 import SampleAck, SampleBatch
from shoal.v1.sensor_pb2 import Scalars

SEGMENTS = {"site": "plant", "node": "cam-01", "service": "ingest", "sha256": "ab" * 32}

REQUEST = InferenceRequest(device="cam-01", answer_within_ms=50)
REQUEST.rows.add().reading.scalars.CopyFrom(Scalars(values=[0.5, float("nan")]))
REPLY = InferenceReply(model="digits")
REPLY.rows.add(seq=1 << 40, status=STATUS_OK)

PRESENCE = ("shoal.v1.Presence", Presence(session=b"\0\1", online=True), {"session": "AAE=", "online": True})
STATE = (
    "shoal.v1.NodeState",
    NodeState(role="device", counters={"produced": 7}),
    {"role": "device", "counters": {"produced": "7"}},
)
# Schema, message, and what an operator reads of it: the schema's own names, 64-bit numbers as text, bytes as base64.
MESSAGES = {
    Route.PRESENCE: PRESENCE,
    Route.STATE: STATE,
    Route.CLOUD_PRESENCE: PRESENCE,
    Route.CLOUD_STATE: STATE,
    Route.INFER: (
        "shoal.v1.InferenceRequest",
        REQUEST,
        {"device": "cam-01", "answer_within_ms": 50, "rows": [{"reading": {"scalars": {"values": [0.5, "NaN"]}}}]},
    ),
    Route.REPLY: (
        "shoal.v1.InferenceReply",
        REPLY,
        {"model": "digits", "rows": [{"seq": "1099511627776", "status": "STATUS_OK"}]},
    ),
    Route.SAMPLE: ("shoal.v1.SampleBatch", SampleBatch(gateway="gw-01"), {"gateway": "gw-01"}),
    Route.ACK: ("shoal.v1.SampleAck", SampleAck(), {}),
    Route.COMMAND: ("shoal.v1.Command", Command(expires_at_us=5), {"expires_at_us": "5"}),
    Route.RESULT: (
        "shoal.v1.CommandResult",
        CommandResult(status=COMMAND_STATUS_DONE),
        {"status": "COMMAND_STATUS_DONE"},
    ),
    Route.TRUST_BUNDLE: (
        "shoal.v1.TrustBundle",
        TrustBundle(entries=[BundleEntry(path="1.root.json")]),
        {"entries": [{"path": "1.root.json"}]},
    ),
}


@pytest.mark.parametrize("route", Route)
def test_every_route_is_decoded(route):
    """Each message with its schema and fields; of opaque bytes their number."""
    name = topic(route, **SEGMENTS)
    if ROUTES[route].message is None:
        assert decode_payload(name, b"\xff" * 9) == {"bytes": 9}
        return
    schema, message, fields = MESSAGES[route]
    assert decode_payload(name, message.SerializeToString()) == {"schema": schema, "message": fields}


@pytest.mark.parametrize("route", Route)
def test_empty_payload_clears_what_is_retained(route):
    """Elsewhere it is a message without fields."""
    found = decode_payload(topic(route, **SEGMENTS), b"")
    assert found == {"cleared": True} if ROUTES[route].retain else found["message"] == {}


@pytest.mark.parametrize(
    ("name", "payload", "error"),
    [
        ("shoal/v1/up/plant/cam-01/infer", b"\xff", "1 bytes are not a shoal.v1.InferenceRequest"),
        ("shoal/v1/up/plant/cam-01/infer", bytes((1 << 20) + 1), "1048577 bytes, at most 1048576"),
        ("shoal/v1/up/plant/cam-01/fear", b"", "no topic of the contract"),
        ("shoal/v1/up/PLANT/cam-01/infer", b"", "topic.site"),
        ("home/kitchen", b"21.5", "no topic of the contract"),
    ],
)
def test_what_is_no_message_of_ours_is_said(name, payload, error):
    """Nothing that passes ends the watching."""
    found = decode_payload(name, payload)
    assert found["bytes"] == len(payload)
    assert error in found["error"]


@pytest.fixture
def site(mosquitto):
    """A site of which the broker holds a state, with a message to come that is not retained."""
    site = f"site-{uuid.uuid4().hex[:12]}"
    done = []
    with closing(Loop()) as loop:
        link = Link(parse_broker_url(mosquitto.url, session_expiry_s=0), node_identity(site, "gw", "gateway"))
        link.attach(loop)
        loop.run(until=lambda: link.connected)
        link.publish(Route.STATE, NodeState(role="[gateway]" * 30), on_done=done.append, site=site, node="gw")
        loop.run(until=lambda: done)
        link.close()
    return site


def test_machines_get_one_object_a_line(mosquitto, site, capsys):
    """Topic, whether it was retained, size, schema and message; after the count it ends."""
    watch(mosquitto.url, [f"shoal/v1/up/{site}/+/state"], as_json=True, count=1)
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    line = json.loads(out)
    assert line.pop("at") > 1.7e9
    message = NodeState(role="[gateway]" * 30)
    assert line == {
        "topic": f"shoal/v1/up/{site}/gw/state",
        "retained": True,
        "size_bytes": len(encode(message)),
        "schema": "shoal.v1.NodeState",
        "message": {"role": message.role},
    }


def test_people_get_one_line_a_message(mosquitto, site, capsys):
    """However long it is, and whatever it holds: nothing is wrapped or taken for markup. Retained ones are marked."""
    watch(mosquitto.url, [f"shoal/v1/up/{site}/+/state", f"shoal/v1/up/{site}/+/presence"], as_json=False, count=2)
    lines = sorted(capsys.readouterr().out.splitlines(), key=len)
    assert len(lines) == 2
    words = lines[1].split()
    assert words[1:5] == ["R", f"shoal/v1/up/{site}/gw/state", "273", "B"]
    assert words[5:] == ['{"role":', f'"{"[gateway]" * 30}"}}']
    assert f" R shoal/v1/up/{site}/gw/presence " in lines[0]


def test_message_that_is_not_retained_has_no_mark(capsys):
    """R is for what the broker had kept."""
    packet = MQTTMessage(topic=b"shoal/v1/down/plant/gw/ack")
    packet.payload = b""
    _print(Console(), packet, as_json=False)
    assert capsys.readouterr().out.endswith("   shoal/v1/down/plant/gw/ack 0 B {}\n")


@pytest.mark.parametrize("pattern", ["shoal/#/state", "shoal/v1/up+", ""])
def test_filter_that_is_none_is_the_operators_mistake(mosquitto, pattern):
    """It is named, and nothing is retried."""
    with pytest.raises(ConfigError, match=r"'shoal/v1/#' '.*': Invalid subscription filter"):
        watch(mosquitto.url, ["shoal/v1/#", pattern], as_json=False, count=1)
