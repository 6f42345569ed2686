"""MQTT 5 PUBLISH, PUBACK and SUBACK, bytes to values and back. Pure.

These packets are nearly all traffic, and building paho's property objects for them costs more than everything
else a gateway does with a small request. What is rare or strange (`None` below) is left to paho.

Source: MQTT 5.0, sections 2.2.2 (properties), 3.3 (PUBLISH), 3.4 (PUBACK), 3.9 (SUBACK).
"""

from functools import lru_cache
from typing import NamedTuple

PUBLISH = 0x30
PUBACK = 0x40
SUBACK = 0x90
UNSUBACK = 0xB0
# The whole packet: normal disconnection, section 3.14; the will is not published.
DISCONNECT = b"\xe0\x00"

_RETAIN = 0x01
_QOS_SHIFT = 1
_MAX_LENGTH_BYTES = 4
_MAX_LENGTH = 268_435_455

_PAYLOAD_FORMAT = 0x01
_MESSAGE_EXPIRY = 0x02
_CONTENT_TYPE = 0x03
_RESPONSE_TOPIC = 0x08
_CORRELATION = 0x09
_USER_PROPERTY = 0x26

_SMALL = tuple(bytes((value,)) for value in range(256))


class MalformedPacketError(Exception):
    """The broker broke the protocol; the connection cannot go on."""


class Publish(NamedTuple):
    """A received message. `packet_id` is 0 at QoS 0; absent properties are empty."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: int
    correlation: bytes
    response_topic: str


class Puback(NamedTuple):
    """The broker's answer to a QoS 1 message of ours. `reason` is MQTT 5's reason code: 0x80 and above refuse."""

    packet_id: int
    reason: int


def packet_bounds(data: bytes, start: int, max_bytes: int) -> tuple[int, int] | None:
    """Where the variable header of the packet at `start` begins and where the packet ends; None while it is incomplete.

    Raises:
        MalformedPacketError: its length is none, or above `max_bytes`.
    """
    length = shift = 0
    available = len(data)
    for position in range(start + 1, start + 1 + _MAX_LENGTH_BYTES):
        if position >= available:
            return None
        byte = data[position]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004  no continuation bit
            if length > max_bytes:
                raise MalformedPacketError(f"a packet of {length} bytes, at most {max_bytes} were agreed on")
            end = position + 1 + length
            return (position + 1, end) if end <= available else None
        shift += 7
    raise MalformedPacketError("a packet's length does not end")


def parse_publish(data: bytes, start: int, body: int, end: int) -> Publish | None:
    """Parse the PUBLISH at `data[start:end]`, whose variable header begins at `body`.

    Returns None where it is not the plain case: QoS 2, a property not known here, a topic alias, or malformed.
    """
    flags = data[start]
    qos = flags >> _QOS_SHIFT & 0x03
    topic_at = body + 2
    at = topic_at + (data[body] << 8 | data[topic_at - 1]) if topic_at <= end else end
    topic_end = at
    packet_id = 0
    if qos:
        packet_id = data[at] << 8 | data[at + 1] if at + 2 <= end else 0
        at += 2
    # Property lists longer than 127 bytes are rare, and so is QoS 2.
    if qos > 1 or at >= end or data[at] > 0x7F or (qos and not packet_id) or topic_end == topic_at:  # noqa: PLR2004
        return None
    payload_at = at + 1 + data[at]
    found = _parse_properties(data, at + 1, payload_at) if payload_at <= end else None
    if found is None:
        return None
    try:
        topic = data[topic_at:topic_end].decode()
        response_topic = found[1].decode() if found[1] else ""
    except UnicodeDecodeError:
        return None
    return Publish(topic, data[payload_at:end], qos, flags & _RETAIN == _RETAIN, packet_id, found[0], response_topic)


def _parse_properties(data: bytes, at: int, end: int) -> tuple[bytes, bytes] | None:
    """Correlation data and response topic; None where a property is unknown or runs over the end."""
    if at + 3 <= end and data[at] == _CORRELATION:
        # Written first by our own encoder; what follows is the same for all messages of one kind.
        value_at = at + 3
        at = value_at + (data[at + 1] << 8 | data[at + 2])
        rest = _parse_rest(data[at:end]) if at <= end else None
        return None if rest is None else (data[value_at:at] or rest[0], rest[1])
    return _parse_rest(data[at:end])


@lru_cache(maxsize=256)
def _parse_rest(data: bytes) -> tuple[bytes, bytes] | None:
    correlation = response_topic = b""
    at, end = 0, len(data)
    while at < end:
        kind = data[at]
        if kind == _MESSAGE_EXPIRY:
            at += 5
        elif kind == _PAYLOAD_FORMAT:
            at += 2
        elif kind in {_CORRELATION, _CONTENT_TYPE, _RESPONSE_TOPIC, _USER_PROPERTY} and at + 3 <= end:
            value_at = at + 3
            at = value_at + (data[at + 1] << 8 | data[at + 2])
            if kind == _CORRELATION:
                correlation = data[value_at:at]
            elif kind == _RESPONSE_TOPIC:
                response_topic = data[value_at:at]
            elif kind == _USER_PROPERTY:
                if at + 2 > end:
                    return None
                at += 2 + (data[at] << 8 | data[at + 1])
        else:
            return None
    return (correlation, response_topic) if at == end else None


def parse_puback(data: bytes, body: int, end: int) -> Puback | None:
    """Parse a PUBACK whose variable header begins at `body`; its reason string is not read. None where malformed."""
    if end - body < 2:  # noqa: PLR2004  the packet identifier
        return None
    reason = data[body + 2] if end - body > 2 else 0  # noqa: PLR2004  section 3.4.2.1: success may be left out
    return Puback(data[body] << 8 | data[body + 1], reason)


def parse_suback(data: bytes, body: int, end: int) -> bytes | None:
    """The reason codes of a SUBACK whose variable header begins at `body`, one for each filter; 0x80 and above refuse.

    Returns None where it is not the plain case: properties longer than 127 bytes, or malformed.

    Source: MQTT 5.0, section 3.9.
    """
    properties_at = body + 2
    if properties_at >= end or data[properties_at] > 0x7F:  # noqa: PLR2004  a length of one byte
        return None
    reasons = data[properties_at + 1 + data[properties_at] : end]
    return reasons or None


def publish_properties(content_type: str, schema: str | None) -> bytes:
    """The properties that all messages of one kind share, encoded."""
    encoded = _property(_CONTENT_TYPE, content_type.encode())
    if schema is not None:
        encoded += _property(_USER_PROPERTY, b"schema") + _string(schema.encode())
    return encoded


def correlation_property(correlation: bytes) -> bytes:
    return b"\x09" + len(correlation).to_bytes(2, "big") + correlation


def expiry_property(expiry_s: int) -> bytes:
    return bytes((_MESSAGE_EXPIRY,)) + expiry_s.to_bytes(4, "big")


def encode_publish(topic: bytes, payload: bytes, *, qos: int, retain: bool, packet_id: int, properties: bytes) -> bytes:
    """Encode a PUBLISH; `properties` are encoded already, correlation data first, `packet_id` is left out at QoS 0.

    Raises:
        ValueError: it is larger than MQTT can say.
    """
    topic_size, properties_size = len(topic), len(properties)
    size = topic_size + properties_size + len(payload) + (5 if qos else 3)
    if properties_size < 0x80:  # noqa: PLR2004  else its length takes another byte
        properties_length = _SMALL[properties_size]
    else:
        properties_length = _length(properties_size)
        size += len(properties_length) - 1
    return b"".join(
        (
            _SMALL[PUBLISH | qos << _QOS_SHIFT | retain],
            _length(size),
            topic_size.to_bytes(2, "big"),
            topic,
            packet_id.to_bytes(2, "big") if qos else b"",
            properties_length,
            properties,
            payload,
        )
    )


def encode_puback(packet_id: int) -> bytes:
    """Encode a PUBACK that says success."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def _length(value: int) -> bytes:
    """A variable byte integer, section 1.5.5."""
    if value < 0x80:  # noqa: PLR2004
        return _SMALL[value]
    if value < 0x4000:  # noqa: PLR2004  two bytes: most of what travels
        return _SMALL[value & 0x7F | 0x80] + _SMALL[value >> 7]
    if value > _MAX_LENGTH:
        raise ValueError(f"{value} bytes, at most {_MAX_LENGTH}")
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def _property(kind: int, value: bytes) -> bytes:
    return bytes((kind,)) + _string(value)
