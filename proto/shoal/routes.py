"""The topic contract: one table maps each kind of message to its topic, payload, QoS and retain flag.

Nothing else in Shoal spells a topic. Invariants, checked when the table is read by the tests:
state is retained and commands never are; no topic has more than seven slashes (AWS IoT Core's limit).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, unique
from functools import lru_cache
from types import MappingProxyType

from google.protobuf.message import Message

from shoal.errors import PayloadError
from shoal.ids import parse_id
from shoal.v1.command_pb2 import Command, CommandResult
from shoal.v1.inference_pb2 import InferenceReply, InferenceRequest
from shoal.v1.node_pb2 import NodeState, Presence
from shoal.v1.release_pb2 import TrustBundle
from shoal.v1.sample_pb2 import SampleAck, SampleBatch

MAX_SLASHES = 7


@unique
class Route(StrEnum):
    PRESENCE = "presence"
    STATE = "state"
    INFER = "infer"
    REPLY = "reply"
    SAMPLE = "sample"
    ACK = "ack"
    COMMAND = "command"
    RESULT = "result"
    CLOUD_PRESENCE = "cloud_presence"
    CLOUD_STATE = "cloud_state"
    TRUST_BUNDLE = "trust_bundle"
    TRUST_TIMESTAMP = "trust_timestamp"
    BLOB = "blob"


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """How one kind of message travels. `message` is None where the payload is opaque bytes."""

    template: str
    message: type[Message] | None
    qos: int
    retain: bool


ROUTES: Mapping[Route, RouteSpec] = MappingProxyType(
    {
        Route.PRESENCE: RouteSpec("shoal/v1/up/{site}/{node}/presence", Presence, 1, retain=True),
        Route.STATE: RouteSpec("shoal/v1/up/{site}/{node}/state", NodeState, 1, retain=True),
        Route.INFER: RouteSpec("shoal/v1/up/{site}/{node}/infer", InferenceRequest, 1, retain=False),
        Route.REPLY: RouteSpec("shoal/v1/down/{site}/{node}/reply", InferenceReply, 1, retain=False),
        Route.SAMPLE: RouteSpec("shoal/v1/up/{site}/{node}/sample", SampleBatch, 1, retain=False),
        Route.ACK: RouteSpec("shoal/v1/down/{site}/{node}/ack", SampleAck, 1, retain=False),
        Route.COMMAND: RouteSpec("shoal/v1/down/{site}/{node}/command", Command, 1, retain=False),
        Route.RESULT: RouteSpec("shoal/v1/up/{site}/{node}/result", CommandResult, 1, retain=False),
        Route.CLOUD_PRESENCE: RouteSpec("shoal/v1/cloud/{service}/presence", Presence, 1, retain=True),
        Route.CLOUD_STATE: RouteSpec("shoal/v1/cloud/{service}/state", NodeState, 1, retain=True),
        Route.TRUST_BUNDLE: RouteSpec("shoal/v1/trust/bundle", TrustBundle, 1, retain=True),
        Route.TRUST_TIMESTAMP: RouteSpec("shoal/v1/trust/timestamp", None, 1, retain=True),
        Route.BLOB: RouteSpec("shoal/v1/blob/{sha256}", None, 1, retain=True),
    }
)

# The site that cloud services belong to where they act as nodes: they take commands and answer with results.
CLOUD_SITE = "cloud"

_REMEMBERED = 4096
_SEGMENT = re.compile(r"\{(\w+)\}")
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Address:
    """A topic, taken apart. Segments that the route lacks are empty."""

    route: Route
    site: str = ""
    node: str = ""
    service: str = ""
    sha256: str = ""


# Read once: topics are spelled for every message.
_NAMES = {route: tuple(_SEGMENT.findall(spec.template)) for route, spec in ROUTES.items()}


def _checked(name: str, value: str) -> str:
    if name == "sha256":
        if not _SHA256_HEX.fullmatch(value):
            raise PayloadError(f"{value!r} is not a lower-case hexadecimal SHA-256", field="topic.sha256")
        return value
    return parse_id(value, f"topic.{name}")


# Pure, and asked for every message; bounded, because senders choose what is remembered.
@lru_cache(maxsize=_REMEMBERED)
def topic(route: Route, **segments: str) -> str:
    """Return the one topic of `route` with these segments.

    Raises:
        KeyError: a segment of the route is missing.
        PayloadError: a segment is not a valid id.
    """
    return ROUTES[route].template.format(**{name: _checked(name, segments[name]) for name in _NAMES[route]})


@lru_cache(maxsize=_REMEMBERED)
def topic_bytes(route: Route, **segments: str) -> bytes:
    """`topic`, as it travels."""
    return topic(route, **segments).encode()


def topic_filter(route: Route, *, group: str | None = None, **segments: str) -> str:
    """Return the filter for `route` where segments not given are `+`, in shared `group` if one is named."""
    chosen = {name: _checked(name, segments[name]) if name in segments else "+" for name in _NAMES[route]}
    plain = ROUTES[route].template.format(**chosen)
    return plain if group is None else f"$share/{parse_id(group, 'group')}/{plain}"


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(_SEGMENT.sub(r"(?P<\1>[^/]+)", template))


_PATTERNS = tuple((route, _pattern(spec.template)) for route, spec in ROUTES.items())


@lru_cache(maxsize=_REMEMBERED)
def parse_topic(text: str) -> Address:
    """Take a topic apart.

    Raises:
        PayloadError: it is not one of ours, or a segment is not a valid id.
    """
    for route, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            return Address(route, **{name: _checked(name, value) for name, value in match.groupdict().items()})
    raise PayloadError(f"{text!r} is no topic of the contract", field="topic")


def serving_group(models: Sequence[str], devices: Sequence[str]) -> str:
    """The shared group of all gateways that serve the same: equal members may answer for each other."""
    served = "\n".join([*sorted(models), "", *sorted(devices)])
    return f"gw-{hashlib.sha256(served.encode()).hexdigest()[:12]}"
