"""Reads retained messages once: connect, ask, wait until nothing more comes, leave. Writes nothing to the broker."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from shoal.errors import ConfigError, LinkError
from shoal.link_config import parse_broker_url

# Brokers do not say where a wildcard's retained messages end: silence for this long is taken for it.
_QUIET_S = 0.4
_WAIT_S = 10.0
# One window of exact subscriptions, as nodes have it: brokers drop what a slow reader is owed beyond their queue.
_WINDOW = 16


class RetainedReader:
    """One connection. Payloads by topic; an empty one is none."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._found: dict[str, bytes] = {}
        self._heard_at = time.monotonic()
        client.on_message = self._received

    def read_matching(self, filters: Sequence[str]) -> Mapping[str, bytes]:
        """Everything retained that matches, once none has come for a moment."""
        self._found = {}
        self._heard_at = time.monotonic()
        self._client.subscribe([(pattern, 1) for pattern in filters])
        self._serve(lambda: time.monotonic() - self._heard_at > _QUIET_S)
        self._client.unsubscribe(list(filters))
        return dict(self._found)

    def read_exactly(self, topics: Sequence[str]) -> Mapping[str, bytes]:
        """What is retained under these topics; one that is not there costs the whole wait."""
        found: dict[str, bytes] = {}
        for start in range(0, len(topics), _WINDOW):
            window = topics[start : start + _WINDOW]
            self._found = {}
            self._client.subscribe([(topic, 1) for topic in window])
            self._serve(lambda: len(self._found) >= len(set(window)))  # noqa: B023  served before the next window
            self._client.unsubscribe(list(window))
            found |= {topic: data for topic, data in self._found.items() if topic in window}
        return found

    def _serve(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not done() and time.monotonic() < deadline:
            if self._client.loop(timeout=0.05):
                raise LinkError("the broker closed the connection")

    def _received(self, _client: Client, _userdata: object, packet: MQTTMessage) -> None:
        self._heard_at = time.monotonic()
        if packet.payload:
            self._found[packet.topic] = bytes(packet.payload)
        else:
            self._found.pop(packet.topic, None)


@contextlib.contextmanager
def open_reader(broker_url: str) -> Iterator[RetainedReader]:
    """Connect.

    Raises:
        ConfigError: the address is none, or nobody answers there.
        LinkError: the broker refused, or left.
    """
    config = parse_broker_url(broker_url)
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    if config.username:
        client.username_pw_set(config.username, config.password)
    if config.tls_ca is not None:
        client.tls_set(config.tls_ca)
    answers: list[ReasonCode] = []

    def connected(
        _client: Client, _userdata: object, _flags: ConnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        answers.append(reason)

    client.on_connect = connected
    try:
        client.connect(config.host, config.port)
    except OSError as exc:
        raise ConfigError(f"{broker_url}: {exc}; start one with `shoal broker`") from exc
    try:
        reader = RetainedReader(client)
        reader._serve(lambda: bool(answers))  # noqa: SLF001  until CONNACK
        if not answers or answers[0].is_failure:
            raise LinkError(f"{broker_url} refused: {answers[0] if answers else 'no answer'}")
        yield reader
    finally:
        client.disconnect()
        client.loop(timeout=0.05)
