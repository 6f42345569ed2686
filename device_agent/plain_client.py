"""A client beside the agent's link, for topics that are not part of Shoal's contract, perhaps on another broker."""

import logging
import random
from functools import partial
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from shoal.errors import ConfigError
from shoal.link_config import LinkConfig
from shoal.loop import Loop, Socket, Timer

log = logging.getLogger(__name__)

_TICK_S = 1.0
_MAX_DOUBLINGS = 16


class PlainClient:
    """Connects on the agent's loop, and again with jitter whenever the connection ends.

    Speaks MQTT 3.1.1, which every broker does, and starts a clean session at each connect. Whoever derives from it
    says what to do with the connection.

    Args:
        name: what it is for, in the log: `source`.
    """

    def __init__(self, name: str, broker: LinkConfig, client_id: str, rng: random.Random) -> None:
        self._name = name
        self._broker = broker
        self._client_id = client_id
        self._rng = rng
        self._client: Client | None = None
        self._loop: Loop | None = None
        self._timer: Timer | None = None
        self._attempts = 0
        self._retry_at = 0.0

    def attach(self, loop: Loop) -> None:
        self._loop = loop
        self._timer = loop.call_every(_TICK_S, partial(self._tick, loop))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client._sock_close()  # noqa: SLF001  paho has no public way to close without waiting for the broker

    # -- what to do with it --------------------------------------------------------------------------------------------

    def _connected(self, client: Client) -> None:
        """The broker has taken us."""

    def _lost(self) -> None:
        """The connection has ended; the next comes by itself."""

    def _received(self, packet: MQTTMessage) -> None:
        """A message of a subscribed topic."""

    def _subscribed(
        self, _client: Client, _userdata: object, _mid: int, _reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        """The broker's answer to a subscription."""

    # -- connection ----------------------------------------------------------------------------------------------------

    def _tick(self, loop: Loop, now: float) -> None:
        if self._client is not None:
            self._client.loop_misc()
        elif now >= self._retry_at:
            self._connect(loop, now)

    def _connect(self, loop: Loop, now: float) -> None:
        broker = self._broker
        self._client = client = self._new_client(loop)
        try:
            client.connect(broker.host, broker.port, broker.keepalive_s)
        except (OSError, UnicodeError) as exc:  # the latter for a name that no host can have
            log.warning("%s cannot connect broker=%s:%d error=%s", self._name, broker.host, broker.port, exc)
            client._sock_close()  # noqa: SLF001  as above
            self._plan_retry(now)

    def _new_client(self, loop: Loop) -> Client:
        broker = self._broker
        client = Client(CallbackAPIVersion.VERSION2, self._client_id, protocol=MQTTProtocolVersion.MQTTv311)
        client.connect_timeout = broker.connect_timeout_s
        if broker.username:
            client.username_pw_set(broker.username, broker.password)
        if broker.tls_ca is not None:
            try:
                client.tls_set(broker.tls_ca, broker.tls_cert, broker.tls_key)
            except (OSError, ValueError) as exc:
                raise ConfigError(f"{self._name} mqtt: TLS with {broker.tls_ca}: {exc}") from exc
        client.on_socket_open = partial(_watch, loop)
        client.on_socket_close = lambda _client, _userdata, sock: loop.unwatch(sock)
        client.on_socket_register_write = lambda _client, _userdata, sock: loop.want_write(sock, wanted=True)
        client.on_socket_unregister_write = lambda _client, _userdata, sock: loop.want_write(sock, wanted=False)
        client.on_connect = self._answered
        client.on_subscribe = self._subscribed
        client.on_disconnect = partial(self._disconnected, loop)
        client.on_message = lambda _client, _userdata, packet: self._received(packet)
        return client

    def _plan_retry(self, now: float) -> None:
        self._client = None
        longest_s = min(self._broker.backoff_max_s, self._broker.backoff_min_s * 2.0**self._attempts)
        self._attempts = min(self._attempts + 1, _MAX_DOUBLINGS)
        self._retry_at = now + self._rng.uniform(0.0, longest_s)

    def _answered(
        self, client: Client, _userdata: object, _flags: ConnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            log.warning("%s refused broker=%s:%d reason=%s", self._name, self._broker.host, self._broker.port, reason)
            return
        self._attempts = 0
        self._connected(client)

    def _disconnected(
        self,
        loop: Loop,
        client: Client,
        _userdata: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: object,
    ) -> None:
        if client is not self._client:
            return
        log.info("%s disconnected broker=%s:%d reason=%s", self._name, self._broker.host, self._broker.port, reason)
        self._plan_retry(loop.clock())
        self._lost()


def _watch(loop: Loop, client: Client, _userdata: object, sock: Socket) -> None:
    loop.watch(sock, partial(_read, client), client.loop_write)


def _read(client: Client) -> None:
    """Read what is there; bytes that TLS has decrypted already make no socket readable."""
    code = client.loop_read()
    sock: Any = client.socket()
    while code == MQTTErrorCode.MQTT_ERR_SUCCESS and sock is not None and hasattr(sock, "pending") and sock.pending():
        code = client.loop_read()
        sock = client.socket()
