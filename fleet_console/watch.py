"""What passes over the broker, decoded: the answer to command lines that cannot read protobuf."""

import json
import sys
import time

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from rich.console import Console
from rich.text import Text

from shoal.codec import decode
from shoal.errors import ConfigError, LinkError, PayloadError
from shoal.link_config import parse_broker_url
from shoal.routes import ROUTES, Route, parse_topic, topic_filter


def decode_payload(topic: str, payload: bytes) -> dict[str, object]:
    """Describe a message: its schema and fields, or what is known of bytes that are no message of ours."""
    try:
        route = parse_topic(topic).route
        kind = ROUTES[route].message
        if not payload and ROUTES[route].retain:
            return {"cleared": True}
        if kind is None:
            return {"bytes": len(payload)}
        return {"schema": kind.DESCRIPTOR.full_name, "message": message_to_dict(decode(kind, payload))}
    except PayloadError as exc:
        return {"bytes": len(payload), "error": str(exc)}


def message_to_dict(message: Message) -> dict[str, object]:
    found: dict[str, object] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def watch(broker_url: str, filters: list[str] | None, *, as_json: bool, count: int) -> None:
    """Print messages until Ctrl-C, or `count` of them. Without filters, everything but model chunks.

    Raises:
        ConfigError: the address is none, nobody answers there, or a filter is none.
        LinkError: the broker refused.
    """
    config = parse_broker_url(broker_url)
    console = Console()
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    left = count or sys.maxsize
    # A wildcard over retained chunks loses some of them, and nobody reads chunks.
    wanted = filters or [topic_filter(route) for route in Route if route is not Route.BLOB]

    def connected(
        client: Client, _userdata: object, _flags: ConnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            raise LinkError(f"{broker_url} refused: {reason}")
        try:
            client.subscribe([(pattern, 1) for pattern in wanted])
        except ValueError as exc:
            raise ConfigError(f"{' '.join(map(repr, wanted))}: {exc}") from exc

    def received(client: Client, _userdata: object, packet: MQTTMessage) -> None:
        nonlocal left
        if left:
            left -= 1
            _print(console, packet, as_json=as_json)
        if not left:
            client.disconnect()

    client.on_connect = connected
    client.on_message = received
    if config.username:
        client.username_pw_set(config.username, config.password)
    try:
        if config.tls_ca is not None:
            client.tls_set(config.tls_ca)
        client.connect(config.host, config.port)
    except OSError as exc:
        raise ConfigError(f"{broker_url}: {exc}; start one with `shoal broker`") from exc
    client.loop_forever()


def _print(console: Console, packet: MQTTMessage, *, as_json: bool) -> None:
    found = decode_payload(packet.topic, bytes(packet.payload))
    size = len(packet.payload)
    if as_json:
        line = {
            "at": round(time.time(), 3),
            "topic": packet.topic,
            "retained": packet.retain,
            "size_bytes": size,
            **found,
        }
        console.out(json.dumps(line), highlight=False)
        return
    text = Text.assemble(
        (time.strftime("%H:%M:%S "), "dim"),
        ("R " if packet.retain else "  ", "magenta"),
        (packet.topic, "cyan"),
        (f" {size} B ", "dim"),
        json.dumps(found.get("message", found)),
    )
    console.print(text, soft_wrap=True)
