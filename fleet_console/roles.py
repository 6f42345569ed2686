"""Who may do what on the broker: the contract's role table as data, and as Mosquitto's dynamic security plugin has it.

One literal role for each node, because the plugin of Mosquitto 2.0 expands no user names in patterns. Whatever is not
granted is denied: publishing, receiving and subscribing are three separate rights. Everybody has a presence,
which every link publishes and leaves as its will.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from types import MappingProxyType
from typing import Any

from shoal.routes import CLOUD_SITE, Route, topic, topic_filter

# The plugin's own number. Stretching protects short passwords and costs the broker's one thread at every connect: let
# passwords be generated, and long.
_ITERATIONS = 101
CONTROL = "$CONTROL/dynamic-security/v1"
_SALT_BYTES = 12  # the plugin skips clients with any other length


@unique
class Kind(Enum):
    DEVICE = "device"
    GATEWAY = "gateway"
    INGEST = "ingest"
    PUBLISHER = "publisher"
    TRAINER = "trainer"
    CONTROLLER = "controller"
    LABELLER = "labeller"
    VIEWER = "viewer"
    OPERATOR = "operator"
    PROVISIONER = "provisioner"


# People, who have several sessions at a time; everybody else has one, under a client id of its own name.
_PEOPLE = frozenset({Kind.VIEWER, Kind.OPERATOR, Kind.PROVISIONER})


@dataclass(frozen=True, slots=True)
class Node:
    """Who asks for rights.

    Attributes:
        group: the shared subscription of ingest, or of a gateway that serves its whole site.
        devices: a gateway that serves these alone has no group and subscribes to each.
    """

    kind: Kind
    name: str
    site: str = CLOUD_SITE
    group: str = ""
    devices: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Rights:
    """Topics and filters, literally.

    Attributes:
        subscribe: exactly these filters, no narrower and no wider one.
        subscribe_within: these filters and whatever they cover.
    """

    send: Sequence[str] = ()
    receive: Sequence[str] = ()
    subscribe: Sequence[str] = ()
    subscribe_within: Sequence[str] = ()


def _own(route: Route, node: Node) -> str:
    return topic(route, site=node.site, node=node.name)


_TRUST = (topic(Route.TRUST_BUNDLE), topic(Route.TRUST_TIMESTAMP))
_BLOBS = (topic_filter(Route.BLOB),)


def _device(node: Node) -> Rights:
    down = [_own(Route.REPLY, node), _own(Route.COMMAND, node), *_TRUST]
    return Rights(
        send=[_own(route, node) for route in (Route.PRESENCE, Route.STATE, Route.INFER, Route.RESULT)],
        receive=[*down, *_BLOBS],
        subscribe=down,
        subscribe_within=_BLOBS,
    )


def _gateway(node: Node) -> Rights:
    down = [_own(Route.ACK, node), _own(Route.COMMAND, node), *_TRUST]
    if node.devices:
        questions = asked = [topic(Route.INFER, site=node.site, node=device) for device in node.devices]
        replies = [topic(Route.REPLY, site=node.site, node=device) for device in node.devices]
    else:
        questions = [topic_filter(Route.INFER, site=node.site)]
        asked = [topic_filter(Route.INFER, site=node.site, group=node.group)]
        replies = [topic_filter(Route.REPLY, site=node.site)]
    return Rights(
        send=[
            *(_own(route, node) for route in (Route.PRESENCE, Route.STATE, Route.SAMPLE, Route.RESULT)),
            *replies,
        ],
        receive=[*down, *_BLOBS, *questions],
        subscribe=[*down, *asked],
        subscribe_within=_BLOBS,
    )


def _service(
    node: Node,
    *,
    send: Sequence[str] = (),
    receive: Sequence[str] = (),
    subscribe: Sequence[str] = (),
    subscribe_within: Sequence[str] = (),
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
        subscribe_within=subscribe_within,
    )


def _ingest(node: Node) -> Rights:
    samples, states = topic_filter(Route.SAMPLE), topic_filter(Route.STATE)
    return _service(
        node,
        send=[topic_filter(Route.ACK)],
        receive=[samples, states],
        subscribe=[topic_filter(Route.SAMPLE, group=node.group), states],
    )


def _publisher(node: Node) -> Rights:
    return _service(node, send=[*_TRUST, *_BLOBS])


def _controller(node: Node) -> Rights:
    """Watches how nodes fare with a release, and commands them."""
    routes = (Route.PRESENCE, Route.STATE, Route.RESULT, Route.CLOUD_PRESENCE, Route.CLOUD_STATE)
    seen = [topic_filter(route) for route in routes]
    return _service(node, send=[topic_filter(Route.COMMAND)], receive=seen, subscribe=seen)


def _labeller(node: Node) -> Rights:
    """Sees samples, and commands ingest alone."""
    seen = [topic_filter(Route.SAMPLE), topic(Route.RESULT, site=CLOUD_SITE, node="ingest")]
    return _service(node, send=[topic(Route.COMMAND, site=CLOUD_SITE, node="ingest")], receive=seen, subscribe=seen)


def _viewer(node: Node) -> Rights:
    """Sees everything, and writes nothing but its own presence."""
    everything = [topic_filter(route) for route in Route]
    return _service(node, receive=everything, subscribe_within=everything)


def _provisioner(node: Node) -> Rights:
    """Asks the plugin to change who may do what; says that a node that was revoked is gone."""
    gone = [topic_filter(Route.PRESENCE), topic_filter(Route.STATE)]
    answers = [f"{CONTROL}/response"]
    return _service(node, send=[CONTROL, *gone], receive=answers, subscribe=answers)


def _operator(node: Node) -> Rights:
    """Sees everything, commands everybody, writes nothing else."""
    everything = [topic_filter(route) for route in Route]
    return _service(node, send=[topic_filter(Route.COMMAND)], receive=everything, subscribe_within=everything)


ROLES: Mapping[Kind, Callable[[Node], Rights]] = MappingProxyType(
    {
        Kind.DEVICE: _device,
        Kind.GATEWAY: _gateway,
        Kind.INGEST: _ingest,
        Kind.PUBLISHER: _publisher,
        Kind.TRAINER: _service,
        Kind.CONTROLLER: _controller,
        Kind.LABELLER: _labeller,
        Kind.VIEWER: _viewer,
        Kind.OPERATOR: _operator,
        Kind.PROVISIONER: _provisioner,
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
        *(("subscribeLiteral", text) for text in rights.subscribe),
        *(("subscribePattern", text) for text in rights.subscribe_within),
    )
    acls = [{"acltype": kind, "topic": text, "priority": 0, "allow": True} for kind, text in granted]
    return {"rolename": node.name, "acls": acls}


def creation_commands(node: Node) -> list[dict[str, Any]]:
    """Return what the plugin must be told so that a node may come in with a certificate, whatever it knew before."""
    role = security_role(node)
    client = _client(node, None, b"")
    return [
        {"command": "deleteClient", "username": node.name},
        {"command": "deleteRole", "rolename": node.name},
        {"command": "createRole", **role},
        {"command": "createClient", **client},
    ]


def deletion_commands(name: str) -> list[dict[str, Any]]:
    """Return what ends a node's rights, and its connection."""
    return [{"command": "deleteClient", "username": name}, {"command": "deleteRole", "rolename": name}]


def security_config(nodes: Iterable[Node], passwords: Mapping[str, str], salt: Callable[[int], bytes]) -> str:
    """Render a whole `dynamic-security.json`: these nodes, and nothing else allowed.

    Args:
        nodes: each gets a client and a role of its name.
        passwords: by node name; who has none comes in only where the listener takes identities from certificates.
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
        "clients": [_client(node, passwords.get(node.name), salt(_SALT_BYTES)) for node in listed],
        "groups": [],
        "roles": [security_role(node) for node in listed],
    }
    return json.dumps(document, indent=2)


def _client(node: Node, password: str | None, salt: bytes) -> dict[str, Any]:
    client: dict[str, Any] = {"username": node.name, "roles": [{"rolename": node.name}]}
    if node.kind not in _PEOPLE:
        # Nobody takes another's session.
        client["clientid"] = node.name
    if password is not None:
        hashed = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
        client["password"] = base64.b64encode(hashed).decode()
        client["salt"] = base64.b64encode(salt).decode()
        client["iterations"] = _ITERATIONS
    return client
