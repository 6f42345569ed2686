"""The PUBLISH and PUBACK codec, against paho's own and against bytes that are nobody's."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shoal.wire import (
    MalformedPacketError,
    Puback,
    Publish,
    correlation_property,
    encode_puback,
    encode_publish,
    expiry_property,
    packet_bounds,
    parse_puback,
    parse_publish,
    publish_properties,
)

pytestmark = pytest.mark.device

MAX_BYTES = 1 << 21
topics = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
short = st.binary(max_size=40)


def parse(data, start=0):
    bounds = packet_bounds(data, start, MAX_BYTES)
    assert bounds is not None
    return parse_publish(data, start, *bounds)


def values():
    """What a PUBLISH says."""
    return st.builds(
        Publish,
        topic=topics,
        payload=st.binary(max_size=300),
        qos=st.sampled_from([0, 1]),
        retain=st.booleans(),
        packet_id=st.integers(1, 65535),
        correlation=short,
        response_topic=st.just(""),
    ).map(lambda publish: publish if publish.qos else publish._replace(packet_id=0))


@given(publish=values(), expiry=st.none() | st.integers(0, 2**32 - 1), before=st.binary(max_size=5))
def test_publish_survives_the_round_trip(publish, expiry, before):
    """Whatever stands before and after it in the buffer."""
    properties = publish_properties("application/x-protobuf", "shoal.v1.Sample")
    properties += correlation_property(publish.correlation)
    if expiry is not None:
        properties += expiry_property(expiry)
    packet = encode_publish(
        publish.topic.encode(),
        publish.payload,
        qos=publish.qos,
        retain=publish.retain,
        packet_id=publish.packet_id,
        properties=properties,
    )
    data = before + packet + b"\x30\x00"
    assert packet_bounds(data, len(before), MAX_BYTES)[1] == len(before) + len(packet)
    assert parse(data, len(before)) == publish


def test_properties_are_those_that_paho_writes():
    """Two implementations of section 2.2.2 agree on the bytes."""
    theirs = Properties(PacketTypes.PUBLISH)
    theirs.ContentType = "application/x-protobuf"
    theirs.UserProperty = [("schema", "shoal.v1.InferenceRequest")]
    theirs.CorrelationData = b"42"
    theirs.MessageExpiryInterval = 77
    pieces = [publish_properties("application/x-protobuf", "shoal.v1.InferenceRequest"), correlation_property(b"42")]
    pieces.append(expiry_property(77))
    packed = theirs.pack()
    assert packed[0] == sum(map(len, pieces)) == len(packed) - 1
    theirs_back, ours_back = Properties(PacketTypes.PUBLISH), Properties(PacketTypes.PUBLISH)
    theirs_back.unpack(packed)
    ours_back.unpack(packed[:1] + b"".join(pieces))
    assert theirs_back.json() == ours_back.json()


@pytest.mark.parametrize(
    ("properties", "seen"),
    [
        (b"", ("", b"")),
        (b"\x01\x01", ("", b"")),
        (b"\x08\x00\x01t\x09\x00\x02ab", ("t", b"ab")),
        (b"\x26\x00\x01k\x00\x01v\x09\x00\x00", ("", b"")),
    ],
)
def test_known_properties_are_read_or_skipped(properties, seen):
    """Payload format, response topic, user properties, in any order."""
    packet = encode_publish(b"t", b"p", qos=0, retain=False, packet_id=0, properties=properties)
    publish = parse(packet)
    assert (publish.response_topic, publish.correlation) == seen
    assert publish.payload == b"p"


@pytest.mark.parametrize(
    "packet",
    [
        b"\x34\x07\x00\x01t\x00\x01\x00p",  # QoS 2
        b"\x32\x05\x00\x01t\x00\x00",  # QoS 1 without a packet identifier
        b"\x32\x06\x00\x01t\x00\x00\x00",  # the same, with properties
        b"\x30\x06\x00\x01t\x02\x0b\x01",  # a subscription identifier
        b"\x30\x07\x00\x01t\x03\x23\x00\x01",  # a topic alias
        b"\x30\x03\x00\x00\x00",  # an empty topic, which only an alias may have
        b"\x30\x01\x00",  # no topic
        b"\x30\x03\x00\x09t",  # a topic longer than the packet
        b"\x30\x03\x00\x01t",  # no properties
        b"\x30\x05\x00\x01t\x05\x01",  # properties longer than the packet
        b"\x30\x08\x00\x01t\x04\x09\x00\x05a",  # a property longer than its list
        b"\x30\x09\x00\x01t\x05\x26\x00\x02ab",  # a user property without its value
        b"\x30\x04\x00\x01\xff\x00",  # a topic that is not UTF-8
        b"\x30\x84\x01\x00\x01t\x80\x01" + b"\x01\x00" * 64,  # properties above 127 bytes
    ],
)
def test_what_is_not_plain_is_left_to_paho(packet):
    """Rare, strange or broken: no guess is made."""
    assert parse(packet) is None


@given(st.binary(max_size=60))
@example(b"\x32\x02\x00\x00")
def test_no_bytes_upset_the_parser(body):
    """A hostile broker gets a None, never an exception that ends the loop."""
    packet = bytes((0x32, len(body))) + body
    publish = parse_publish(packet, 0, 2, len(packet))
    assert publish is None or publish.packet_id > 0
    puback = parse_puback(packet, 2, len(packet))
    assert (puback is None) == (len(body) < 2)


@pytest.mark.parametrize(
    ("body", "seen"),
    [(b"\x01\x02", Puback(258, 0)), (b"\x01\x02\x87", Puback(258, 0x87)), (b"\x00\x07\x10\x00", Puback(7, 0x10))],
)
def test_puback_says_its_reason(body, seen):
    """Success may be left out; a reason may be followed by properties."""
    assert parse_puback(b"\x40" + bytes([len(body)]) + body, 2, 2 + len(body)) == seen
    assert parse_puback(encode_puback(seen.packet_id), 2, 4) == Puback(seen.packet_id, 0)


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384, 2_097_151])
def test_length_is_known_once_it_is_complete(size):
    """At each border of the variable byte integer, and for each prefix of it."""
    packet = encode_publish(b"", b"x" * max(0, size - 3), qos=0, retain=False, packet_id=0, properties=b"")
    head = len(packet) - max(size, 3)
    for cut in range(head + 1):
        assert packet_bounds(packet[:cut], 0, MAX_BYTES) is None
    assert packet_bounds(packet, 0, MAX_BYTES) == (head, len(packet))
    assert packet_bounds(packet[:-1], 0, MAX_BYTES) is None


@pytest.mark.parametrize("data", [b"\x30\xff\xff\xff\xff", b"\x30\xff\xff\xff\xff\x01", b"\x30\x81\x80\x80\x01"])
def test_length_out_of_bounds_ends_it(data):
    """Nothing is allocated for a packet larger than what was agreed on."""
    with pytest.raises(MalformedPacketError):
        packet_bounds(data, 0, MAX_BYTES)


def test_payload_that_mqtt_cannot_carry_is_refused():
    """256 MiB is where the length ends."""
    with pytest.raises(ValueError, match="at most 268435455"):
        encode_publish(b"t", b"x" * 268_435_455, qos=0, retain=False, packet_id=0, properties=b"")
