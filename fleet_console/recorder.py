"""Listens to a site's questions and notes when who asked what for how many rows. Nobody's messages are taken away."""

import time
from pathlib import Path
from typing import BinaryIO

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_gateway.requests import check_request
from edge_gateway.trace import MAX_LINES, Asked, format_line
from shoal.codec import decode
from shoal.errors import ConfigError, LinkError, PayloadError
from shoal.ids import parse_id
from shoal.link_config import parse_broker_url
from shoal.routes import Route, parse_topic, topic_filter
from shoal.v1 import inference_pb2 as pb

_POLL_S = 0.1


class Recorder:
    """Writes a line for each question; `at_s` counts from the broker's answer to the subscription.

    Attributes:
        written: lines.
        unreadable: messages that are no question, or not their sender's own.
    """

    def __init__(self, site: str, file: BinaryIO) -> None:
        self.written = 0
        self.unreadable = 0
        self.began: float | None = None
        self._filter = topic_filter(Route.INFER, site=parse_id(site, "site"))
        self._file = file

    def attach(self, client: Client) -> None:
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received

    def _connected(
        self,
        client: Client,
        _userdata: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            raise LinkError(f"the broker refused: {reason}")
        # Plain, not shared: gateways get theirs all the same. QoS 0: a recorder that is slow holds nothing up.
        client.subscribe(self._filter, 0)

    def _subscribed(
        self, _client: Client, _userdata: object, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            raise LinkError(f"the broker refused {self._filter}: {reasons[0]}")
        self.began = time.monotonic()

    def _received(self, _client: Client, _userdata: object, packet: MQTTMessage) -> None:
        # paho notes the time when the packet is read, by the same clock.
        at_s = max(0.0, packet.timestamp - self.began) if self.began is not None else 0.0
        try:
            sender = parse_topic(packet.topic)
            request = decode(pb.InferenceRequest, bytes(packet.payload))
            check_request(request, sender, "")
        except PayloadError:
            self.unreadable += 1
            return
        if self.written < MAX_LINES:
            asked = Asked(round(at_s, 6), sender.node, request.model, len(request.rows), len(packet.payload))
            self._file.write(format_line(asked))
            self.written += 1


def record(broker_url: str, site: str, out: Path, seconds: float, count: int) -> Recorder:
    """Record for so long or until so many questions came, whichever is first; 0 counts none.

    Raises:
        ConfigError: an address, a site or a path that cannot be, or nobody answers there.
        LinkError: the broker refused, or left.
    """
    config = parse_broker_url(broker_url)
    try:
        file = out.open("wb")
    except OSError as exc:
        raise ConfigError(f"{out}: {exc.strerror}") from exc
    with file:
        recorder = Recorder(site, file)
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        recorder.attach(client)
        if config.username:
            client.username_pw_set(config.username, config.password)
        try:
            if config.tls_ca is not None:
                client.tls_set(config.tls_ca)
            client.connect(config.host, config.port)
        except OSError as exc:
            raise ConfigError(f"{broker_url}: {exc}; start one with `shoal broker`") from exc
        began = time.monotonic()
        while time.monotonic() - (recorder.began or began) < seconds and (not count or recorder.written < count):
            if client.loop(_POLL_S):
                raise LinkError("the broker closed the connection")
        client.disconnect()
    return recorder
