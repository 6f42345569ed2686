"""The role table against the real plugin: what each role may do, and what it may not."""

import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from fleet_console.broker import BrokerKind, find_mosquitto, start_broker
from fleet_console.roles import ROLES, Kind, Node, rights_of, security_config
from shoal.routes import CLOUD_SITE, Route, topic, topic_filter
from tests.fleet_console.rights import BY_NAME, DIGEST, GROUP, MAY_READ, MAY_WRITE, NODES, SITE, topics_of

_NOT_AUTHORIZED = 0x87
_PATIENCE_S = 10.0
_PASSWORDS = {node.name: f"secret of {node.name}" for node in NODES}
# Beside the table: one that may publish anything, one that may subscribe and not receive, one without a password.
_ROOT, _DEAF, _CERTIFIED = (Node(Kind.TRAINER, name) for name in ("root", "deaf", "certified"))
_PASSWORDS |= {"root": "secret of root", "deaf": "secret of deaf"}


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """Mosquitto with the plugin and this table's roles."""
    plugin = next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"), None)
    if find_mosquitto() is None or plugin is None:
        pytest.skip("left out: permissions need Mosquitto with its dynamic security plugin")
    folder = tmp_path_factory.mktemp("secured")
    document = json.loads(security_config([*NODES, _ROOT, _DEAF, _CERTIFIED], _PASSWORDS, secrets.token_bytes))
    acls = {role["rolename"]: role["acls"] for role in document["roles"]}
    acls["root"].append({"acltype": "publishClientSend", "topic": "#", "allow": True})
    acls["deaf"].append({"acltype": "subscribeLiteral", "topic": topic_filter(Route.STATE), "allow": True})
    security = folder / "dynamic-security.json"
    security.write_text(json.dumps(document))
    extra = f"allow_anonymous false\nplugin {plugin}\nplugin_opt_config_file {security}\n"
    with start_broker(folder, BrokerKind.MOSQUITTO, extra_config=extra) as broker:
        yield broker


@dataclass
class Peer:
    """A client as one node, driven by hand; every answer is waited for, nothing is slept for."""

    client: Client
    answers: dict = field(default_factory=dict)
    received: list = field(default_factory=list)
    payloads: list = field(default_factory=list)
    connected: list = field(default_factory=list)

    def wait(self, ready):
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            assert time.monotonic() < deadline, "the broker did not answer"
            self.client.loop(0.05)

    def publish(self, text, *, retain=False, payload=b"x"):
        info = self.client.publish(text, payload, qos=1, retain=retain)
        return self._granted(info.mid)

    def subscribe(self, text):
        _, mid = self.client.subscribe(text, qos=1)
        return self._granted(mid)

    def _granted(self, mid):
        self.wait(lambda: mid in self.answers)
        answer = self.answers[mid]
        assert answer < 0x80 or answer == _NOT_AUTHORIZED
        return answer < 0x80

    def take(self, message):
        self.received.append(message.topic)
        self.payloads.append(message.payload)

    def drop(self):
        """Break the connection without a DISCONNECT: the will is due."""
        self.client.socket().close()

    def refused(self):
        return self.connected[0].value == _NOT_AUTHORIZED


@pytest.fixture
def join(secured):
    """Connect as a node; password, client id and will may be given."""
    peers = []

    def connect(name, *, password=None, client_id=None, will=None):
        client = Client(CallbackAPIVersion.VERSION2, client_id or name, protocol=MQTTv5)
        client.username_pw_set(name, password or _PASSWORDS[name])
        peer = Peer(client)
        client.on_connect = lambda _c, _u, _f, reason, _p: peer.connected.append(reason)
        client.on_publish = lambda _c, _u, mid, reason, _p: peer.answers.__setitem__(mid, reason.value)
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: peer.answers.__setitem__(mid, reasons[0].value)
        client.on_message = lambda _c, _u, message: peer.take(message)
        if will is not None:
            client.will_set(*will, qos=1)
        client.connect("127.0.0.1", secured.port)
        peers.append(peer)
        peer.wait(lambda: peer.connected)
        return peer

    yield connect
    for peer in peers:
        peer.client.disconnect()
        peer.client.reinitialise()  # closes what paho otherwise leaves to the garbage collector


@pytest.mark.parametrize("name", MAY_WRITE)
def test_role_writes_what_the_contract_says_and_nothing_else(join, name):
    """A right too few stops a fleet; one too many lets a stolen node speak as another."""
    peer = join(name)
    written = {label for text, label in topics_of(BY_NAME[name]).items() if peer.publish(text)}
    assert written == set(MAY_WRITE[name].split())


@pytest.mark.parametrize("name", MAY_READ)
def test_role_reads_what_the_contract_says_and_nothing_else(join, name):
    """It asks for everything there is, then for what it was granted, and hears only the latter."""
    node, peer, root = BY_NAME[name], join(name), join("root")
    topics = topics_of(node)
    for text in topics:
        peer.subscribe(text)
    for text in rights_of(node).subscribe:
        assert peer.subscribe(text), f"{name} may not subscribe to {text}"
    marker = topic(Route.COMMAND, site=node.site, node=name)
    for text in [*(text for text in topics if text != marker), marker]:
        assert root.publish(text)
    peer.wait(lambda: marker in peer.received)
    assert {topics[text] for text in peer.received} == set(MAY_READ[name].split())


@pytest.mark.parametrize("name", ["alice", "vera"])
def test_people_see_everything(join, name):
    """By the widest filter of a route and by any narrower one; but for a filter over all routes at once."""
    node, operator, root = BY_NAME[name], join(name), join("root")
    assert all(operator.subscribe(topic_filter(route)) for route in Route)
    for text in topics_of(node):
        assert root.publish(text)
    operator.wait(lambda: set(operator.received) >= set(topics_of(node)))
    assert operator.subscribe(topic_filter(Route.STATE, site=SITE))
    assert operator.subscribe(topic(Route.BLOB, sha256=DIGEST))
    assert not operator.subscribe("#")


def test_every_kind_is_tried():
    """A role that is added is added to the contract's tables here."""
    assert {BY_NAME[name].kind for name in MAY_WRITE} == set(ROLES) == set(Kind)
    assert {BY_NAME[name].kind for name in MAY_READ} == set(Kind) - {Kind.OPERATOR, Kind.VIEWER}


@pytest.mark.parametrize("route", [Route.INFER, Route.PRESENCE, Route.STATE, Route.RESULT])
def test_device_cannot_leave_retained_messages_as_another(join, route):
    """Whoever comes later would believe them."""
    assert not join("cam-1").publish(topic(route, site=SITE, node="cam-2"), retain=True)


def test_device_cannot_leave_a_will_as_another(join):
    """The broker takes any will and publishes only those that their owner might: the later one comes alone."""
    operator = join("alice")
    presence = topic(Route.PRESENCE, site=SITE, node="cam-2")
    assert operator.subscribe(presence)
    join("cam-1", will=(presence, b"forged")).drop()
    join("cam-2", will=(presence, b"own")).drop()
    operator.wait(lambda: b"own" in operator.payloads)
    assert b"forged" not in operator.payloads


@pytest.mark.parametrize("route", [Route.REPLY, Route.COMMAND, Route.ACK])
@pytest.mark.parametrize("name", ["cam-1", "gw-1"])
def test_node_cannot_read_all_by_wildcard(join, route, name):
    """Its own topic is within the filter, the others' are too."""
    peer = join(name)
    assert not peer.subscribe(topic_filter(route, site=SITE))
    assert not peer.subscribe(topic_filter(route))
    assert not peer.subscribe("#")


def test_device_cannot_join_a_shared_subscription(join):
    """Whoever joins swallows other devices' messages; not even its own topics are shared."""
    device = join("cam-1")
    assert not device.subscribe(topic_filter(Route.SAMPLE, group="ingest"))
    assert not device.subscribe(topic_filter(Route.INFER, group=GROUP, site=SITE))
    assert not device.subscribe(topic_filter(Route.REPLY, group=GROUP, site=SITE, node="cam-1"))


def test_gateway_has_its_own_group_alone(join):
    """Neither another group nor other filters in it, nor the plain one; with listed devices there is no group."""
    gateway = join("gw-1")
    assert gateway.subscribe(topic_filter(Route.INFER, group=GROUP, site=SITE))
    assert not gateway.subscribe(topic_filter(Route.INFER, group="gw-ffffffffffff", site=SITE))
    assert not gateway.subscribe(topic_filter(Route.INFER, group=GROUP))
    assert not gateway.subscribe(topic_filter(Route.INFER, group=GROUP, site=SITE, node="cam-1"))
    assert not gateway.subscribe(topic_filter(Route.INFER, site=SITE))
    assert not join("gw-2").subscribe(topic_filter(Route.INFER, group=GROUP, site=SITE))


def test_who_may_subscribe_but_not_receive_hears_nothing(join):
    """The right to receive stands by itself: the marker comes, what was sent before it does not."""
    deaf, root = join("deaf"), join("root")
    marker = topic(Route.COMMAND, site=CLOUD_SITE, node="deaf")
    assert deaf.subscribe(topic_filter(Route.STATE))
    assert deaf.subscribe(marker)
    assert root.publish(topic(Route.STATE, site=SITE, node="cam-1"))
    assert root.publish(marker)
    deaf.wait(lambda: deaf.received)
    assert deaf.received == [marker]


def test_wrong_password_is_out(join):
    """The rendered hashes are what the plugin checks; who has none is not let in by any."""
    assert join("cam-1", password="guess").refused()
    assert join("certified", password="guess").refused()


def test_node_cannot_take_another_session(join):
    """Its queue would be lost; only operators choose their client id, and have several at a time."""
    assert join("cam-1", client_id="cam-2").refused()
    assert not join("alice", client_id="alice-laptop").refused()
    assert not join("alice", client_id="alice-phone").refused()
