"""Configuration files and the environment over them."""

import msgspec
import pytest

from shoal.config import BrokerSettings, link_config, load_config
from shoal.errors import ConfigError

pytestmark = pytest.mark.device


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a role's file looks like."""

    node: str
    broker: BrokerSettings = BrokerSettings()


@pytest.fixture
def load(tmp_path):
    def load_text(content):
        path = tmp_path / "shoal.toml"
        path.write_bytes(content)
        return load_config(path, Settings)

    return load_text


def test_file_becomes_settings(load):
    """What it does not say keeps its default."""
    settings = load(b'node = "cam"\n[broker]\nurl = "mqtt://b"\n')
    assert settings == Settings("cam", BrokerSettings(url="mqtt://b"))
    assert load(b'node = "cam"').broker.url == "mqtt://127.0.0.1:1883"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "node"),
        (b"node =", "shoal.toml"),
        (b"node = 3", "node"),
        (b'node = "cam"\nnod = 1', "nod"),
        (b'node = "cam"\n[broker]\npassword = "x"', "password"),
        (b"\xff\xfe", "utf-8"),
        (b"\x00", "shoal.toml"),
    ],
)
def test_mistake_in_a_file_is_named_with_the_file(load, content, said):
    """A missing or unknown key, another type, no TOML, no text: one line each, never a traceback."""
    with pytest.raises(ConfigError, match=said) as caught:
        load(content)
    assert "shoal.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("none.toml", "No such file"), (".", "Is a directory")])
def test_file_that_cannot_be_read_is_named(tmp_path, name, said):
    """The operating system's own words."""
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / name, Settings)
    assert str(tmp_path) in str(caught.value)


def test_environment_goes_before_the_file():
    """Address and credentials, for containers and secrets."""
    file = BrokerSettings(url="mqtt://al:pw@file:1", tls_ca="ca", tls_cert="cert", tls_key="key")
    plain = link_config(file, session_expiry_s=5, environment={})
    assert (plain.host, plain.username, plain.password, plain.session_expiry_s) == ("file", "al", "pw", 5)
    assert (plain.tls_ca, plain.tls_cert, plain.tls_key) == ("ca", "cert", "key")
    variables = {"SHOAL_BROKER": "mqtt://env:2", "SHOAL_USERNAME": "bo", "SHOAL_PASSWORD": "secret"}
    over = link_config(file, session_expiry_s=5, environment=variables)
    assert (over.host, over.port, over.username, over.password) == ("env", 2, "bo", "secret")


def test_empty_address_in_the_environment_is_none():
    """As a unit file leaves it when the operator set nothing."""
    assert link_config(BrokerSettings(url="mqtt://b"), session_expiry_s=0, environment={"SHOAL_BROKER": ""}).host == "b"


def test_encrypted_address_trusts_the_systems_roots_unless_told():
    """The file's own authority goes before them."""
    url = "mqtts://b"
    assert link_config(BrokerSettings(url=url), session_expiry_s=0, environment={}).tls_ca is not None
    own = BrokerSettings(url=url, tls_ca="own.pem")
    assert link_config(own, session_expiry_s=0, environment={}).tls_ca == "own.pem"
    with pytest.raises(ConfigError):
        link_config(BrokerSettings(url="b"), session_expiry_s=0, environment={})
