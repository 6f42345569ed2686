"""Results on a local MQTT topic, for applications that rather subscribe than start the agent."""

import json
import random
from dataclasses import asdict

import msgspec

from device_agent.answers import Result
from device_agent.plain_client import PlainClient
from shoal.errors import ConfigError
from shoal.link_config import parse_broker_url


class MqttAnswers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="mqtt"):
    """`kind = "mqtt"`: one JSON object a message, at QoS 0, never retained."""

    topic: str
    broker: str = "mqtt://127.0.0.1:1883"


class TopicWriter(PlainClient):
    """Publishes results. Never waits: what the broker does not take now is dropped, and counted.

    Raises:
        ConfigError: the topic has wildcards or is one of Shoal's, or the broker's address is none.
    """

    def __init__(self, settings: MqttAnswers, node: str, rng: random.Random) -> None:
        if not settings.topic or set("+#\0") & set(settings.topic) or settings.topic.startswith(("shoal/", "$")):
            raise ConfigError(f"answers topic {settings.topic!r}: expected a plain topic outside shoal/")
        broker = parse_broker_url(settings.broker, session_expiry_s=0)
        super().__init__("answers", broker, f"{node}-answers", rng)
        self.dropped = 0
        self._topic = settings.topic

    def __call__(self, result: Result) -> None:
        client = self._client
        # Bytes that wait already belong to a line that takes nothing more.
        if client is None or not client.is_connected() or client.want_write():
            self.dropped += 1
            return
        client.publish(self._topic, json.dumps(asdict(result) | {"by": result.by.value}))
