"""Talks to Mosquitto's dynamic security plugin of a broker that runs: who comes in, and what they may do."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from fleet_console.roles import CONTROL
from shoal.config import BrokerSettings, link_config
from shoal.errors import ConfigError, LinkError

# More in one message, and Mosquitto 2.0 stands still for seconds.
_BATCH = 100
_WAIT_S = 15.0
_LOOK_S = 0.1
# Of a deletion, what was not there; of anything else, nothing.
_HARMLESS: Mapping[str, frozenset[str]] = {
    "deleteClient": frozenset({"Client not found"}),
    "deleteRole": frozenset({"Role not found"}),
}


@dataclass(slots=True)
class Plugin:
    """One connection with the right to change rights."""

    client: Client
    answers: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, commands: Sequence[dict[str, Any]]) -> None:
        """Send commands, a hundred at a time, and wait for each batch's answers.

        Raises:
            ConfigError: the plugin refuses one; those before it are done.
            LinkError: it does not answer: it is not loaded, or this name has not the right.
        """
        for start in range(0, len(commands), _BATCH):
            batch = commands[start : start + _BATCH]
            self.answers.clear()
            self.client.publish(CONTROL, json.dumps({"commands": list(batch)}), qos=1)
            wanted = len(batch)
            self.serve(lambda: len(self.answers) >= wanted, "the plugin does not answer")  # noqa: B023 - served at once
            for answer in self.answers:
                error = answer.get("error", "")
                if error and error not in _HARMLESS.get(answer.get("command", ""), frozenset()):
                    raise ConfigError(f"the plugin refuses {answer.get('command')}: {error}")

    def clear(self, topic: str, payload: bytes = b"") -> None:
        """Publish a retained message; an empty one clears what is there."""
        info = self.client.publish(topic, payload, qos=1, retain=True)
        self.serve(info.is_published, f"the broker does not confirm {topic}")

    def serve(self, until: Callable[[], bool], error: str) -> None:
        """Drive the connection until something is so.

        Raises:
            LinkError: it was not in time, or the broker hung up.
        """
        deadline = time.monotonic() + _WAIT_S
        while not until():
            if time.monotonic() > deadline or self.client.loop(_LOOK_S):
                raise LinkError(error)


@contextmanager
def open_plugin(broker: BrokerSettings) -> Iterator[Plugin]:
    """Connect with the provisioner's certificate.

    Raises:
        ConfigError: the broker cannot be reached, or does not let it in.
    """
    config = link_config(broker, session_expiry_s=0)
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    if config.tls_ca is not None:
        client.tls_set(config.tls_ca, config.tls_cert, config.tls_key)
    plugin = Plugin(client)

    def heard(_client: Client, _userdata: object, message: MQTTMessage) -> None:
        plugin.answers += json.loads(message.payload)["responses"]

    ready: list[bool] = []
    client.on_message = heard
    client.on_subscribe = lambda *_: ready.append(True)
    try:
        client.connect(config.host, config.port)
        plugin.serve(client.is_connected, f"the broker at {broker.url} does not let the provisioner in")
        client.subscribe(f"{CONTROL}/response", qos=1)
        plugin.serve(lambda: bool(ready), "the broker does not confirm the subscription")
        yield plugin
    except OSError as exc:
        raise ConfigError(f"broker {config.host}:{config.port}: {exc}") from exc
    finally:
        client.disconnect()
