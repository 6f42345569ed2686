"""A small certificate authority: one root, certificates whose common name is the node, and a list of those revoked.

No I/O. Keys are on the curve P-256, which every TLS library of a device has.
"""

import datetime as dt
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal.errors import ConfigError

# Clocks differ: what was signed this minute must not be "not yet valid" on a device.
_EARLIER = dt.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, PEM."""

    certificate: bytes
    key: bytes

    def parsed(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)


def make_authority(name: str, now: dt.datetime, days: int, password: bytes | None = None) -> Pair:
    """Make a root that signs nothing but nodes: no authority below it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Pair(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key, password))


def issue(
    authority: Pair,
    name: str,
    now: dt.datetime,
    days: int,
    *,
    hosts: Sequence[str] = (),
    password: bytes | None = None,
) -> Pair:
    """Make a certificate: a broker's where it has hosts, else a client's.

    Args:
        authority: who signs.
        name: the common name: the node's id, which the broker takes for its user name.
        now: from when it is valid, an hour earlier for clocks that differ.
        days: how long.
        hosts: names and addresses that clients may reach the broker by.
        password: of the authority's key.

    Raises:
        ConfigError: the password is wrong, or missing.
    """
    root, signer = authority.parsed(), _private_key(authority.key, password)
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, root.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
        )
    return Pair(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key, None))


def revocation_list(
    authority: Pair, serials: Iterable[int], now: dt.datetime, days: int, password: bytes | None = None
) -> bytes:
    """Return the PEM of a list of revoked certificates; a broker that is given one refuses those on it.

    Raises:
        ConfigError: the password is wrong, or missing.
    """
    signer = _private_key(authority.key, password)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.parsed().subject)
        .last_update(now - _EARLIER)
        .next_update(now + dt.timedelta(days=days))
    )
    for serial in sorted(serials):
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _EARLIER).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_key(pem: bytes, password: bytes | None) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"the authority's key: {exc}") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the authority's key is not on an elliptic curve")
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey, password: bytes | None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
