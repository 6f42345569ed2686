"""Topics of somebody else's: what Zigbee2MQTT, Tasmota, ESPHome and their like publish already."""

import logging
import random
from collections.abc import Mapping as Names
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from paho.mqtt.client import Client, MQTTMessage, topic_matches_sub
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device_agent.plain_client import PlainClient
from device_agent.readings import Reading
from device_agent.sources.feed import Feed, now_us, short_name
from device_agent.sources.mapping import Mapping
from shoal.errors import ConfigError, PayloadError
from shoal.link_config import LinkConfig

log = logging.getLogger(__name__)

_MAX_TOPIC_BYTES = 65_535


class MqttSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="mqtt"):
    """`kind = "mqtt"`: one topic with all values of a reading, or one topic for each of them."""

    topics: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
    values: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["@"])
    broker: str = ""
    tls_ca: str | None = None
    retained: bool = False


class MqttSource(PlainClient):
    """Readings from topics of somebody else's, at QoS 0; the broker need not be the agent's.

    With several topics a reading is complete when each has brought its value anew. `reference` is the topic that
    completed it.

    Raises:
        ConfigError: a topic is no filter, or topics and values do not go together.
    """

    def __init__(self, settings: MqttSettings, broker: LinkConfig, client_id: str, rng: random.Random) -> None:
        super().__init__("source", broker, client_id, rng)
        self._topics = settings.topics
        self._takes_retained = settings.retained
        self._parts = _Parts(_mappings(settings))
        self._feed: Feed | None = None

    def start(self, feed: Feed) -> None:
        self._feed = feed
        self.attach(feed.loop)

    def _connected(self, client: Client) -> None:
        client.subscribe([(topic, 0) for topic in self._topics])

    def _subscribed(
        self, _client: Client, _userdata: object, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        refused = [topic for topic, reason in zip(self._topics, reasons, strict=False) if reason.is_failure]
        if refused:
            log.error("source may not read topics=%s", ", ".join(refused))

    def _lost(self) -> None:
        self._parts.clear()
        if self._feed is not None:
            self._feed.gap()

    def _received(self, packet: MQTTMessage) -> None:
        if self._feed is None or (packet.retain and not self._takes_retained):
            return  # a retained value is of some other day
        try:
            values = self._parts.add(packet.topic, bytes(packet.payload))
        except PayloadError as exc:
            self._feed.refuse(PayloadError(str(exc), field=short_name(packet.topic)))
            return
        if values is not None:
            self._feed.take(Reading(values, now_us(), short_name(packet.topic)))


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
