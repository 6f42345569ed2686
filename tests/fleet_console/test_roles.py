"""The role table against the real plugin: what each role may do, and what it may not."""

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from fleet_console.broker import BrokerKind, find_mosquitto, start_broker
from fleet_console.roles import Kind, Node, rights_of, security_config
from shoal.routes import Route, topic, topic_filter

_SITE = "plant"
_GROUP = "gw-0123456789ab"
_NOT_AUTHORIZED = 0x87
_NODES = [
    Node(Kind.DEVICE, "cam-1", _SITE),
    Node(Kind.DEVICE, "cam-2", _SITE),
    Node(Kind.GATEWAY, "gw-1", _SITE, _GROUP),
    Node(Kind.INGEST, "ingest", group="ingest"),
    Node(Kind.PUBLISHER, "publisher"),
    Node(Kind.TRAINER, "trainer"),
    Node(Kind.LABELLER, "labeller"),
    Node(Kind.OPERATOR, "alice"),
]
_PASSWORDS = {node.name: f"secret of {node.name}" for node in _NODES}


def _plugin():
    return next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"), None)


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """Mosquitto with the plugin and this table's roles."""
    plugin = _plugin()
    if find_mosquitto() is None or plugin is None:
        pytest.skip("left out: permissions need Mosquitto with its dynamic security plugin")
    folder = tmp_path_factory.mktemp("secured")
    security = folder / "dynamic-security.json"
    security.write_text(security_config(_NODES, _PASSWORDS, secrets.token_bytes))
    extra = f"allow_anonymous false\nplugin {plugin}\nplugin_opt_config_file {security}\n"
    with start_broker(folder, BrokerKind.MOSQUITTO, extra_config=extra) as broker:
        yield broker


@dataclass
class Peer:
    """A client as one node, driven by hand; every answer is waited for, nothing is slept for."""

    client: Client
    answers: dict = field(default_factory=dict)
    received: list = field(default_factory=list)
    connected: list = field(default_factory=list)

    def wait(self, ready):
        for _ in range(200):
            if ready():
                return
            self.client.loop(0.05)
        pytest.fail("the broker did not answer in 10 s")

    def publish(self, text, *, retain=False, payload=b"x"):
        info = self.client.publish(text, payload, qos=1, retain=retain)
        self.wait(lambda: info.mid in self.answers)
        return self.answers[info.mid] < 0x80

    def subscribe(self, text):
        _, mid = self.client.subscribe(text, qos=1)
        self.wait(lambda: mid in self.answers)
        return self.answers[mid] < 0x80


@pytest.fixture
def join(secured):
    """Connect as a node; will and password may be given."""
    peers = []

    def connect(name, *, will=None, password=None):
        client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTv5)
        client.username_pw_set(name, password or _PASSWORDS[name])
        peer = Peer(client)
        client.on_connect = lambda _c, _u, _f, reason, _p: peer.connected.append(reason)
        client.on_publish = lambda _c, _u, mid, reason, _p: peer.answers.__setitem__(mid, reason.value)
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: peer.answers.__setitem__(mid, reasons[0].value)
        client.on_message = lambda _c, _u, message: peer.received.append((message.topic, message.payload))
        if will is not None:
            client.will_set(will, b"gone", qos=1, retain=True)
        client.connect("127.0.0.1", secured.port)
        peer.wait(lambda: peer.connected)
        peers.append(peer)
        return peer

    yield connect
    for peer in peers:
        peer.client.disconnect()
        peer.client.reinitialise()  # closes what paho otherwise leaves to the garbage collector


@pytest.mark.parametrize("node", _NODES, ids=lambda node: node.name)
def test_every_granted_right_works(join, node):
    """A role that lacks a right would stop a fleet."""
    peer, rights = join(node.name), rights_of(node)
    for text in rights.send:
        assert peer.publish(text.replace("+", "0" * 64)), f"{node.name} may not send {text}"
    for text in rights.subscribe:
        exact = text.replace("+", "0" * 64) if text == topic_filter(Route.BLOB) else text
        assert peer.subscribe(exact), f"{node.name} may not subscribe to {text}"


@pytest.mark.parametrize("route", [Route.INFER, Route.PRESENCE, Route.STATE, Route.RESULT])
@pytest.mark.parametrize("retain", [False, True])
def test_device_cannot_speak_as_another(join, route, retain):
    """Telemetry and retained state are tied to their owner."""
    assert not join("cam-1").publish(topic(route, site=_SITE, node="cam-2"), retain=retain)


def test_device_cannot_leave_a_will_as_another(join, secured):
    """A will is published by the broker, and checked all the same."""
    operator = join("alice")
    assert operator.subscribe(topic_filter(Route.PRESENCE))
    forger = join("cam-1", will=topic(Route.PRESENCE, site=_SITE, node="cam-2"))
    forger.client.socket().close()  # no DISCONNECT: the broker publishes the will, if it may
    marker = topic(Route.PRESENCE, site=_SITE, node="cam-2")
    assert join("cam-2").publish(marker, payload=b"marker")
    operator.wait(lambda: (marker, b"marker") in operator.received)
    assert (marker, b"gone") not in operator.received


@pytest.mark.parametrize("route", [Route.REPLY, Route.COMMAND])
@pytest.mark.parametrize("node", ["cam-2", None])
def test_device_cannot_read_what_is_for_others(join, route, node):
    """Neither another's topic nor all of them by wildcard."""
    text = topic_filter(route, site=_SITE, **({"node": node} if node else {}))
    assert not join("cam-1").subscribe(text)


def test_device_cannot_join_a_shared_subscription(join):
    """Whoever joins swallows other devices' messages."""
    device = join("cam-1")
    assert not device.subscribe(topic_filter(Route.SAMPLE, group="ingest"))
    assert not device.subscribe(topic_filter(Route.INFER, group=_GROUP, site=_SITE))


@pytest.mark.parametrize("name", ["cam-1", "gw-1", "trainer", "ingest", "alice"])
def test_only_the_publisher_writes_models_and_trust(join, name):
    """One writer."""
    peer = join(name)
    assert not peer.publish(topic(Route.BLOB, sha256="0" * 64), retain=True)
    assert not peer.publish(topic(Route.TRUST_BUNDLE), retain=True)
    assert not peer.publish(topic(Route.TRUST_TIMESTAMP), retain=True)


def test_gateway_has_its_own_group_and_site_alone(join):
    """Another group, the plain filter and another site's replies are refused."""
    gateway = join("gw-1")
    assert not gateway.subscribe(topic_filter(Route.INFER, group="gw-ffffffffffff", site=_SITE))
    assert not gateway.subscribe(topic_filter(Route.INFER, site=_SITE))
    assert not gateway.publish(topic(Route.REPLY, site="elsewhere", node="cam-1"))


def test_gateway_cannot_command_or_acknowledge_for_the_cloud(join):
    """What only the cloud may say."""
    gateway = join("gw-1")
    assert not gateway.publish(topic(Route.COMMAND, site=_SITE, node="cam-1"))
    assert not gateway.publish(topic(Route.ACK, site=_SITE, node="gw-1"))


def test_device_cannot_command(join):
    """Nor label samples, which is a command to ingest."""
    device = join("cam-1")
    assert not device.publish(topic(Route.COMMAND, site=_SITE, node="cam-2"))
    assert not device.publish(topic(Route.COMMAND, site="cloud", node="ingest"))


def test_wrong_password_is_out(join):
    """The table's hashes are what the plugin checks."""
    peer = join("cam-1", password="guess")
    assert peer.connected[0].is_failure
    assert peer.connected[0].value == _NOT_AUTHORIZED


def test_one_role_for_each_node():
    """The rendered file names every node once, and denies by default."""
    document = json.loads(security_config(_NODES, _PASSWORDS, secrets.token_bytes))
    assert [role["rolename"] for role in document["roles"]] == [node.name for node in _NODES]
    assert not any(
        document["defaultACLAccess"][kind] for kind in ("publishClientSend", "publishClientReceive", "subscribe")
    )
