"""`shoal command`: one command to one node, and its answer."""

import os
import secrets
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from google.protobuf import json_format
from paho.mqtt.client import MQTT_ERR_SUCCESS, Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console

from shoal.codec import decode, encode
from shoal.errors import ConfigError, LinkError
from shoal.ids import parse_id
from shoal.link_config import parse_broker_url
from shoal.routes import Route, topic
from shoal.v1.command_pb2 import COMMAND_STATUS_DONE, Command, CommandResult, CommandStatus

_LOOK_S = 0.2
_ACTIONS = [field.name for field in Command.DESCRIPTOR.oneofs_by_name["action"].fields]
_MICROSECONDS = 1_000_000
_REFUSED = 1


def command(
    site: Annotated[str, typer.Argument(help="The node's site; `cloud` for services.")],
    node: Annotated[str, typer.Argument(help="The node.")],
    action: Annotated[str, typer.Argument(help=f"One of {', '.join(_ACTIONS)}.")],
    *,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the action's fields.")] = None,
    broker: Annotated[str, typer.Option(envvar="SHOAL_BROKER", help="The broker's address.")] = "mqtt://127.0.0.1:1883",
    expires_s: Annotated[float, typer.Option(help="Not done any more after so many seconds.", min=0.1)] = 10.0,
) -> None:
    """Send one command to a node and print its answer; exits 0 only if it was done."""
    result = send(broker, parse_id(site, "site"), parse_id(node, "node"), build(action, settings or [], expires_s))
    name = CommandStatus.Name(result.status).removeprefix("COMMAND_STATUS_").lower()
    Console(soft_wrap=True, highlight=False, markup=False).print(f"{name}: {result.message}")
    if result.status != COMMAND_STATUS_DONE:
        raise typer.Exit(_REFUSED)


def build(action: str, settings: Sequence[str], expires_s: float) -> Command:
    """Make a command of what was typed.

    Raises:
        ConfigError: there is no such action, or it has no such field.
    """
    if action not in _ACTIONS:
        raise ConfigError(f"no action {action!r}; there are {', '.join(_ACTIONS)}")
    fields = dict(item.partition("=")[::2] for item in settings)
    now_us = int(time.time() * _MICROSECONDS)
    made = Command(id=secrets.token_bytes(16), issued_at_us=now_us)
    made.expires_at_us = now_us + int(expires_s * _MICROSECONDS)
    try:
        json_format.ParseDict({action: fields}, made)
    except json_format.ParseError as exc:
        raise ConfigError(f"{action}: {exc}") from exc
    return made


def send(url: str, site: str, node: str, order: Command) -> CommandResult:
    """Publish a command and wait for its answer.

    Raises:
        LinkError: no answer came in time.
    """
    # Not a link: an operator has no presence to publish, and may not.
    config = parse_broker_url(url)
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    if config.username or os.environ.get("SHOAL_USERNAME"):
        client.username_pw_set(
            os.environ.get("SHOAL_USERNAME", config.username), os.environ.get("SHOAL_PASSWORD", config.password)
        )
    if config.tls_ca is not None:
        client.tls_set(config.tls_ca)
    found: list[CommandResult] = []

    def subscribed(*_: object) -> None:
        client.publish(topic(Route.COMMAND, site=site, node=node), encode(order), qos=1)

    def heard(_client: Client, _userdata: object, message: MQTTMessage) -> None:
        result = decode(CommandResult, bytes(message.payload))
        if result.id == order.id:
            found.append(result)

    client.on_subscribe = subscribed
    client.on_message = heard
    end = time.monotonic() + (order.expires_at_us - order.issued_at_us) / _MICROSECONDS
    try:
        client.connect(config.host, config.port)
        client.subscribe(topic(Route.RESULT, site=site, node=node), qos=1)
        while not found and time.monotonic() < end and client.loop(_LOOK_S) == MQTT_ERR_SUCCESS:
            pass
    except OSError as exc:
        raise ConfigError(f"broker {config.host}:{config.port}: {exc}") from exc
    client.disconnect()
    if not found:
        raise LinkError(f"no answer from {site}/{node}: it is not there, or may not hear us")
    return found[0]
