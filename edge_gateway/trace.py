"""Which device asked which model when, for how many rows: a site's traffic without what it said. Pure."""

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.codec import MAX_PAYLOAD_BYTES, MAX_ROWS
from shoal.errors import ConfigError, PayloadError
from shoal.ids import parse_id

# At 24 bytes and more a line, what a laptop reads in a second or two.
MAX_LINES = 1_000_000


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request, as one line of JSON.

    Attributes:
        at_s: since the recording began.
        bytes: of the message.
    """

    at_s: Annotated[float, Meta(ge=0)]
    device: str
    model: str
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    bytes: Annotated[int, Meta(ge=1, le=MAX_PAYLOAD_BYTES)]


_DECODER = msgspec.json.Decoder(Asked)


def format_line(asked: Asked) -> bytes:
    return msgspec.json.encode(asked) + b"\n"


def parse_trace(lines: Iterable[bytes]) -> list[Asked]:
    """Read a recording.

    Raises:
        ConfigError: a line is none of ours, or earlier than the one before; the message has its number and the field.
    """
    trace: list[Asked] = []
    for number, line in enumerate(lines, 1):
        if number > MAX_LINES:
            raise ConfigError(f"more than {MAX_LINES} lines")
        try:
            asked = _DECODER.decode(line)
            parse_id(asked.device, "device")
            parse_id(asked.model, "model")
        except (msgspec.DecodeError, PayloadError, UnicodeDecodeError) as exc:
            raise ConfigError(f"line {number}: {exc}") from exc
        if trace and asked.at_s < trace[-1].at_s:
            raise ConfigError(f"line {number}: at_s: {asked.at_s:g} is before {trace[-1].at_s:g} of the line above")
        trace.append(asked)
    if not trace:
        raise ConfigError("no requests in it")
    return trace


def of_model(trace: list[Asked], name: str | None) -> list[Asked]:
    """The requests to one model; without a name, to the only one.

    Raises:
        ConfigError: there are several, or none of that name; the message lists them.
    """
    names = sorted({asked.model for asked in trace})
    if name is None and len(names) > 1:
        raise ConfigError(f"requests to {', '.join(names)}: choose one with --name")
    wanted = names[0] if name is None else name
    if wanted not in names:
        raise ConfigError(f"no requests to {wanted}, but to {', '.join(names)}")
    return [asked for asked in trace if asked.model == wanted]


def faster(trace: list[Asked], speed: float) -> list[Asked]:
    """The same requests in less time, or in more."""
    return [msgspec.structs.replace(asked, at_s=asked.at_s / speed) for asked in trace]
