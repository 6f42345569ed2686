"""Where a link connects, and as whom."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from shoal import __version__
from shoal.codec import MAX_PAYLOAD_BYTES
from shoal.errors import ConfigError
from shoal.ids import parse_id
from shoal.routes import CLOUD_SITE, Route

_DAY_S = 86_400
_SECRET = re.compile(r"//.*@")


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Bounds and credentials of one connection.

    Attributes:
        session_expiry_s: 0 starts clean each time (gateways, services); devices keep their session a day.
        max_inflight: QoS 1 messages sent and not yet acknowledged by the broker.
        receive_maximum: QoS 1 messages received and not yet acknowledged by us; with late acks this is back-pressure.
    """

    host: str
    port: int = 1883
    username: str = ""
    password: str = field(default="", repr=False)  # so that no log has it
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    keepalive_s: int = 60
    session_expiry_s: int = _DAY_S
    max_inflight: int = 100
    receive_maximum: int = 200
    max_packet_bytes: int = MAX_PAYLOAD_BYTES + 65_536
    connect_timeout_s: float = 5.0
    backoff_min_s: float = 0.5
    backoff_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a link is: a node of a site, or a cloud service. Client id, user name and node are one."""

    client_id: str
    role: str
    presence: tuple[Route, Mapping[str, str]]
    version: str


def node_identity(site: str, node: str, role: str) -> Identity:
    """The identity of a device or gateway.

    Raises:
        PayloadError: the site or node is not a valid id.
    """
    segments = {"site": parse_id(site, "site"), "node": parse_id(node, "node")}
    return Identity(node, role, (Route.PRESENCE, segments), __version__)


def service_identity(service: str) -> Identity:
    """The identity of a cloud service, which is also a node of the site `cloud` for commands."""
    segments = {"service": parse_id(service, "service"), "site": CLOUD_SITE}
    return Identity(service, service, (Route.CLOUD_PRESENCE, segments), __version__)


def parse_broker_url(url: str, *, session_expiry_s: int = _DAY_S) -> LinkConfig:
    """Read `mqtt://[user:password@]host[:port]`; TLS files are set in the configuration, not in the URL.

    Raises:
        ConfigError: another scheme, or no host.
    """
    shown = _SECRET.sub("//***@", url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"broker {shown!r}: {exc}") from exc
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port == 0:
        raise ConfigError(f"broker {shown!r}: expected mqtt://host:port or mqtts://host:port")
    return LinkConfig(
        host=parts.hostname,
        port=port or (8883 if parts.scheme == "mqtts" else 1883),
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        tls_ca="/etc/ssl/certs/ca-certificates.crt" if parts.scheme == "mqtts" else None,
        session_expiry_s=session_expiry_s,
    )
