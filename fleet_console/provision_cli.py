"""`shoal provision`: certificates for a fleet, and the rights that go with them."""

import datetime as dt
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import ConfigError
from shoal.routes import CLOUD_SITE, Route, serving_group, topic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleet_console.provision.authority import Authority
    from fleet_console.roles import Kind, Node
    from shoal.config import BrokerSettings

provision_app = typer.Typer(
    help="Make certificates for brokers, nodes and people, and give them their rights; see docs/provision.md.",
    no_args_is_help=True,
)

_PASSWORD_VARIABLE = "SHOAL_CA_PASSWORD"  # noqa: S105 - its name
_NODE_DAYS = 825
_SOON_DAYS = 30

DirectoryOption = Annotated[Path, typer.Option("--directory", "-d", help="The authority's.", file_okay=False)]
_DIRECTORY = Path("shoal-authority")
DaysOption = Annotated[int, typer.Option(help="How long the certificate is valid.", min=1)]
NameArgument = Annotated[str, typer.Argument(help="Its id: small letters, digits, - and _.")]
SiteOption = Annotated[str, typer.Option(help="Its site.")]
BrokerOption = Annotated[
    str | None,
    typer.Option(help="mqtts://HOST:PORT of a broker that runs: it is told at once, with --as's certificate."),
]
AsOption = Annotated[str, typer.Option("--as", help="The provisioner who tells the broker.")]


@provision_app.command()
def ca(
    name: Annotated[str, typer.Argument(help="What it is called, such as the company.")],
    directory: DirectoryOption = _DIRECTORY,
) -> None:
    """Make the authority. SHOAL_CA_PASSWORD encrypts its key; without it the key lies in the clear, as this says."""
    authority = _authority(directory)
    authority.create(name, _now())
    if os.environ.get(_PASSWORD_VARIABLE) is None:
        typer.echo(f"{directory / 'ca.key'} is NOT encrypted: set {_PASSWORD_VARIABLE} to encrypt it", err=True)
    typer.echo(directory / "ca.crt")


@provision_app.command()
def broker(
    name: NameArgument,
    host: Annotated[list[str], typer.Option(help="A name or address that nodes reach it by; again for more.")],
    directory: DirectoryOption = _DIRECTORY,
    days: DaysOption = _NODE_DAYS,
) -> None:
    """Make a broker's certificate. Copy its bundle, revoked.crl and the plugin's file to the broker."""
    typer.echo(_authority(directory).issue_broker(name, host, _now(), days))


@provision_app.command()
def device(
    name: NameArgument,
    site: SiteOption,
    directory: DirectoryOption = _DIRECTORY,
    *,
    days: DaysOption = _NODE_DAYS,
    broker: BrokerOption = None,
    who: AsOption = "provisioner",
) -> None:
    """Make a device's certificate and rights; one that it had is revoked."""
    from fleet_console.roles import Kind, Node  # noqa: PLC0415

    _issue(Node(Kind.DEVICE, name, site), directory, days, broker, who)


@provision_app.command()
def gateway(
    name: NameArgument,
    site: SiteOption,
    *,
    models: Annotated[list[str] | None, typer.Option(help="It serves its whole site with these models.")] = None,
    devices: Annotated[list[str] | None, typer.Option(help="It serves these devices alone.")] = None,
    directory: DirectoryOption = _DIRECTORY,
    days: DaysOption = _NODE_DAYS,
    broker: BrokerOption = None,
    who: AsOption = "provisioner",
) -> None:
    """Make a gateway's certificate and rights: its group follows from the models, as the gateway itself makes it."""
    from fleet_console.roles import Kind, Node  # noqa: PLC0415

    if bool(models) == bool(devices):
        raise ConfigError("a gateway serves its site with --models, or some --devices alone: say one of them")
    group = serving_group(models, []) if models else ""
    _issue(Node(Kind.GATEWAY, name, site, group, devices or []), directory, days, broker, who)


@provision_app.command()
def service(
    name: Annotated[str, typer.Argument(help="ingest, publisher, trainer, controller or labeller.")],
    directory: DirectoryOption = _DIRECTORY,
    *,
    days: DaysOption = _NODE_DAYS,
    broker: BrokerOption = None,
    who: AsOption = "provisioner",
) -> None:
    """Make the certificate of one of the cloud's services, and its rights."""
    from fleet_console.roles import Kind, Node  # noqa: PLC0415

    services = (Kind.INGEST, Kind.PUBLISHER, Kind.TRAINER, Kind.CONTROLLER, Kind.LABELLER)
    kind = _one_of(services, name)
    _issue(Node(kind, name, CLOUD_SITE, "ingest" if kind is Kind.INGEST else ""), directory, days, broker, who)


@provision_app.command()
def person(
    name: NameArgument,
    role: Annotated[str, typer.Option(help="viewer sees, operator commands too, provisioner gives rights.")] = "viewer",
    directory: DirectoryOption = _DIRECTORY,
    *,
    days: DaysOption = _NODE_DAYS,
    broker: BrokerOption = None,
    who: AsOption = "provisioner",
) -> None:
    """Make a person's certificate and rights."""
    from fleet_console.roles import Kind, Node  # noqa: PLC0415

    _issue(Node(_one_of((Kind.VIEWER, Kind.OPERATOR, Kind.PROVISIONER), role), name), directory, days, broker, who)


@provision_app.command()
def security(
    out: Annotated[Path, typer.Argument(help="The plugin's file, /var/lib/mosquitto/dynamic-security.json.")],
    directory: DirectoryOption = _DIRECTORY,
) -> None:
    """Write the plugin's whole file, for a broker that does not run: everybody here with their rights, nobody else."""
    from fleet_console.provision.authority import BROKER  # noqa: PLC0415
    from fleet_console.roles import security_config  # noqa: PLC0415
    from shoal.release.durable import write_atomic  # noqa: PLC0415

    nodes = [entry.node() for entry in _authority(directory).current() if entry.kind != BROKER]
    write_atomic(out, security_config(nodes, {}, secrets.token_bytes).encode(), 0o600)
    typer.echo(f"{out}: {len(nodes)} clients")


@provision_app.command()
def revoke(
    name: NameArgument,
    directory: DirectoryOption = _DIRECTORY,
    broker: BrokerOption = None,
    who: AsOption = "provisioner",
) -> None:
    """Take a node's certificate and rights away, say that it is offline, and clear what it left on the broker.

    The plugin throws it out at once. The list of revoked certificates keeps it out for good: copy it to the broker
    and restart Mosquitto 2.0, which reads it when it starts.
    """
    from fleet_console.provision.plugin import open_plugin  # noqa: PLC0415
    from fleet_console.roles import deletion_commands  # noqa: PLC0415

    authority = _authority(directory)
    entry = authority.revoke(name, _now())
    typer.echo(f"{authority.directory / 'revoked.crl'} lists {name}: copy it to the brokers")
    if broker is None:
        return
    with open_plugin(_settings(authority, broker, who)) as plugin:
        plugin.tell(deletion_commands(name))
        for route in (Route.PRESENCE, Route.STATE):
            plugin.clear(topic(route, site=entry.site, node=name))
    typer.echo(f"{name} is out, and nothing of it is retained")


@provision_app.command("list")
def list_certificates(
    directory: DirectoryOption = _DIRECTORY,
    *,
    soon: Annotated[int, typer.Option(help="Only those that end within so many days; 0: all.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the certificates that count, and until when."""
    import msgspec  # noqa: PLC0415

    until = (_now() + dt.timedelta(days=soon)).isoformat() if soon else "9999"
    listed = [entry for entry in _authority(directory).current() if entry.not_after < until]
    entries = sorted(listed, key=lambda entry: entry.not_after)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(entries)))
        return
    for entry in entries:
        typer.echo(f"{entry.name:<24} {entry.kind:<12} {entry.site:<12} until {entry.not_after[:10]}")


def _one_of(kinds: "Sequence[Kind]", name: str) -> "Kind":
    found = next((kind for kind in kinds if kind.value == name), None)
    if found is None:
        raise ConfigError(f"no {name!r}: there is {', '.join(kind.value for kind in kinds)}")
    return found


def _issue(node: "Node", directory: Path, days: int, broker: str | None, who: str) -> None:
    from fleet_console.provision.plugin import open_plugin  # noqa: PLC0415
    from fleet_console.roles import creation_commands  # noqa: PLC0415

    authority = _authority(directory)
    bundle = authority.issue(node, _now(), days)
    if broker is not None:
        with open_plugin(_settings(authority, broker, who)) as plugin:
            plugin.tell(creation_commands(node))
    typer.echo(bundle)


def _authority(directory: Path) -> "Authority":
    from fleet_console.provision.authority import Authority  # noqa: PLC0415

    password = os.environ.get(_PASSWORD_VARIABLE)
    return Authority(directory, lambda: password.encode() if password else None)


def _settings(authority: "Authority", url: str, who: str) -> "BrokerSettings":
    from shoal.config import BrokerSettings  # noqa: PLC0415

    folder = authority.directory / "bundles" / who
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there: `shoal provision person {who} --role provisioner` comes first")
    return BrokerSettings(url, str(folder / "ca.crt"), str(folder / f"{who}.crt"), str(folder / f"{who}.key"))


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
