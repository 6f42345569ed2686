"""One node's MQTT 5 connection: birth and will, typed handlers by route, bounded publishing, jittered reconnect.

Invariants:
- a fresh paho client for every connection, so that nothing of an old connection is ever sent again by itself:
  what must not be lost lives in an outbox, which decides for itself what to repeat;
- nothing is queued while disconnected: `publish` says no, and the caller keeps its data;
- an acknowledgement goes to the connection that delivered the message, or nowhere;
- what one round of the loop publishes and acknowledges leaves in one write, in that order.
"""

import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

from google.protobuf.message import Message
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from shoal.acks import AckQueue
from shoal.codec import CONTENT_TYPE, OPAQUE_CONTENT_TYPE, encode, schema_of
from shoal.errors import ConfigError, LinkError
from shoal.inbox import BadHook, Delivery, Handler, Inbox, PostponeHook
from shoal.link_config import Identity, LinkConfig
from shoal.loop import Loop, Socket, Timer
from shoal.mqtt_client import WireClient
from shoal.routes import ROUTES, Route, topic, topic_bytes, topic_filter
from shoal.subscriptions import Subscriptions
from shoal.v1.node_pb2 import Presence
from shoal.wire import (
    Puback,
    Publish,
    correlation_property,
    encode_puback,
    encode_publish,
    expiry_property,
    publish_properties,
)

log = logging.getLogger(__name__)

_TICK_S = 1.0
_GOODBYE_S = 1.0
_MAX_DOUBLINGS = 16
_MICROSECONDS = 1_000_000
# A chunk of 64 KiB and its topic must pass; MEASURED on Mosquitto: a smaller limit loses chunks silently.
_SMALLEST_USEFUL_PACKET = 66_000

# What a broker that does not read may leave with us of messages that it never acknowledges.
_MAX_BACKLOG_BYTES = 4 << 20

# From here on reason codes are failures; those below would be refused again:
# not authorized, topic name invalid, packet too large, payload format invalid: MQTT 5, section 2.4.
_REFUSED = 0x80
# Source: MQTT 5.0, section 3.9.3.
_REFUSALS = {
    0x87: "not authorized",
    0x8F: "topic filter invalid",
    0x97: "quota exceeded",
    0x9E: "shared subscriptions not supported",
    0xA2: "wildcard subscriptions not supported",
}
_OPAQUE = publish_properties(OPAQUE_CONTENT_TYPE, None)
_PERMANENT = frozenset({0x87, 0x90, 0x95, 0x99})

Done = Callable[[LinkError | None], None]


class Link:
    """See the module. Never blocks but for the TCP and TLS handshake; all callbacks run on the loop's thread.

    Attributes:
        connected: CONNACK came and the connection has not ended since.
        is_subscribed: and the broker has answered the last subscription made on it.
        counters: connects, disconnects, bad_payloads, refused_publishes, refused_subscriptions, ...
    """

    def __init__(self, config: LinkConfig, identity: Identity, *, rng: random.Random | None = None) -> None:
        self.config = config
        self.identity = identity
        self.connected = False
        self.is_subscribed = False
        self.counters: Counter[str] = Counter()
        self._rng = rng or random.SystemRandom()
        self._loop: Loop | None = None
        self._client: WireClient | None = None
        self._outgoing: list[bytes] = []
        self._attempts = 0
        self._retry_at: float | None = None
        self._closing = False
        self._session = b""
        self._inbox = Inbox(self.counters)
        self._subscriptions = Subscriptions()
        self._asking: Timer | None = None
        self._is_reading = False
        self._watches_writes = False
        self._pending: dict[int, Done | None] = {}
        self._window = config.max_inflight
        self._on_connect_hooks: list[Callable[[], None]] = []

    # -- what a role calls ---------------------------------------------------------------------------------------

    def attach(self, loop: Loop) -> None:
        """Connect as soon as `loop` runs, and again for ever.

        Where the TLS files cannot be used, the loop ends with `ConfigError`.
        """
        self._loop = loop
        self._retry_at = loop.clock()
        loop.call_every(_TICK_S, self._tick)

    def on_connect(self, hook: Callable[[], None]) -> None:
        """Call `hook` after each CONNACK, once the birth and all subscriptions are on their way."""
        self._on_connect_hooks.append(hook)

    def on_bad(self, route: Route, hook: BadHook) -> None:
        """Call `hook` for messages of `route` that cannot be decoded; they are counted and acknowledged anyhow."""
        self._inbox.on_bad(route, hook)

    def on_arrival(self, route: Route, hook: PostponeHook) -> None:
        """Ask `hook` before a message of `route` is decoded; where it says True, it calls `handle` itself, later."""
        self._inbox.on_arrival(route, hook)

    def handle(self, delivery: Delivery) -> None:
        """Decode a postponed message and hand it to its handler."""
        self._inbox.handle(delivery)

    def subscribe(
        self,
        route: Route,
        handler: Handler,
        *,
        group: str | None = None,
        ack_late: bool = False,
        **segments: str,
    ) -> None:
        """Receive what matches; remembered and repeated at each connect.

        The broker is asked once this round of the loop is over, so that many topics share a packet.

        With `ack_late` the handler (or what it hands the delivery to) calls `delivery.ack()` itself.

        Raises:
            ValueError: the route has another handler already, or a control topic would be shared.
        """
        if group is not None and ROUTES[route].retain:
            raise ValueError(f"{route} is retained; shared subscriptions receive no retained messages")
        pattern = topic_filter(route, group=group, **segments)
        self._inbox.register(route, handler, ack_late=ack_late)
        self._subscriptions.add(pattern, route)
        if self.connected and self._loop is not None and self._asking is None:
            self._asking = self._loop.call_at(self._loop.clock(), self._ask)

    def unsubscribe(self, route: Route, *, group: str | None = None, **segments: str) -> None:
        """Take a subscription back. The broker hears of it with the next subscription, or within a second."""
        self._subscriptions.remove(topic_filter(route, group=group, **segments))

    def room(self) -> int:
        """How many messages `publish` would take now."""
        return self._window - len(self._pending) if self.connected else 0

    @property
    def is_idle(self) -> bool:
        """Every message sent on this connection has been acknowledged by the broker."""
        return not self._pending

    def publish(
        self,
        route: Route,
        message: Message | bytes,
        *,
        correlation: bytes = b"",
        expiry_s: int | None = None,
        qos: int | None = None,
        on_done: Done | None = None,
        **segments: str,
    ) -> bool:
        """Send one message.

        Returns False, having sent nothing, when not connected or when the window is full.
        `on_done(None)` follows the broker's PUBACK; `on_done(error)` a refusal or a lost connection.

        Raises:
            ValueError: the message is not what the route carries, or too large.
        """
        spec = ROUTES[route]
        if message != b"" and (spec.message or bytes) is not type(message):
            raise ValueError(f"{route} carries {spec.message or bytes}, not {type(message)}")
        chosen_qos = spec.qos if qos is None else qos
        if chosen_qos == 0 and on_done is not None:
            raise ValueError("nobody answers a message of QoS 0")
        client = self._client
        if client is None or self.room() <= 0 or (chosen_qos == 0 and client.is_stuck(_MAX_BACKLOG_BYTES)):
            return False
        if isinstance(message, bytes):
            payload, properties = message, _OPAQUE
        else:
            payload, properties = encode(message), _properties_of(schema_of(message))
        if correlation:
            properties = correlation_property(correlation) + properties
        if expiry_s is not None:
            properties += expiry_property(expiry_s)
        packet_id = self._expect_answer(client, on_done) if chosen_qos else 0
        self._send(
            encode_publish(
                topic_bytes(route, **segments),
                payload,
                qos=chosen_qos,
                retain=spec.retain,
                packet_id=packet_id,
                properties=properties,
            )
        )
        self.counters["messages_sent"] += 1
        self.counters["bytes_sent"] += len(payload)
        return True

    def announce(self) -> None:
        """Publish the birth of this connection again; without one, nothing happens."""
        if self.connected and self.room() > 0:
            self._publish_presence(online=True)

    def flush(self) -> None:
        """Send what this round has published so far; without it, that happens when the round is over."""
        if self._outgoing and self._client is not None:
            packets = b"".join(self._outgoing)
            self._outgoing.clear()
            self._client.send_packets(packets)

    def close(self) -> None:
        """Say goodbye: an offline presence, then DISCONNECT. Blocks until the broker has read it, at most a second."""
        self._retry_at = None
        self._closing = True
        client = self._client
        if client is None:
            return
        if self.connected:
            self._publish_presence(online=False)
            self.flush()
            client.say_goodbye(_GOODBYE_S)
        client.on_disconnect = None
        client._sock_close()  # noqa: SLF001  paho has no public way to close without a DISCONNECT
        self._forget()

    # -- connection ----------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        if self._client is not None:
            self._client.loop_misc()
        if self.connected:
            self._ask(now)
        if self._client is None and self._retry_at is not None and now >= self._retry_at:
            self._connect(now)

    def _connect(self, now: float) -> None:
        client = self._new_client()
        self._client = client
        self._session = self._rng.randbytes(16)
        self._set_will(client)
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self.config.session_expiry_s
        properties.ReceiveMaximum = self.config.receive_maximum
        properties.MaximumPacketSize = self.config.max_packet_bytes
        try:
            client.connect(
                self.config.host,
                self.config.port,
                self.config.keepalive_s,
                clean_start=self.config.session_expiry_s == 0,
                properties=properties,
            )
        except (OSError, UnicodeError) as exc:  # the latter for a name that no host can have
            log.warning("connect failed broker=%s:%d error=%s", self.config.host, self.config.port, exc)
            client._sock_close()  # noqa: SLF001  paho has no public way to close without a DISCONNECT
            self._plan_retry(now)

    def _new_client(self) -> WireClient:
        client = WireClient(
            self.identity.client_id,
            max_packet_bytes=self.config.max_packet_bytes,
            on_publish_received=self._received,
            on_puback=self._published,
            on_suback=self._subscribed,
        )
        client.connect_timeout = self.config.connect_timeout_s
        if self.config.username:
            client.username_pw_set(self.config.username, self.config.password)
        if self.config.tls_ca is not None:
            self._set_tls(client, self.config.tls_ca)
        self._acks = AckQueue(partial(self._send_ack, client))
        client.on_socket_open = self._socket_opened
        client.on_socket_close = self._socket_closed
        client.on_socket_register_write = partial(self._write_wanted, wanted=True)
        client.on_socket_unregister_write = partial(self._write_wanted, wanted=False)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received_by_paho
        client.on_subscribe = lambda _c, _u, _mid, reasons, _p: self._subscribed(bytes(one.value for one in reasons))
        return client

    def _set_tls(self, client: WireClient, authority: str) -> None:
        config = self.config
        try:
            client.tls_set(authority, config.tls_cert, config.tls_key)
        except (OSError, ValueError) as exc:
            files = ", ".join(name for name in (authority, config.tls_cert, config.tls_key) if name)
            raise ConfigError(f"TLS with {files}: {exc}") from exc

    def _plan_retry(self, now: float) -> None:
        """Forget the connection and plan the next: full jitter, so that a fleet does not come back as one."""
        self._forget()
        longest_s = min(self.config.backoff_max_s, self.config.backoff_min_s * 2.0**self._attempts)
        self._attempts = min(self._attempts + 1, _MAX_DOUBLINGS)
        if self._loop is not None and not self._closing:
            self._retry_at = now + self._rng.uniform(0.0, longest_s)
            self._loop.call_at(self._retry_at, self._tick)

    def _forget(self) -> None:
        self._client = None
        self._outgoing.clear()
        self.connected = self.is_subscribed = False
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        pending, self._pending = self._pending, {}
        for done in pending.values():
            if done is not None:
                done(LinkError("the connection ended before the broker answered"))

    # -- paho's callbacks ----------------------------------------------------------------------------------------

    def _socket_opened(self, client: Client, _userdata: object, sock: Socket) -> None:
        # Both ends need it: with Nagle on either, a round trip costs about 45 ms.
        cast("socket.socket", sock).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._loop is not None:
            self._watches_writes = False
            self._loop.watch(sock, partial(self._readable, client), client.loop_write)

    def _socket_closed(self, _client: Client, _userdata: object, sock: Socket) -> None:
        if self._loop is not None:
            self._loop.unwatch(sock)

    def _write_wanted(self, _client: Client, _userdata: object, sock: Socket, *, wanted: bool) -> None:
        if self._loop is not None and not self._is_reading and wanted != self._watches_writes:
            self._watches_writes = wanted
            self._loop.want_write(sock, wanted=wanted)

    def _readable(self, client: Client) -> None:
        """Read what is there and send the answers to it at once: only what does not fit waits for the selector."""
        self._is_reading = True
        try:
            client.loop_read()
            sock: Any = client.socket()
            while sock is not None and hasattr(sock, "pending") and sock.pending():
                client.loop_read()  # bytes that TLS has decrypted make no socket readable
                sock = client.socket()
            if client.want_write():
                client.loop_write()
        finally:
            self._is_reading = False
        sock = client.socket()
        if sock is not None:
            self._write_wanted(client, None, sock, wanted=client.want_write())

    def _connected(
        self,
        _client: Client,
        _userdata: object,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            log.warning("connection refused node=%s reason=%s", self.identity.client_id, reason)
            return
        self.connected = True
        self._attempts = 0
        self.counters["connects"] += 1
        granted = getattr(properties, "ReceiveMaximum", self.config.max_inflight)
        self._window = min(granted, self.config.max_inflight)
        largest = getattr(properties, "MaximumPacketSize", None)
        if largest is not None and largest < _SMALLEST_USEFUL_PACKET:
            log.error("broker's maximum packet size is %d: model chunks cannot pass, raise max_packet_size", largest)
        self._publish_presence(online=True)
        self._subscriptions.connect(session_present=flags.session_present)
        self._ask(0.0)
        for hook in self._on_connect_hooks:
            hook()

    def _disconnected(
        self, client: Client, _userdata: object, _flags: DisconnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if client is not self._client:
            return
        self.counters["disconnects"] += 1
        log.info("disconnected node=%s reason=%s", self.identity.client_id, reason)
        if self._loop is not None:
            self._plan_retry(self._loop.clock())

    def _received(self, publish: Publish) -> None:
        self.counters["messages_received"] += 1
        self.counters["bytes_received"] += len(publish.payload)
        self._inbox.receive(
            publish.topic,
            publish.payload,
            retained=publish.retain,
            ack=self._acks.expect(publish.packet_id) if publish.qos else _no_ack,
            qos=publish.qos,
            correlation=publish.correlation,
            response_topic=publish.response_topic,
        )

    def _received_by_paho(self, _client: Client, _userdata: object, packet: MQTTMessage) -> None:
        """What the wire codec does not take: property lists above 127 bytes, subscription identifiers."""
        properties = packet.properties
        self._received(
            Publish(
                packet.topic,
                bytes(packet.payload),
                packet.qos,
                packet.retain,
                packet.mid,
                getattr(properties, "CorrelationData", b""),
                getattr(properties, "ResponseTopic", ""),
            )
        )

    def _send_ack(self, client: WireClient, packet_id: int) -> None:
        if client is self._client:
            self._send(encode_puback(packet_id))

    def _published(self, puback: Puback) -> None:
        done = self._pending.pop(puback.packet_id, None)
        error = None
        if puback.reason >= _REFUSED:
            self.counters["refused_publishes"] += 1
            reason = ReasonCode(PacketTypes.PUBACK, identifier=puback.reason)
            error = LinkError(f"the broker refused: {reason}", permanent=puback.reason in _PERMANENT)
        if done is not None:
            done(error)

    def _subscribed(self, reasons: bytes) -> None:
        self.is_subscribed = True
        refused = [_REFUSALS.get(reason, hex(reason)) for reason in reasons if reason >= _REFUSED]
        if refused:
            self.counters["refused_subscriptions"] += len(refused)
            log.error("subscriptions refused node=%s reasons=%s", self.identity.client_id, refused)

    # -- small parts ---------------------------------------------------------------------------------------------

    def _expect_answer(self, client: WireClient, on_done: Done | None) -> int:
        packet_id = client.next_packet_id()
        while packet_id in self._pending:  # one message that is never answered must not lose its place to another
            packet_id = client.next_packet_id()
        self._pending[packet_id] = on_done
        return packet_id

    def _send(self, packet: bytes) -> None:
        """Let a packet wait for the others of this round."""
        if not self._outgoing and self._loop is not None:
            self._loop.call_soon(self.flush)
        self._outgoing.append(packet)

    def _ask(self, _now: float) -> None:
        """Tell the broker what is wanted now and what no longer is."""
        self._asking = None
        if self._client is None:
            return
        packets = self._subscriptions.take()
        for patterns in packets.unsubscribe:
            self._client.unsubscribe(patterns)
        for patterns in packets.subscribe:
            self._client.subscribe([(pattern, SubscribeOptions(qos=1)) for pattern in patterns])

    def _presence(self, *, online: bool) -> Presence:
        return Presence(
            session=self._session,
            online=online,
            at_us=int(time.time() * _MICROSECONDS),
            role=self.identity.role,
            version=self.identity.version,
        )

    def _publish_presence(self, *, online: bool) -> None:
        if self._client is None:
            return
        route, segments = self.identity.presence
        presence = self._presence(online=online)
        packet = encode_publish(
            topic_bytes(route, **segments),
            encode(presence),
            qos=1,
            retain=True,
            # It takes its place in the broker's receive-maximum.
            packet_id=self._expect_answer(self._client, None),
            properties=_properties_of(schema_of(presence)),
        )
        self._send(packet)

    def _set_will(self, client: Client) -> None:
        route, segments = self.identity.presence
        will = encode(self._presence(online=False))
        client.will_set(topic(route, **segments), will, qos=1, retain=True)


def _no_ack() -> None:
    """QoS 0 has none."""


@lru_cache(maxsize=64)
def _properties_of(schema: str) -> bytes:
    return publish_properties(CONTENT_TYPE, schema)


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]  # paho leaves this one constructor untyped
