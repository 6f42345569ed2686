"""The directory in which a fleet's certificates are made: who has one, until when, and which are revoked.

    ca.crt, ca.key        the authority; the key encrypted where a password was given
    revoked.crl           what brokers refuse
    inventory.json        every certificate that was ever made
    bundles/NAME/         what goes to a node: `ca.crt`, `NAME.crt`, `NAME.key`

Invariants:
- a name has one certificate that counts, the newest that is not revoked;
- the inventory is written before a bundle: a certificate that nobody knows of never leaves this directory.
"""

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fleet_console.provision.pki import Pair, issue, make_authority, revocation_list
from fleet_console.roles import Kind, Node
from shoal.errors import ConfigError
from shoal.ids import parse_id
from shoal.release.durable import write_atomic

BROKER = "broker"
_SECRET = 0o600
_CA_DAYS = 3650
# Of a list of revoked certificates, which is made anew with each change: brokers refuse everybody when it is too old.
_CRL_DAYS = 3650


class Issued(msgspec.Struct, frozen=True):
    """One certificate.

    Attributes:
        kind: a node's, as in `fleet_console.roles`, or `broker`.
        group: of shared subscriptions; of gateways and ingest.
        devices: a gateway's, where it serves these alone.
        serial: in hex.
        revoked_at: empty while it counts.
    """

    name: str
    kind: str
    site: str
    serial: str
    not_after: str
    group: str = ""
    devices: Sequence[str] = ()
    revoked_at: str = ""

    def node(self) -> Node:
        return Node(Kind(self.kind), self.name, self.site, self.group, self.devices)


class Authority:
    """See the module.

    Args:
        password: asked for when the authority's key is needed; None where it is not encrypted.
    """

    def __init__(self, directory: Path, password: Callable[[], bytes | None] = lambda: None) -> None:
        self.directory = directory
        self._password = password

    def create(self, name: str, now: dt.datetime) -> None:
        """Make the authority.

        Raises:
            ConfigError: there is one.
        """
        if (self.directory / "ca.key").exists():
            raise ConfigError(f"{self.directory} holds an authority already")
        self.directory.mkdir(parents=True, exist_ok=True)
        root = make_authority(name, now, _CA_DAYS, self._password())
        write_atomic(self.directory / "ca.key", root.key, _SECRET)
        write_atomic(self.directory / "ca.crt", root.certificate)
        self._write_inventory([])
        self._write_revoked([], now)

    def issue(self, node: Node, now: dt.datetime, days: int) -> Path:
        """Make a node's certificate and its bundle; one that it had before is revoked. Returns the bundle.

        Raises:
            ConfigError: there is no authority, or the name is a broker's.
            PayloadError: the name or the site is no id.
        """
        parse_id(node.name, "name")
        parse_id(node.site, "site")
        pair = issue(self._root(), node.name, now, days, password=self._password())
        entry = Issued(
            name=node.name,
            kind=node.kind.value,
            site=node.site,
            group=node.group,
            **_identity(pair),
            devices=list(node.devices),
        )
        return self._keep(entry, pair, now)

    def issue_broker(self, name: str, hosts: Sequence[str], now: dt.datetime, days: int) -> Path:
        """Make a broker's certificate for the names and addresses that it is reached by; raises as `issue` does."""
        parse_id(name, "name")
        if not hosts:
            raise ConfigError("a broker needs the names or addresses that nodes reach it by: --host")
        pair = issue(self._root(), name, now, days, hosts=hosts, password=self._password())
        return self._keep(Issued(name=name, kind=BROKER, site="", **_identity(pair)), pair, now)

    def revoke(self, name: str, now: dt.datetime) -> Issued:
        """Put a name's certificate on the list.

        Raises:
            ConfigError: it has none that counts.
        """
        entries = self.inventory()
        found = next((entry for entry in entries if entry.name == name and not entry.revoked_at), None)
        if found is None:
            raise ConfigError(f"{name!r} has no certificate here that counts")
        self._write_revoked(self._revoke_in(entries, name, now), now)
        return found

    def inventory(self) -> list[Issued]:
        """Return every certificate, in the order in which they were made.

        Raises:
            ConfigError: there is no authority here.
        """
        try:
            return msgspec.json.decode((self.directory / "inventory.json").read_bytes(), type=list[Issued])
        except FileNotFoundError as exc:
            raise ConfigError(f"{self.directory} holds no authority: make it with `shoal provision ca`") from exc

    def current(self) -> list[Issued]:
        """Return those that count."""
        return [entry for entry in self.inventory() if not entry.revoked_at]

    def _keep(self, entry: Issued, pair: Pair, now: dt.datetime) -> Path:
        entries = self.inventory()
        clash = next(
            (each for each in entries if each.name == entry.name and _is_broker(each) != _is_broker(entry)), None
        )
        if clash is not None:
            raise ConfigError(f"{entry.name!r} is the name of a {clash.kind}")
        replaced = any(each.name == entry.name and not each.revoked_at for each in entries)
        entries = self._revoke_in(entries, entry.name, now) if replaced else entries
        self._write_inventory([*entries, entry])
        if replaced:
            self._write_revoked(entries, now)
        return self._write_bundle(entry, pair)

    def _revoke_in(self, entries: Sequence[Issued], name: str, now: dt.datetime) -> list[Issued]:
        changed = [
            msgspec.structs.replace(entry, revoked_at=now.isoformat())
            if entry.name == name and not entry.revoked_at
            else entry
            for entry in entries
        ]
        self._write_inventory(changed)
        return changed

    def _root(self) -> Pair:
        try:
            return Pair((self.directory / "ca.crt").read_bytes(), (self.directory / "ca.key").read_bytes())
        except FileNotFoundError as exc:
            raise ConfigError(f"{self.directory} holds no authority: make it with `shoal provision ca`") from exc

    def _write_inventory(self, entries: Sequence[Issued]) -> None:
        write_atomic(
            self.directory / "inventory.json", msgspec.json.format(msgspec.json.encode(list(entries)), indent=1)
        )

    def _write_revoked(self, entries: Sequence[Issued], now: dt.datetime) -> None:
        serials = [int(entry.serial, 16) for entry in entries if entry.revoked_at]
        write_atomic(
            self.directory / "revoked.crl", revocation_list(self._root(), serials, now, _CRL_DAYS, self._password())
        )

    def _write_bundle(self, entry: Issued, pair: Pair) -> Path:
        folder = self.directory / "bundles" / entry.name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{entry.name}.key", pair.key, _SECRET)
        write_atomic(folder / f"{entry.name}.crt", pair.certificate)
        write_atomic(folder / "ca.crt", (self.directory / "ca.crt").read_bytes())
        return folder


def _identity(pair: Pair) -> dict[str, str]:
    certificate = pair.parsed()
    return {"serial": f"{certificate.serial_number:x}", "not_after": certificate.not_valid_after_utc.isoformat()}


def _is_broker(entry: Issued) -> bool:
    return entry.kind == BROKER
