"""Who may do what on the broker: the contract's role table as data, and as Mosquitto's dynamic security plugin has it.

One literal role for each node, because the plugin of Mosquitto 2.0 expands no user names in patterns. Whatever is not
granted is denied: publishing, receiving and subscribing are three separate rights.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from types import MappingProxyType
from typing import Any

from shoal.routes import CLOUD_SITE, Route, topic, topic_filter

_ITERATIONS = 101
_SALT_BYTES = 12


@unique
class Kind(Enum):
    DEVICE = "device"
    GATEWAY = "gateway"
    INGEST = "ingest"
    PUBLISHER = "publisher"
    TRAINER = "trainer"
    LABELLER = "labeller"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Node:
    """Who asks for rights; `group` is the shared subscription of a gateway or of ingest."""

    kind: Kind
    name: str
    site: str = CLOUD_SITE
    group: str = ""


@dataclass(frozen=True, slots=True)
class Rights:
    """Topics and filters, literally. To receive is a right of its own: it also guards wills and retained messages."""

    send: Sequence[str] = ()
    receive: Sequence[str] = ()
    subscribe: Sequence[str] = field(default=())


def _own(route: Route, node: Node) -> str:
    return topic(route, site=node.site, node=node.name)


# Models and trust: every node may read all of it, and must name each blob exactly (a wildcard loses messages).
_MODELS = (topic_filter(Route.TRUST_BUNDLE), topic_filter(Route.TRUST_TIMESTAMP), topic_filter(Route.BLOB))


def _device(node: Node) -> Rights:
    down = [_own(Route.REPLY, node), _own(Route.COMMAND, node), *_MODELS]
    return Rights(
        send=[_own(route, node) for route in (Route.PRESENCE, Route.STATE, Route.INFER, Route.RESULT)],
        receive=down,
        subscribe=down,
    )


def _gateway(node: Node) -> Rights:
    down = [_own(Route.ACK, node), _own(Route.COMMAND, node), *_MODELS]
    questions = topic_filter(Route.INFER, site=node.site)
    return Rights(
        send=[
            *(_own(route, node) for route in (Route.PRESENCE, Route.STATE, Route.SAMPLE, Route.RESULT)),
            topic_filter(Route.REPLY, site=node.site),
        ],
        receive=[*down, questions],
        subscribe=[*down, topic_filter(Route.INFER, site=node.site, group=node.group)],
    )


def _service(
    node: Node, *, send: Sequence[str] = (), receive: Sequence[str] = (), subscribe: Sequence[str] = ()
) -> Rights:
    """What every cloud service has: its presence and state, and commands as a node of the site `cloud`."""
    command = topic(Route.COMMAND, site=CLOUD_SITE, node=node.name)
    return Rights(
        send=[
            topic(Route.CLOUD_PRESENCE, service=node.name),
            topic(Route.CLOUD_STATE, service=node.name),
            topic(Route.RESULT, site=CLOUD_SITE, node=node.name),
            *send,
        ],
        receive=[command, *receive],
        subscribe=[command, *subscribe],
    )


def _ingest(node: Node) -> Rights:
    samples = topic_filter(Route.SAMPLE)
    return _service(
        node,
        send=[topic_filter(Route.ACK)],
        receive=[samples],
        subscribe=[topic_filter(Route.SAMPLE, group=node.group)],
    )


def _publisher(node: Node) -> Rights:
    return _service(node, send=list(_MODELS))


def _labeller(node: Node) -> Rights:
    """Sees samples, and commands ingest alone."""
    seen = [topic_filter(Route.SAMPLE), topic(Route.RESULT, site=CLOUD_SITE, node="ingest")]
    return _service(node, send=[topic(Route.COMMAND, site=CLOUD_SITE, node="ingest")], receive=seen, subscribe=seen)


def _operator(node: Node) -> Rights:
    """Sees everything, commands everybody, writes nothing else."""
    everything = [topic_filter(route) for route in Route]
    return _service(node, send=[topic_filter(Route.COMMAND)], receive=everything, subscribe=everything)


ROLES: Mapping[Kind, Callable[[Node], Rights]] = MappingProxyType(
    {
        Kind.DEVICE: _device,
        Kind.GATEWAY: _gateway,
        Kind.INGEST: _ingest,
        Kind.PUBLISHER: _publisher,
        Kind.TRAINER: _service,
        Kind.LABELLER: _labeller,
        Kind.OPERATOR: _operator,
    }
)


def rights_of(node: Node) -> Rights:
    return ROLES[node.kind](node)


def security_role(node: Node) -> dict[str, Any]:
    """Render a node's role for the plugin."""
    rights = rights_of(node)
    granted = (
        *(("publishClientSend", text) for text in rights.send),
        *(("publishClientReceive", text) for text in rights.receive),
        # Literal even where the filter has wildcards: exactly this filter, no narrower and no wider one. Only blobs are
        # subscribed by exact topic, under a pattern.
        *((_subscription(text), text) for text in rights.subscribe),
    )
    acls = [{"acltype": kind, "topic": text, "priority": 0, "allow": True} for kind, text in granted]
    return {"rolename": node.name, "acls": acls}


def security_config(nodes: Iterable[Node], passwords: Mapping[str, str], salt: Callable[[int], bytes]) -> str:
    """Render a whole `dynamic-security.json`: these nodes, and nothing else allowed.

    Args:
        nodes: each gets a client and a role of its name.
        passwords: by node name; certificates replace them where the listener takes identities from those.
        salt: returns that many random bytes.
    """
    listed = list(nodes)
    document = {
        "defaultACLAccess": {
            "publishClientSend": False,
            "publishClientReceive": False,
            "subscribe": False,
            "unsubscribe": True,
        },
        "clients": [_client(node, passwords[node.name], salt(_SALT_BYTES)) for node in listed],
        "groups": [],
        "roles": [security_role(node) for node in listed],
    }
    return json.dumps(document, indent=2)


def _subscription(text: str) -> str:
    return "subscribePattern" if text == topic_filter(Route.BLOB) else "subscribeLiteral"


def _client(node: Node, password: str, salt: bytes) -> dict[str, Any]:
    hashed = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    return {
        "username": node.name,
        "clientid": node.name,
        "roles": [{"rolename": node.name}],
        "password": base64.b64encode(hashed).decode(),
        "salt": base64.b64encode(salt).decode(),
        "iterations": _ITERATIONS,
    }
