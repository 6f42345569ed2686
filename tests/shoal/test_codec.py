"""Bytes to messages and back, and the limits on the way. More in test_payloads.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.codec import MAX_PAYLOAD_BYTES, MAX_ROWS, decode, encode, schema_of
from shoal.errors import PayloadError
from shoal.routes import ROUTES
from shoal.v1.inference_pb2 import InferenceReply, InferenceRequest, InferenceRow, RowReply
from shoal.v1.node_pb2 import NodeState
from shoal.v1.sensor_pb2 import SensorData

pytestmark = pytest.mark.device

_MESSAGES = sorted({spec.message for spec in ROUTES.values() if spec.message}, key=lambda kind: kind.__name__)


class Untouchable:
    """A message kind that fails the test when it is asked to parse."""

    @staticmethod
    def FromString(_payload):  # noqa: N802  protobuf's name
        pytest.fail("parsed before its size was checked")


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (InferenceRequest(device="cam"), b"\x0a\x03cam"),
        (InferenceRequest(epoch=b"\x00\xff"), b"\x12\x02\x00\xff"),
        (InferenceRequest(rows=[InferenceRow()]), b"\x22\x00"),
        (InferenceRequest(answer_within_ms=300), b"\x28\xac\x02"),
        (InferenceRequest(rows=[InferenceRow(reading=SensorData(seq=1))]), b"\x22\x04\x0a\x02\x18\x01"),
        (InferenceRequest(), b""),
    ],
)
def test_wire_bytes_are_these(message, wire):
    """Deployed devices speak them: a field number that moves breaks the fleet."""
    assert encode(message) == wire
    assert decode(InferenceRequest, wire) == message


def test_same_message_makes_the_same_bytes():
    """Maps are sorted, so that equal samples compare equal as bytes."""
    names = [f"counter{number}" for number in range(40)]
    there = NodeState(counters=dict.fromkeys(names, 1))
    back = NodeState(counters=dict.fromkeys(reversed(names), 1))
    assert encode(there) == encode(back)


@pytest.mark.parametrize("kind", _MESSAGES)
@given(data=st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_payload_error(kind, data):
    """On every route that carries messages."""
    try:
        message = decode(kind, data)
    except PayloadError:
        return
    assert decode(kind, encode(message)).SerializeToString(deterministic=True) == encode(message)
    assert schema_of(message) == f"shoal.v1.{kind.__name__}"


def test_oversize_is_refused_without_parsing():
    """The parser never sees more than the limit."""
    with pytest.raises(PayloadError, match=f"{MAX_PAYLOAD_BYTES + 1} bytes, at most {MAX_PAYLOAD_BYTES}"):
        decode(Untouchable, bytes(MAX_PAYLOAD_BYTES + 1))


def test_largest_payload_passes_both_ways():
    """The limit itself is allowed: tag, three bytes of length, text."""
    message = InferenceRequest(device="x" * (MAX_PAYLOAD_BYTES - 4))
    wire = encode(message)
    assert len(wire) == MAX_PAYLOAD_BYTES
    assert decode(InferenceRequest, wire) == message
    message.device += "x"
    with pytest.raises(ValueError, match=r"shoal\.v1\.InferenceRequest"):
        encode(message)


@pytest.mark.parametrize(("kind", "row"), [(InferenceRequest, InferenceRow()), (InferenceReply, RowReply())])
def test_rows_are_bounded_in_questions_and_replies(kind, row):
    """A megabyte holds half a million empty ones; the error names the field."""
    assert len(decode(kind, kind(rows=[row] * MAX_ROWS).SerializeToString()).rows) == MAX_ROWS
    with pytest.raises(PayloadError, match="257 rows, at most 256") as caught:
        decode(kind, kind(rows=[row] * (MAX_ROWS + 1)).SerializeToString())
    assert caught.value.field == "rows"


def test_text_that_is_not_utf8_is_refused():
    """Names end up in topics and file names."""
    with pytest.raises(PayloadError, match=r"not a shoal\.v1\.InferenceRequest"):
        decode(InferenceRequest, b"\x0a\x02\xc3\x28")
