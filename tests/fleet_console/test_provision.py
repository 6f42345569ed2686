"""`shoal provision`: certificates on disk, rights on a broker that runs, and a node that is thrown out."""

import datetime as dt
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fleet_console.broker import find_mosquitto
from fleet_console.cli import app
from fleet_console.provision.authority import Authority
from fleet_console.provision.pki import issue, make_authority, revocation_list
from fleet_console.roles import Kind, Node
from shoal.errors import ConfigError, PayloadError
from shoal.routes import Route, topic
from tests.campaigns.acl_matrix import start_site

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
CAM = Node(Kind.DEVICE, "cam-1", "plant")


@pytest.fixture
def authority(tmp_path):
    made = Authority(tmp_path / "authority")
    made.create("Test", NOW)
    return made


def shoal(*words):
    result = CliRunner().invoke(app, ["provision", *map(str, words)], catch_exceptions=False)
    return result.output


def certificate(bundle, name):
    return x509.load_pem_x509_certificate((bundle / f"{name}.crt").read_bytes())


def revoked(authority):
    crl = x509.load_pem_x509_crl((authority.directory / "revoked.crl").read_bytes())
    return {entry.serial_number for entry in crl}


def test_certificate_is_the_nodes_and_verifies(authority):
    """Common name is the id; it is a client's, signed by the authority, valid an hour ago for clocks that are late."""
    bundle = authority.issue(CAM, NOW, 30)
    made = certificate(bundle, "cam-1")
    root = x509.load_pem_x509_certificate((bundle / "ca.crt").read_bytes())
    made.verify_directly_issued_by(root)
    assert [each.value for each in made.subject] == ["cam-1"]
    assert (made.not_valid_before_utc, made.not_valid_after_utc) == (
        NOW - dt.timedelta(hours=1),
        NOW + dt.timedelta(30),
    )
    assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    key = bundle / "cam-1.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_second_certificate_revokes_the_first(authority):
    """A name has one that counts; every one that was ever made stays in the inventory."""
    serials = [certificate(authority.issue(CAM, NOW, 30), "cam-1").serial_number for _ in range(2)]
    assert revoked(authority) == {serials[0]}
    assert [int(entry.serial, 16) for entry in authority.inventory()] == serials
    authority.revoke("cam-1", NOW)
    assert revoked(authority) == set(serials)
    assert authority.current() == []
    with pytest.raises(ConfigError, match="'cam-1' has no certificate here that counts"):
        authority.revoke("cam-1", NOW)


def test_names_are_ids_and_brokers_have_names_of_their_own(authority):
    """A node that could call itself a broker could be taken for one."""
    with pytest.raises(PayloadError, match="name: 'Cam 1' is not an id"):
        authority.issue(Node(Kind.DEVICE, "Cam 1", "plant"), NOW, 30)
    authority.issue_broker("hub", ["hub.example.com", "10.0.0.1"], NOW, 30)
    with pytest.raises(ConfigError, match="'hub' is the name of a broker"):
        authority.issue(Node(Kind.DEVICE, "hub", "plant"), NOW, 30)
    with pytest.raises(ConfigError, match="--host"):
        authority.issue_broker("bus", [], NOW, 30)
    names = certificate(authority.directory / "bundles" / "hub", "hub").extensions
    found = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["hub.example.com"]


def test_encrypted_authority_signs_only_with_its_password():
    """Whoever copies the directory cannot make certificates."""
    root = make_authority("Test", NOW, 30, b"secret")
    for password in (None, b"guess"):
        with pytest.raises(ConfigError, match="the authority's key"):
            issue(root, "cam-1", NOW, 30, password=password)
        with pytest.raises(ConfigError, match="the authority's key"):
            revocation_list(root, [], NOW, 30, password)
    assert issue(root, "cam-1", NOW, 30, password=b"secret").parsed()


def test_commands_make_a_fleet(tmp_path, monkeypatch):
    """From nothing to the plugin's file: everybody who has a certificate has a client and a role in it."""
    monkeypatch.setenv("SHOAL_CA_PASSWORD", "secret")
    place = ("-d", tmp_path / "a")
    assert "ca.crt" in shoal("ca", "Test", *place)
    shoal("broker", "hub", "--host", "localhost", *place)
    shoal("device", "cam-1", "--site", "plant", *place)
    shoal("gateway", "gw-1", "--site", "plant", "--models", "digits", *place)
    shoal("service", "ingest", *place)
    shoal("person", "ann", "--role", "operator", *place)
    out = tmp_path / "dynamic-security.json"
    assert "4 clients" in shoal("security", out, *place)
    document = json.loads(out.read_text())
    assert {client["username"] for client in document["clients"]} == {"cam-1", "gw-1", "ingest", "ann"}
    listed = json.loads(shoal("list", "--json", *place))
    assert {entry["name"]: entry["kind"] for entry in listed}["hub"] == "broker"
    assert "BEGIN ENCRYPTED" in (tmp_path / "a" / "ca.key").read_text()
    assert shoal("list", "--soon", "30", *place) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("device", "cam-1", "--site", "plant"), "holds no authority"),
        (("gateway", "gw-1", "--site", "plant"), "say one of them"),
        (("service", "cook"), "no 'cook': there is ingest"),
        (("person", "ann", "--role", "king"), "no 'king': there is viewer"),
        (("revoke", "cam-1"), "holds no authority"),
    ],
)
def test_mistakes_are_named(tmp_path, words, said):
    """One line that says what to do."""
    with pytest.raises(ConfigError, match=said):
        shoal(*words, "-d", tmp_path / "none")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of paho, as in tests/deploy
@pytest.mark.skipif(
    find_mosquitto() is None or next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"), None) is None,
    reason="left out: needs Mosquitto with its dynamic security plugin",
)
def test_node_comes_and_goes_while_the_broker_runs(tmp_path, monkeypatch):
    """A new device may speak at once; a revoked one is thrown out, may nothing more, and leaves nothing behind."""
    monkeypatch.delenv("SHOAL_CA_PASSWORD", raising=False)
    with start_site(tmp_path) as site:
        url = f"mqtts://localhost:{site.ports[1]}"
        live = ("-d", site.authority.directory, "--broker", url, "--as", "paul")
        presence = topic(Route.PRESENCE, site="plant", node="new-1")
        shoal("device", "new-1", "--site", "plant", *live)
        device = site.join("new-1")
        assert device.publish(presence, retain=True)
        assert not device.publish(topic(Route.PRESENCE, site="plant", node="cam-1"), retain=True)
        assert "nothing of it is retained" in shoal("revoke", "new-1", *live)
        device.wait(lambda: device.closed)
        viewer = site.join("vera", people=True)
        marker = topic(Route.PRESENCE, site="plant", node="cam-2")
        site.join("cam-2").publish(marker, retain=True)
        assert viewer.subscribe(topic(Route.PRESENCE, site="plant", node="new-1"))
        assert viewer.subscribe(marker)
        viewer.wait(lambda: viewer.received)
        assert [text for text, _ in viewer.received] == [marker]
        again = site.join("new-1")
        assert again.closed or not again.publish(presence)
    assert os.environ.get("SHOAL_CA_PASSWORD") is None
