"""Bytes to messages and back, with the limits that every role shares."""

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from shoal.errors import PayloadError

# A float32 224x224x3 image is 602 KB; 1 MiB is also what the broker profiles allow. See docs/topics.md.
MAX_PAYLOAD_BYTES = 1 << 20
# 1 MiB of protobuf can hold 524,288 empty rows; parsing them is what would hurt.
MAX_ROWS = 256
MAX_REFERENCE_BYTES = 64
# What a row may take of a message: the rest is for names, and for the answers that the gateway adds on the way up.
MAX_ROW_BYTES = MAX_PAYLOAD_BYTES - 1024
EPOCH_BYTES = 16

CONTENT_TYPE = "application/x-protobuf"
OPAQUE_CONTENT_TYPE = "application/octet-stream"

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Serialise deterministically.

    Raises:
        ValueError: the message exceeds `MAX_PAYLOAD_BYTES`; the caller should have split it.
    """
    payload = message.SerializeToString(deterministic=True)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{schema_of(message)}: {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}")
    return payload


def decode(kind: type[M], payload: bytes) -> M:
    """Parse `payload`. Size is checked before parsing, the number of rows after it.

    Raises:
        PayloadError: too large, not this message, or too many rows.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise PayloadError(f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}")
    try:
        message = kind.FromString(payload)
    except DecodeError as exc:
        raise PayloadError(f"{len(payload)} bytes are not a {kind.DESCRIPTOR.full_name}") from exc
    rows = getattr(message, "rows", ())
    if len(rows) > MAX_ROWS:
        raise PayloadError(f"{len(rows)} rows, at most {MAX_ROWS}", field="rows")
    return message


def schema_of(message: Message) -> str:
    """The value of the `schema` user property: `shoal.v1.SampleBatch`."""
    return message.DESCRIPTOR.full_name
