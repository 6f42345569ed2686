"""Where a link connects, and as whom."""

import dataclasses

import pytest

from shoal.codec import MAX_PAYLOAD_BYTES
from shoal.errors import ConfigError, PayloadError
from shoal.link_config import LinkConfig, node_identity, parse_broker_url, service_identity
from shoal.routes import CLOUD_SITE, Route

pytestmark = pytest.mark.device


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("mqtt://broker", "broker", 1883),
        ("mqtts://broker", "broker", 8883),
        ("mqtts://broker:443", "broker", 443),
        ("MQTT://Broker:1", "broker", 1),
        ("mqtt://[::1]:1884", "::1", 1884),
        ("mqtt://u:p@127.0.0.1:65535", "127.0.0.1", 65535),
    ],
)
def test_address_says_host_and_port(url, host, port):
    """With the port that the scheme implies."""
    config = parse_broker_url(url, session_expiry_s=7)
    assert (config.host, config.port, config.session_expiry_s) == (host, port, 7)
    assert (config.tls_ca is not None) == url.startswith("mqtts")


@pytest.mark.parametrize(
    "url",
    [
        *("", "broker", "http://broker", "mqtt://", "mqtt://:1883", "mqtt://broker:x", "mqtt://broker:65536"),
        *("mqtt://broker:-1", "mqtt://broker:0", "mqtt://[::1", "mqtt://[nonsense]"),
    ],
)
def test_anything_else_is_the_operators_mistake(url):
    """One line that shows the address, never a traceback."""
    with pytest.raises(ConfigError, match="broker '"):
        parse_broker_url(url)


@pytest.mark.parametrize("url", ["mqtt://al:s3cret@broker:x", "http://s3cret@broker", "mqtt://al:s3cret@[::1"])
def test_password_is_not_in_the_message(url):
    """It goes to a terminal, a log or a ticket."""
    with pytest.raises(ConfigError) as caught:
        parse_broker_url(url)
    assert "s3cret" not in str(caught.value)
    assert "***" in str(caught.value)


def test_node_is_its_client_id():
    """Rights and topics hang on it."""
    identity = node_identity("plant", "cam", "device")
    assert (identity.client_id, identity.role) == ("cam", "device")
    assert identity.presence == (Route.PRESENCE, {"site": "plant", "node": "cam"})
    assert identity.version


def test_service_is_a_node_of_the_cloud():
    """It has a presence of its own, and takes commands like a node."""
    identity = service_identity("ingest")
    assert (identity.client_id, identity.role) == ("ingest", "ingest")
    assert identity.presence == (Route.CLOUD_PRESENCE, {"service": "ingest", "site": CLOUD_SITE})


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: node_identity("Plant", "cam", "device"), "site"),
        (lambda: node_identity("plant", "c/m", "device"), "node"),
        (lambda: service_identity("+"), "service"),
    ],
)
def test_identity_that_is_no_id_is_refused_by_name(make, field):
    """Before anything is connected."""
    with pytest.raises(PayloadError) as caught:
        make()
    assert caught.value.field == field


def test_largest_payload_fits_the_largest_packet():
    """With its topic and properties; a smaller limit would end the connection at each big message."""
    config = LinkConfig("broker")
    assert config.max_packet_bytes > MAX_PAYLOAD_BYTES
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1
