"""Who may do what on a broker with the shipped `cloud` profile, real certificates and the plugin: everything, both ways.

    make acl-matrix

Certificates come from `shoal provision`'s authority, rights from the plugin's file that it writes. Every node of the contract's
table (tests/fleet_console/rights.py) tries to publish each kind of message as itself and as others, and to subscribe to it;
then come those who should be out altogether, and what a certificate must not do. A refusal is the broker's own reason
code, or its closing of the connection; nothing is concluded from silence.

The last line is JSON: `checks` that were made, `failed` ones.
"""

import argparse
import contextlib
import datetime as dt
import json
import os
import re
import secrets
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.client import Client, MQTTv5, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion

from fleet_console.broker import find_mosquitto, free_port
from fleet_console.provision.authority import Authority
from fleet_console.provision.pki import Pair, issue, make_authority
from fleet_console.roles import Kind, Node, rights_of, security_config
from shoal.routes import Route, topic, topic_filter
from tests.fleet_console.rights import BY_NAME, GROUP, MAY_WRITE, NODES, SITE, topics_of

PROFILE = Path(__file__).parents[2] / "deploy" / "mosquitto" / "cloud.conf"
NOW = dt.datetime.now(dt.UTC)
NOT_AUTHORIZED = 0x87
PATIENCE_S = 10.0
BROKER = "broker"


@dataclass
class Peer:
    """One connection, driven by hand."""

    client: Client
    answers: dict = field(default_factory=dict)
    received: list = field(default_factory=list)
    reason: int | None = None
    closed: bool = False

    def wait(self, ready):
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError("the broker did not answer")
            self.closed = self.closed or self.client.loop(0.05) != 0

    def publish(self, text, *, retain=False):
        return self._granted(self.client.publish(text, b"x", qos=1, retain=retain).mid)

    def subscribe(self, text):
        return self._granted(self.client.subscribe(text, qos=1)[1])

    def _granted(self, mid):
        self.wait(lambda: mid in self.answers or self.closed)
        return self.answers.get(mid, NOT_AUTHORIZED) < 0x80


@dataclass
class Site:
    """The broker, the authority, and where certificates lie."""

    authority: Authority
    ports: tuple[int, int]
    peers: list = field(default_factory=list)

    def join(self, name, *, pair=None, client_id=None, people=False, will=None, ca=None):
        """Connect; `reason` of what comes back is CONNACK's, None where the broker hung up before one."""
        folder = self.authority.directory / "bundles" / name
        certificate, key = pair or (folder / f"{name}.crt", folder / f"{name}.key")
        client = Client(
            CallbackAPIVersion.VERSION2, client_id=name if client_id is None else client_id, protocol=MQTTv5
        )
        context = ssl.create_default_context(cafile=ca or self.authority.directory / "ca.crt")
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        client.tls_set_context(context)
        peer = Peer(client)
        client.on_connect = lambda _c, _u, _f, reason, _p: setattr(peer, "reason", reason.value)
        client.on_publish = lambda _c, _u, mid, reason, _p: peer.answers.update({mid: reason.value})
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: peer.answers.update({mid: reasons[0].value})
        client.on_message = lambda _c, _u, message: peer.received.append((message.topic, message.payload))
        if will is not None:
            client.will_set(*will, qos=1)
        self.peers.append(peer)
        try:
            client.connect("localhost", self.ports[people])
            peer.wait(lambda: peer.reason is not None or peer.closed)
        except (ssl.SSLError, ConnectionError):
            peer.closed = True
        return peer

    def lets_in(self, name, **how):
        return self.join(name, **how).reason == 0

    def leave(self):
        for peer in self.peers:
            peer.client.disconnect()
            peer.client.reinitialise()
        self.peers.clear()


@contextlib.contextmanager
def start_site(folder):
    """Start Mosquitto with the shipped profile, its paths and ports moved to where a test may write."""
    authority = Authority(folder / "authority")
    authority.create("Test", NOW)
    broker = authority.issue_broker(BROKER, ["localhost", "127.0.0.1"], NOW, 30)
    for node in NODES:
        authority.issue(node, NOW, 30)
    gone = Node(Kind.DEVICE, "gone", SITE)
    authority.issue(gone, NOW, 30)
    authority.revoke("gone", NOW)
    # The plugin still knows it: what keeps it out is the list of revoked certificates.
    security = folder / "dynamic-security.json"
    security.write_text(security_config([*NODES, gone], {}, secrets.token_bytes))
    ports = [free_port() for _ in range(3)]
    text = PROFILE.read_text()
    moved = {
        "/etc/mosquitto/shoal/broker.crt": str(broker / f"{BROKER}.crt"),
        "/etc/mosquitto/shoal/broker.key": str(broker / f"{BROKER}.key"),
        "/etc/mosquitto/shoal/ca.crt": str(authority.directory / "ca.crt"),
        "/etc/mosquitto/shoal/revoked.crl": str(authority.directory / "revoked.crl"),
        "/var/lib/mosquitto/dynamic-security.json": str(security),
        "persistence_location /var/lib/mosquitto/": f"persistence_location {folder}/",
        "/usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so": str(
            next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"))
        ),
    }
    for old, new in moved.items():
        assert old in text, f"the profile does not name {old}"
        text = text.replace(old, new)
    for old, new in zip((8883, 8884, 8885), ports, strict=True):
        text, count = re.subn(rf"^listener {old}$", f"listener {new}", text, flags=re.MULTILINE)
        assert count == 1
    config = folder / "mosquitto.conf"
    config.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([find_mosquitto(), "-c", str(config)], stdout=log, stderr=log)
    site = Site(authority, (ports[0], ports[1]))
    try:
        wait_for_port(ports[-1], process, folder / "log")
        yield site
    finally:
        site.leave()
        process.terminate()
        process.wait()


def wait_for_port(port, process, log):
    """Its listeners open in the profile's order: the last is there when all are."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"mosquitto did not start: {log.read_text()}")
        threading.Event().wait(0.02)


def covers(rights, text):
    return text in rights.subscribe or any(topic_matches_sub(pattern, text) for pattern in rights.subscribe_within)


def table_checks(site):
    """Yield each publish and subscription of the table: what was tried, whether it is granted, and whether it should be."""
    for name, labels in MAY_WRITE.items():
        node, written = BY_NAME[name], set(labels.split())
        rights, peer = (
            rights_of(node),
            site.join(name, people=node.kind in {Kind.VIEWER, Kind.OPERATOR, Kind.PROVISIONER}),
        )
        for text, label in topics_of(node).items():
            yield f"{name} publishes {label}", peer.publish(text), label in written
            yield f"{name} subscribes to {label}", peer.subscribe(text), covers(rights, text)
        for text in rights.subscribe:
            yield f"{name} subscribes to {text}", peer.subscribe(text), True
        for text in ("#", "shoal/#", "$SYS/#", "$CONTROL/#"):
            yield f"{name} subscribes to {text}", peer.subscribe(text), False
        site.leave()


def device_checks(site):
    """Yield what a stolen device would try."""
    device = site.join("cam-1")
    for route in (Route.INFER, Route.PRESENCE, Route.STATE, Route.RESULT):
        yield (
            f"cam-1 leaves {route.value} of cam-2",
            device.publish(topic(route, site=SITE, node="cam-2"), retain=True),
            False,
        )
    for route, group in ((Route.SAMPLE, "ingest"), (Route.INFER, GROUP), (Route.REPLY, GROUP)):
        text = (
            topic_filter(route, group=group, site=SITE)
            if route is not Route.SAMPLE
            else topic_filter(route, group=group)
        )
        yield f"cam-1 joins the share {text}", device.subscribe(text), False
    yield "cam-1 writes trust", device.publish(topic(Route.TRUST_TIMESTAMP), retain=True), False
    yield "cam-1 writes a model", device.publish(topic(Route.BLOB, sha256="0" * 64), retain=True), False
    yield "cam-1 tells the plugin", device.publish("$CONTROL/dynamic-security/v1"), False
    site.leave()
    presence = topic(Route.PRESENCE, site=SITE, node="cam-2")
    operator = site.join("alice", people=True)
    operator.subscribe(presence)
    for name, payload in (("cam-1", b"forged"), ("cam-2", b"own")):
        site.join(name, will=(presence, payload)).client.socket().close()
    operator.wait(lambda: (presence, b"own") in operator.received)
    yield "cam-1 leaves a will as cam-2", (presence, b"forged") in operator.received, False
    yield "cam-2 leaves a will", (presence, b"own") in operator.received, True
    site.leave()


def identity_checks(site, folder):
    """Yield who comes in, and who does not."""
    yield "cam-1 comes in", site.lets_in("cam-1"), True
    yield "alice comes in", site.lets_in("alice", people=True), True
    yield "alice comes in twice", site.lets_in("alice", people=True, client_id="alice-2"), True
    own = site.join("cam-2")
    site.join("cam-1", client_id="cam-2")
    mine = topic(Route.STATE, site=SITE, node="cam-2")
    yield "cam-1 takes the session of cam-2 by its client id", not own.publish(mine), False
    site.join("cam-2", client_id="anything")
    own.wait(lambda: own.closed or own.publish(mine) is None)
    yield "cam-2 comes in twice, under another client id", not own.closed, False
    site.leave()
    yield "gone comes in, revoked", site.lets_in("gone"), False
    root = make_authority("Somebody else", NOW, 30)
    stranger = {
        "a certificate of another authority": issue(root, "cam-1", NOW, 30),
        "a self-signed certificate": make_authority("cam-1", NOW, 30),
        "an expired certificate": issue(_ca(site), "cam-1", NOW - dt.timedelta(days=60), 30),
        "a certificate that is not valid yet": issue(_ca(site), "cam-1", NOW + dt.timedelta(days=30), 30),
        "a certificate without a name": nameless(_ca(site)),
        "the broker's own certificate": None,
    }
    for index, (what, pair) in enumerate(stranger.items()):
        files = folder / f"{index}.crt", folder / f"{index}.key"
        if pair is None:
            bundle = site.authority.directory / "bundles" / BROKER
            files = bundle / f"{BROKER}.crt", bundle / f"{BROKER}.key"
        else:
            files[0].write_bytes(pair.certificate)
            files[1].write_bytes(pair.key)
        yield f"{what} comes in as cam-1", site.lets_in("cam-1", pair=files), False
    unknown = issue(_ca(site), "cam-9", NOW, 30)
    (folder / "cam-9.crt").write_bytes(unknown.certificate)
    (folder / "cam-9.key").write_bytes(unknown.key)
    # Mosquitto lets in whom the authority vouches for; without a role it may do nothing.
    nobody = site.join("cam-9", pair=(folder / "cam-9.crt", folder / "cam-9.key"))
    for route in (Route.PRESENCE, Route.INFER, Route.REPLY, Route.COMMAND):
        text = topic(route, site=SITE, node="cam-9")
        yield f"cam-9, whom the plugin does not know, publishes {route.value}", nobody.publish(text), False
        yield f"cam-9, whom the plugin does not know, subscribes to {route.value}", nobody.subscribe(text), False
    yield "nobody at all comes in", site.lets_in("cam-1", pair=(None, None)), False
    (folder / "other.crt").write_bytes(root.certificate)
    yield "a device that trusts another authority connects", site.lets_in("cam-1", ca=folder / "other.crt"), False
    site.leave()


def nameless(authority):
    """Signed by the authority, with an organisation and no common name: no shoal command makes such a one."""
    signer = serialization.load_pem_private_key(authority.key, None)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "cam-1")]))
        .issuer_name(authority.parsed().subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(hours=1))
        .not_valid_after(NOW + dt.timedelta(days=30))
        .sign(signer, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), pem)


def _ca(site):
    directory = site.authority.directory
    return Pair((directory / "ca.crt").read_bytes(), (directory / "ca.key").read_bytes())


def run(folder):
    """Return every check: what was tried, whether it succeeded, whether it should have."""
    with start_site(folder) as site:
        return [*table_checks(site), *device_checks(site), *identity_checks(site, folder)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checks = run(Path(folder))
    for what, granted, wanted in checks:
        print(f"{'ok  ' if granted == wanted else 'FAIL'} {'granted' if granted else 'refused'}  {what}")
    failed = sum(granted != wanted for _, granted, wanted in checks)
    print(json.dumps({"checks": len(checks), "granted": sum(each[1] for each in checks), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
