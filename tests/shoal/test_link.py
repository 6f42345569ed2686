"""The link against a real broker."""

import random
import socket
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from shoal.commands import CommandDesk
from shoal.errors import ConfigError, LinkError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.routes import Route, topic_filter
from shoal.state import MAX_INTERVAL_S, Report, StateReporter
from shoal.v1 import command_pb2 as pb
from shoal.v1.inference_pb2 import InferenceReply, InferenceRequest
from shoal.v1.node_pb2 import NodeState, Presence

pytestmark = pytest.mark.device

_PATIENCE_S = 10.0


class Net:
    """Links on one loop; `until` fails the test when the condition does not come."""

    def __init__(self, url, site):
        self.loop = Loop()
        self.url = url
        self.site = site
        self.links = []

    def link(self, node, *, session_expiry_s=0, url=None, **settings):
        config = replace(
            parse_broker_url(url or self.url, session_expiry_s=session_expiry_s), backoff_max_s=0.05, **settings
        )
        link = Link(config, node_identity(self.site, node, "device"), rng=random.Random(1))
        self.links.append(link)
        return link

    def join(self, node, **settings):
        link = self.link(node, **settings)
        link.attach(self.loop)
        self.until(lambda: link.connected and link.is_idle)
        return link

    def until(self, ready):
        deadline = self.loop.clock() + _PATIENCE_S
        stop = self.loop.call_at(deadline, lambda _now: None)
        self.loop.run(until=lambda: ready() or self.loop.clock() >= deadline)
        stop.cancel()
        assert ready(), "it did not come in time"

    def ask(self, link, model="digits", **options):
        return link.publish(
            Route.INFER,
            InferenceRequest(device="x", model=model),
            site=self.site,
            node=link.identity.client_id,
            **options,
        )


@pytest.fixture
def net(broker, request):
    """Every test has a site of its own."""
    made = Net(broker.url, f"t{abs(hash(request.node.nodeid)) % 10**12}")
    yield made
    for link in made.links:
        link.close()
    made.loop.close()


def cut(link):
    """The line is gone: no DISCONNECT."""
    link._client.socket().shutdown(socket.SHUT_RDWR)


def test_birth_and_goodbye_bear_the_same_session(net):
    """Presence is retained: who comes later knows too."""
    device = net.join("cam")
    heard = []
    watcher = net.link("watcher")
    watcher.subscribe(Route.PRESENCE, heard.append, site=net.site, node="cam")
    watcher.attach(net.loop)
    net.until(lambda: heard)
    assert (heard[0].retained, heard[0].message.online) == (True, True)
    device.close()
    net.until(lambda: len(heard) == 2)
    assert isinstance(heard[1].message, Presence)
    assert not heard[1].message.online
    assert heard[0].message.session == heard[1].message.session


def test_goodbye_with_a_full_mailbox_is_still_a_goodbye(net):
    """What the broker has just sent lies unread: closing on it must not reset the line and so set off the will."""
    heard = []
    watcher = net.link("watcher")
    watcher.subscribe(Route.PRESENCE, lambda delivery: heard.append(delivery.message.online), site=net.site, node="cam")
    watcher.attach(net.loop)
    net.until(lambda: watcher.is_subscribed)
    for number in range(10):
        device = net.link("cam")
        device.subscribe(Route.REPLY, lambda _: None, site=net.site, node="cam")
        device.attach(net.loop)
        net.until(lambda device=device: device.is_subscribed and device.is_idle)
        net.until(lambda number=number: len(heard) == 2 * number + 1)
        net.loop.unwatch(device._client.socket())
        device._loop = None  # nothing is registered, and nothing must be any more
        for _ in range(20):
            assert watcher.publish(Route.REPLY, InferenceReply(), site=net.site, node="cam")
        net.until(lambda: watcher.is_idle)
        device.close()
        net.until(lambda number=number: len(heard) >= 2 * number + 2)
    assert watcher.publish(Route.STATE, NodeState(), site=net.site, node="watcher")
    net.until(lambda: watcher.is_idle)  # what the broker had to say before is here too
    assert heard == [True, False] * 10


def test_will_says_that_a_node_is_gone_without_goodbye(net):
    """And bears the session that it belongs to, not the next one's."""
    heard = []
    watcher = net.join("watcher")
    watcher.subscribe(Route.PRESENCE, lambda delivery: heard.append(delivery.message), site=net.site, node="cam")
    device = net.join("cam")
    net.until(lambda: heard)
    cut(device)
    net.until(lambda: len(heard) >= 3)
    by_session = {}
    for presence in heard:
        by_session.setdefault(presence.session, []).append(presence.online)
    assert sorted(by_session.values()) == [[True], [True, False]]


def test_cut_connection_comes_back_with_its_subscriptions(net):
    """Nobody has to ask for them again."""
    got = []
    gateway = net.join("gw")
    gateway.subscribe(Route.INFER, got.append, site=net.site)
    device = net.join("cam")
    cut(gateway)
    net.until(lambda: gateway.counters["connects"] == 2 and gateway.connected)
    net.until(lambda: net.ask(device) and bool(got)) if not got else None
    assert got[0].message.model == "digits"


def test_disconnected_link_takes_nothing(net):
    """The caller keeps its data."""
    link = net.link("cam")
    assert not net.ask(link)
    assert link.room() == 0


def test_lost_connection_fails_what_was_under_way(net):
    """Nothing is silently sent again."""
    device = net.join("cam")
    outcomes = []
    assert net.ask(device, on_done=outcomes.append)
    cut(device)
    net.until(lambda: outcomes)
    assert isinstance(outcomes[0], LinkError)
    assert not outcomes[0].permanent


def test_window_bounds_what_is_under_way(net):
    """PUBACKs make room again."""
    device = net.join("cam", max_inflight=3)
    assert [net.ask(device) for _ in range(5)] == [True, True, True, False, False]
    net.until(lambda: device.room() == 3)
    assert device.is_idle


def test_unacknowledged_message_is_delivered_again(mosquitto, net):
    """Late acknowledgement is what a crash does not lose questions by; the embedded broker keeps no sessions."""
    net.url = mosquitto.url
    got = []
    gateway = net.join("gw", session_expiry_s=60)
    gateway.subscribe(Route.INFER, got.append, ack_late=True, site=net.site)
    device = net.join("cam")
    net.until(lambda: net.ask(device) and bool(got)) if not got else None
    first = got[0]
    cut(gateway)
    seen = len(got)
    net.until(lambda: len(got) > seen)
    assert got[-1].message == first.message


def test_acknowledgement_for_a_connection_that_is_gone_goes_nowhere(mosquitto, net):
    """The next connection's delivery stays owed until it is acknowledged itself."""
    net.url = mosquitto.url
    got = []
    gateway = net.join("gw", session_expiry_s=60)
    gateway.subscribe(Route.INFER, got.append, ack_late=True, site=net.site, node="cam")
    net.until(lambda: gateway.is_subscribed)
    assert net.ask(net.join("cam"))
    net.until(lambda: len(got) == 1)
    cut(gateway)
    net.until(lambda: len(got) == 2)
    got[0].ack()
    assert net.ask(gateway)  # its PUBACK shows that the broker has read what was sent before
    net.until(lambda: gateway.is_idle)
    cut(gateway)
    net.until(lambda: len(got) == 3)
    got[2].ack()
    assert net.ask(gateway)
    net.until(lambda: gateway.is_idle)
    cut(gateway)
    net.until(lambda: gateway.counters["connects"] == 4 and gateway.is_idle and gateway.is_subscribed)
    assert len(got) == 3


def test_wrong_message_for_a_route_is_our_own_mistake(net):
    """ValueError, never on the wire."""
    device = net.join("cam")
    with pytest.raises(ValueError, match="carries"):
        device.publish(Route.INFER, InferenceReply(), site=net.site, node="cam")
    with pytest.raises(ValueError, match="retained"):
        device.subscribe(Route.STATE, print, group="g")


def test_messages_carry_schema_correlation_and_type(net):
    """What any MQTT 5 tool can show."""
    raw = []
    any_tool = Client(CallbackAPIVersion.VERSION2, "tool", protocol=MQTTv5)
    any_tool.on_connect = lambda client, *_: client.subscribe(topic_filter(Route.INFER, site=net.site))
    any_tool.on_subscribe = lambda *_: net.loop.call_soon(lambda: raw.append(None))
    any_tool.on_message = lambda _c, _u, packet: raw.append(packet)
    port = urlsplit(net.url).port
    any_tool.connect("127.0.0.1", port)
    net.loop.call_every(0.01, lambda _now: any_tool.loop(0.001))
    device = net.join("cam")
    net.until(lambda: raw)
    assert net.ask(device, correlation=b"42", expiry_s=30)
    net.until(lambda: len(raw) > 1)
    any_tool.disconnect()
    properties = raw[1].properties
    assert properties.ContentType == "application/x-protobuf"
    assert properties.UserProperty == [("schema", "shoal.v1.InferenceRequest")]
    assert properties.CorrelationData == b"42"
    assert 0 < properties.MessageExpiryInterval <= 30


@pytest.mark.parametrize("url", ["http://host", "mqtt://", "localhost:1883", "mqtt://host:port"])
def test_address_that_is_none_is_said(url):
    """One line for the operator."""
    with pytest.raises(ConfigError, match="broker"):
        parse_broker_url(url)


def test_credentials_come_from_the_address():
    """Percent-encoded, as URLs have them."""
    config = parse_broker_url("mqtts://al%40ice:s%3Acret@host")
    assert (config.username, config.password, config.port) == ("al@ice", "s:cret", 8883)
    assert config.tls_ca is not None


# -- what is built on it --------------------------------------------------------------------------------------------


def command(seconds, **action):
    return pb.Command(id=b"7", expires_at_us=int((1000 + seconds) * 1e6), **action)


def test_commands_are_obeyed_once_and_always_answered(net):
    """QoS 1 may repeat them."""
    done, results = [], []
    node = net.join("cam")
    CommandDesk(node, net.site, "cam", {"report_state": lambda _: done.append(1) or "done"}, wall_clock=lambda: 1000.0)
    operator = net.join("op")
    operator.subscribe(Route.RESULT, lambda delivery: results.append(delivery.message), site=net.site, node="cam")
    order = command(5, report_state=pb.ReportState())
    net.until(lambda: operator.publish(Route.COMMAND, order, site=net.site, node="cam") and len(results) > 1)
    assert {result.status for result in results} == {pb.COMMAND_STATUS_DONE}
    assert done == [1]


@pytest.mark.parametrize(
    ("order", "status"),
    [
        (command(-1, report_state=pb.ReportState()), pb.COMMAND_STATUS_EXPIRED),
        (pb.Command(id=b"7", report_state=pb.ReportState()), pb.COMMAND_STATUS_EXPIRED),
        (command(5, run_pipeline=pb.RunPipeline(model="x")), pb.COMMAND_STATUS_REFUSED),
        (command(5), pb.COMMAND_STATUS_REFUSED),
    ],
)
def test_what_is_not_done_is_said(net, order, status):
    """Too late, without an expiry, or nothing that this node does."""
    desk = CommandDesk(net.link("cam"), net.site, "cam", {"report_state": lambda _: "done"}, wall_clock=lambda: 1000.0)
    result = desk.obey(order)
    assert (result.status, result.id) == (status, b"7")
    assert result.message


class Chance:
    def uniform(self, low, high):
        assert (low, high) == (0.5, 1.0)
        return 0.5


def test_state_is_told_at_birth_and_again_in_time(net):
    """With counters; services have a topic of their own."""
    heard = []
    watcher = net.join("watcher")
    watcher.subscribe(Route.CLOUD_STATE, lambda delivery: heard.append(delivery.message), service=net.site)
    link = Link(parse_broker_url(net.url, session_expiry_s=0), service_identity(net.site))
    net.links.append(link)
    reporter = StateReporter(link, lambda: Report({"answers": 3}), interval_s=60.0, rng=Chance())
    link.attach(net.loop)
    net.until(lambda: link.connected)
    reporter.tick(0.0)
    net.until(lambda: heard)
    assert isinstance(heard[0], NodeState)
    assert dict(heard[0].counters) == {"answers": 3}
    assert not reporter.is_due
    sent = link.counters["messages_sent"]
    reporter.tick(29.9)
    assert link.counters["messages_sent"] == sent
    reporter.tick(30.0)
    assert link.counters["messages_sent"] == sent + 1


@pytest.mark.parametrize("interval_s", [0.0, MAX_INTERVAL_S + 1])
def test_state_is_told_at_least_every_ten_minutes(net, interval_s):
    """The contract's bound."""
    with pytest.raises(ValueError, match="state interval"):
        StateReporter(net.link("cam"), lambda: Report({}), interval_s=interval_s, rng=Chance())


def test_topic_taken_back_is_no_longer_sent(net):
    """The broker hears of it with the next subscription; what stays subscribed goes on."""
    got = []
    gateway = net.join("gw")
    gateway.subscribe(Route.INFER, got.append, site=net.site, node="cam")
    device, other = net.join("cam"), net.join("mic")
    assert net.ask(device)
    net.until(lambda: len(got) == 1)
    gateway.unsubscribe(Route.INFER, site=net.site, node="cam")
    gateway.subscribe(Route.INFER, got.append, site=net.site, node="mic")
    gateway.is_subscribed = False
    net.until(lambda: gateway.is_subscribed)
    assert net.ask(device)
    assert net.ask(other)
    net.until(lambda: len(got) == 2 and device.is_idle)
    assert got[1].address.node == "mic"
    assert gateway.counters["messages_received"] == 2


def test_answers_that_fill_the_line_all_leave(net):
    """Answers go out while reading; what the line does not take at once waits for it, and nothing is forgotten."""
    replies, big = [], b"x" * 500_000
    device, gateway = net.join("cam"), net.join("gw")
    device.subscribe(
        Route.REPLY, lambda delivery: replies.append(len(delivery.message.model)), site=net.site, node="cam"
    )

    def answer(_delivery):
        for _ in range(8):
            reply = InferenceReply(model=big.decode())
            assert gateway.publish(Route.REPLY, reply, site=net.site, node="cam")

    gateway.subscribe(Route.INFER, answer, site=net.site)
    gateway._client.socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    net.until(lambda: device.is_subscribed and gateway.is_subscribed)
    assert net.ask(device)
    net.until(lambda: len(replies) == 8)
