"""Topics of somebody else's: what Zigbee2MQTT, Tasmota, ESPHome and their like publish already."""

import logging
import random
from collections.abc import Mapping as Names
from functools import partial
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device_agent.readings import Reading
from device_agent.sources.feed import Feed, now_us, short_name
from device_agent.sources.mapping import Mapping
from shoal.errors import ConfigError, PayloadError
from shoal.link_config import LinkConfig
from shoal.loop import Loop, Socket, Timer

log = logging.getLogger(__name__)

_TICK_S = 1.0
_MAX_DOUBLINGS = 16
_MAX_TOPIC_BYTES = 65_535


class MqttSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="mqtt"):
    """`kind = "mqtt"`: one topic with all values of a reading, or one topic for each of them."""

    topics: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
    values: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["@"])
    broker: str = ""
    tls_ca: str | None = None
    retained: bool = False


class MqttSource:
    """A client of its own, beside the agent's link: this topic is not part of Shoal's contract, nor need the broker be.

    Speaks MQTT 3.1.1, which every broker does, at QoS 0, and starts a clean session at each connect. With several
    topics a reading is complete when each has brought its value anew. `reference` is the topic that completed it.

    Raises:
        ConfigError: a topic is no filter, or topics and values do not go together.
    """

    def __init__(self, settings: MqttSettings, broker: LinkConfig, client_id: str, rng: random.Random) -> None:
        self._broker = broker
        self._client_id = client_id
        self._rng = rng
        self._topics = settings.topics
        self._takes_retained = settings.retained
        self._parts = _Parts(_mappings(settings))
        self._client: Client | None = None
        self._attempts = 0
        self._retry_at = 0.0
        self._timer: Timer | None = None

    def start(self, feed: Feed) -> None:
        self._timer = feed.loop.call_every(_TICK_S, lambda now: self._tick(feed, now))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client._sock_close()  # noqa: SLF001  paho has no public way to close without waiting for the broker

    # -- connection ----------------------------------------------------------------------------------------------

    def _tick(self, feed: Feed, now: float) -> None:
        if self._client is not None:
            self._client.loop_misc()
        elif now >= self._retry_at:
            self._connect(feed, now)

    def _connect(self, feed: Feed, now: float) -> None:
        broker = self._broker
        self._client = client = self._new_client(feed)
        try:
            client.connect(broker.host, broker.port, broker.keepalive_s)
        except (OSError, UnicodeError) as exc:  # the latter for a name that no host can have
            log.warning("source cannot connect broker=%s:%d error=%s", broker.host, broker.port, exc)
            client._sock_close()  # noqa: SLF001  as above
            self._plan_retry(now)

    def _new_client(self, feed: Feed) -> Client:
        broker = self._broker
        client = Client(CallbackAPIVersion.VERSION2, self._client_id, protocol=MQTTProtocolVersion.MQTTv311)
        client.connect_timeout = broker.connect_timeout_s
        if broker.username:
            client.username_pw_set(broker.username, broker.password)
        if broker.tls_ca is not None:
            try:
                client.tls_set(broker.tls_ca, broker.tls_cert, broker.tls_key)
            except (OSError, ValueError) as exc:
                raise ConfigError(f"source mqtt: TLS with {broker.tls_ca}: {exc}") from exc
        loop = feed.loop
        client.on_socket_open = partial(_watch, loop)
        client.on_socket_close = lambda _client, _userdata, sock: loop.unwatch(sock)
        client.on_socket_register_write = lambda _client, _userdata, sock: loop.want_write(sock, wanted=True)
        client.on_socket_unregister_write = lambda _client, _userdata, sock: loop.want_write(sock, wanted=False)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = partial(self._disconnected, feed)
        client.on_message = partial(self._received, feed)
        return client

    def _plan_retry(self, now: float) -> None:
        self._client = None
        longest_s = min(self._broker.backoff_max_s, self._broker.backoff_min_s * 2.0**self._attempts)
        self._attempts = min(self._attempts + 1, _MAX_DOUBLINGS)
        self._retry_at = now + self._rng.uniform(0.0, longest_s)

    # -- paho's callbacks ----------------------------------------------------------------------------------------

    def _connected(
        self, client: Client, _userdata: object, _flags: ConnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            log.warning("source refused broker=%s:%d reason=%s", self._broker.host, self._broker.port, reason)
            return
        self._attempts = 0
        client.subscribe([(topic, 0) for topic in self._topics])

    def _subscribed(
        self, _client: Client, _userdata: object, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        refused = [topic for topic, reason in zip(self._topics, reasons, strict=False) if reason.is_failure]
        if refused:
            log.error("source may not read topics=%s", ", ".join(refused))

    def _disconnected(
        self,
        feed: Feed,
        client: Client,
        _userdata: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: object,
    ) -> None:
        if client is not self._client:
            return
        log.info("source disconnected broker=%s:%d reason=%s", self._broker.host, self._broker.port, reason)
        self._plan_retry(feed.loop.clock())
        self._parts.clear()
        feed.gap()

    def _received(self, feed: Feed, _client: Client, _userdata: object, packet: MQTTMessage) -> None:
        if packet.retain and not self._takes_retained:
            return  # a value of some other day
        try:
            values = self._parts.add(packet.topic, bytes(packet.payload))
        except PayloadError as exc:
            feed.refuse(PayloadError(str(exc), field=short_name(packet.topic)))
            return
        if values is not None:
            feed.take(Reading(values, now_us(), short_name(packet.topic)))


class _Parts:
    """Values that have come since the last reading."""

    def __init__(self, mappings: Names[str, Mapping]) -> None:
        self._mappings = mappings
        self._values: dict[str, NDArray[np.float32]] = {}

    def add(self, topic: str, payload: bytes) -> NDArray[np.float32] | None:
        """Take a message; return the reading that it completes."""
        for pattern, mapping in self._mappings.items():
            if topic_matches_sub(pattern, topic):
                self._values[pattern] = mapping.values(payload)
        if len(self._values) < len(self._mappings):
            return None
        values = np.concatenate([self._values[pattern] for pattern in self._mappings])
        self._values.clear()
        return values

    def clear(self) -> None:
        self._values.clear()


def _mappings(settings: MqttSettings) -> dict[str, Mapping]:
    topics, values = settings.topics, settings.values
    for topic in topics:
        _check_filter(topic)
    if len(topics) == 1:
        return {topics[0]: Mapping(values)}
    if len(set(topics)) < len(topics):
        raise ConfigError("source mqtt: a topic is named twice; one topic takes all its values")
    if len(values) not in (1, len(topics)):
        raise ConfigError(f"source mqtt: {len(values)} values for {len(topics)} topics, expected 1 or as many")
    each = values if len(values) > 1 else values * len(topics)
    return {topic: Mapping([value]) for topic, value in zip(topics, each, strict=True)}


def _check_filter(topic: str) -> None:
    levels = topic.split("/")
    wild = any("+" in level and level != "+" for level in levels) or "#" in topic.removesuffix("#")
    if wild or ("#" in topic and levels[-1] != "#") or len(topic.encode()) > _MAX_TOPIC_BYTES or "\0" in topic:
        raise ConfigError(f"source mqtt: {topic[:80]!r} is not a topic filter")


def _watch(loop: Loop, client: Client, _userdata: object, sock: Socket) -> None:
    loop.watch(sock, partial(_read, client), client.loop_write)


def _read(client: Client) -> None:
    """Read what is there; bytes that TLS has decrypted already make no socket readable."""
    code = client.loop_read()
    sock: Any = client.socket()
    while code == MQTTErrorCode.MQTT_ERR_SUCCESS and sock is not None and hasattr(sock, "pending") and sock.pending():
        code = client.loop_read()
        sock = client.socket()
