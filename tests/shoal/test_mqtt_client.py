"""The client leans on private parts of one paho version: these fail when paho changes underneath."""

import select
import socket

import paho.mqtt
import pytest
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shoal.mqtt_client import WireClient
from shoal.wire import encode_puback, encode_publish

pytestmark = pytest.mark.device

CONNACK = b"\x20\x03\x00\x00\x00"
PATIENCE_S = 10.0


class Line:
    """A client whose broker is the test: what it receives and sends are bytes."""

    def __init__(self):
        self.subacks = []
        self.publishes, self.pubacks, self.connects, self.ended, self.by_paho, self.wanted = [], [], [], [], [], []
        self.client = WireClient(
            "cam",
            max_packet_bytes=100_000,
            on_publish_received=self.publishes.append,
            on_puback=self.pubacks.append,
            on_suback=self.subacks.append,
        )
        self.client.on_connect = lambda *_: self.connects.append(1)
        self.client.on_disconnect = lambda *_: self.ended.append(1)
        self.client.on_message = lambda _c, _u, packet: self.by_paho.append(packet.payload)
        self.client.on_socket_register_write = lambda *_: self.wanted.append(True)
        self.client.on_socket_unregister_write = lambda *_: self.wanted.append(False)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.client.connect("127.0.0.1", server.getsockname()[1])
            self.broker, _ = server.accept()
        self.broker.settimeout(PATIENCE_S)
        self.client.loop_write()
        assert self.broker.recv(1000).startswith(b"\x10")  # CONNECT is paho's

    def feed(self, data):
        self.broker.sendall(data)
        self.client.socket().setblocking(True)
        self.client.socket().settimeout(PATIENCE_S)
        before = self.client._last_bytes_received
        code = self.client.loop_read()
        if self.client.socket() is not None:
            assert self.client._last_bytes_received >= before  # or keep-alive would think the broker dead
            self.client.socket().setblocking(False)
        return code


@pytest.fixture
def line():
    made = Line()
    yield made
    made.client._sock_close()
    made.broker.close()


def message(payload, *, properties=b"", qos=1, packet_id=7):
    return encode_publish(b"t", payload, qos=qos, retain=False, packet_id=packet_id, properties=properties)


def test_paho_is_the_version_that_was_read():
    """Another one needs another look at mqtt_client.py."""
    assert paho.mqtt.__version__ == "2.2.0"


def test_packets_of_both_readers_keep_their_order(line):
    """CONNACK is paho's, what follows in the same bytes is ours."""
    line.feed(CONNACK + message(b"1") + encode_puback(9) + message(b"2", qos=0))
    assert line.connects
    assert [publish.payload for publish in line.publishes] == [b"1", b"2"]
    assert [puback.packet_id for puback in line.pubacks] == [9]


def test_packets_may_arrive_in_any_pieces(line):
    """Cut at every byte."""
    stream = CONNACK + message(b"x" * 200) + message(b"odd", properties=b"\x0b\x05", qos=0) + encode_puback(3)
    for position in range(len(stream)):
        assert line.feed(stream[position : position + 1]) == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert line.connects
    assert [publish.payload for publish in line.publishes] == [b"x" * 200]
    assert line.by_paho == [b"odd"]
    assert len(line.pubacks) == 1


def test_strange_publish_is_paho_s(line):
    """Long property lists and subscription identifiers."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = [("k", "v" * 200)]
    packed = properties.pack()
    body = b"\x00\x01t\x00\x07" + packed + b"long"
    packet = b"\x32" + bytes((len(body) & 0x7F | 0x80, len(body) >> 7)) + body
    line.feed(CONNACK + packet)
    assert line.by_paho == [b"long"]
    assert line.publishes == []


def test_packet_larger_than_agreed_ends_the_connection(line):
    """Before a byte of it is kept."""
    assert line.feed(CONNACK + b"\x30\xff\xff\x7f") > 0
    assert line.ended


def test_end_of_the_line_is_noticed(line):
    """The broker closed, or the socket broke."""
    line.feed(CONNACK)
    line.broker.close()
    line.client.loop_read()
    assert line.ended


def test_what_the_socket_does_not_take_goes_later(line):
    """In order, and with paho's own packets between, never within."""
    line.feed(CONNACK)
    line.client.socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    large = b"".join(message(bytes([index]) * 60_000, packet_id=index) for index in range(1, 40))
    line.client.send_packets(large)
    assert line.client.want_write()
    assert line.wanted[-1] is True
    assert line.client.is_stuck(0)
    assert not line.client.is_stuck(len(large))
    line.client.subscribe("a")
    line.client.send_packets(encode_puback(5))
    received = b""
    end = encode_puback(5)
    while not received.endswith(end):
        wanted = [line.client.socket()] if line.client.want_write() else []
        readable, writable, _ = select.select([line.broker], wanted, [], PATIENCE_S)
        assert readable or writable
        if writable:
            line.client.loop_write()
        if readable:
            received += line.broker.recv(65536)
    assert received.startswith(large + b"\x82")
    assert not line.client.is_stuck(0)
    assert line.wanted[-1] is False


def test_packet_identifiers_come_from_one_row(line):
    """A SUBSCRIBE and a PUBLISH under way at once must not share one."""
    line.feed(CONNACK)
    first = line.client.next_packet_id()
    _, second = line.client.subscribe("a")
    assert line.client.next_packet_id() == second + 1 == first + 2


def test_answers_to_subscriptions_are_read_here_and_strange_ones_are_paho_s(line):
    """A code for each filter, whatever short properties came with them; long properties are not the plain case."""
    plain = b"\x90\x05\x00\x07\x00\x01\x87"
    reason = b"\x1f\x00\x02no"
    with_reason = b"\x90\x09\x00\x08" + bytes([len(reason)]) + reason + b"\x00"
    long_reason = b"\x1f\x00\xc8" + b"n" * 200
    strange = b"\x90\xd0\x01\x00\x09\xcb\x01" + long_reason + b"\x02"
    heard = []
    line.client.on_subscribe = lambda _c, _u, mid, reasons, _p: heard.append((mid, [r.value for r in reasons]))
    line.feed(CONNACK + plain + with_reason + strange)
    assert line.subacks == [b"\x01\x87", b"\x00"]
    assert heard == [(9, [2])]


def test_answer_to_an_unsubscribe_is_passed_over(line):
    """What follows it in the same read is handled all the same."""
    unsuback = b"\xb0\x04\x00\x05\x00\x00"
    publish = encode_publish(b"a", b"x", qos=0, retain=False, packet_id=0, properties=b"")
    line.feed(CONNACK + unsuback + publish + unsuback)
    assert [item.payload for item in line.publishes] == [b"x"]
    assert (line.connects, line.ended) == ([1], [])
