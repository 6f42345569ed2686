"""`shoal keys`: make, change and put away the keys that sign releases."""

import datetime as dt
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import ConfigError

if TYPE_CHECKING:
    from cloud.keys import FileKeyStore
    from cloud.release_store import ReleaseStore
    from cloud.rotation import KeyChange

keys_app = typer.Typer(
    help="Keys that sign releases: of root, targets, snapshot, timestamp, rollout and each model. Key files are "
    "encrypted with SHOAL_KEY_PASSWORD, or a password that is asked for.",
    no_args_is_help=True,
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The cloud's TOML file.", exists=True, dir_okay=False)
]


@keys_app.command()
def init(
    config: ConfigOption,
    *,
    encryption: Annotated[
        bool, typer.Option("--encryption/--no-encryption", help="Whether the key files are encrypted.")
    ] = True,
) -> None:
    """Make all keys, an empty repository and the stores; print the root that nodes are provisioned with.

    Root gets three keys, of which two must sign.
    """
    from cloud import services  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    settings = load_config(config, CloudSettings)
    root = services.init(settings, functools.cache(_new_password) if encryption else None)
    kind = "encrypted" if encryption else "NOT encrypted"
    typer.echo(f"Keys: {settings.keys_dir}, {kind}. Keep root.*.pem and targets.*.pem off this machine.", err=True)
    typer.echo(root)


@keys_app.command()
def rotate(
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, rollout or model-NAME.")],
    config: ConfigOption,
) -> None:
    """Give a role new keys, and queue what names them or is signed with them for the publisher.

    Root, targets, snapshot and timestamp need two keys of root here; rollout and models need the key of targets. New
    keys are encrypted unless those that the role has here are not.
    """
    from cloud import rotation  # noqa: PLC0415

    store, keys = _stores(config)
    _report(rotation.rotate(store, role, keys, dt.datetime.now(dt.UTC)))
    typer.echo("Once that is published, `shoal keys retire` puts the old keys away.", err=True)


@keys_app.command("add-model")
def add_model(model: Annotated[str, typer.Argument(help="The model's name.")], config: ConfigOption) -> None:
    """Make a key and a role for one more model, and queue it; needs the key of targets."""
    from cloud import rotation  # noqa: PLC0415

    store, keys = _stores(config)
    _report(rotation.add_model(store, model, keys, dt.datetime.now(dt.UTC)))


@keys_app.command()
def retire(config: ConfigOption) -> None:
    """Move key files that nothing published or waiting names to `retired/`, and print where they are."""
    from cloud import rotation  # noqa: PLC0415

    for path in rotation.retire(*_stores(config)):
        typer.echo(path)


def _stores(config: Path) -> "tuple[ReleaseStore, FileKeyStore]":
    from cloud.keys import FileKeyStore, key_password  # noqa: PLC0415
    from cloud.release_store import ReleaseStore  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    settings = load_config(config, CloudSettings)
    return ReleaseStore(settings.releases_dir), FileKeyStore(settings.keys_dir, key_password)


def _report(change: "KeyChange") -> None:
    keyids = ", ".join(change.keyids)
    typer.echo(f"Queued {change.delegator} {change.version}: it names for {change.role} the keys {keyids}")


def _new_password() -> bytes:
    """The variable, or asked for twice: a password that was mistyped once would lock its keys up for good.

    Raises:
        ConfigError: it is empty, or there is neither.
    """
    from cloud.keys import PASSWORD_VARIABLE, key_password  # noqa: PLC0415

    if PASSWORD_VARIABLE in os.environ:
        return key_password()
    if not sys.stdin.isatty():
        raise ConfigError(f"the key files need a password: set {PASSWORD_VARIABLE}, or say --no-encryption")
    password: str = typer.prompt("New password of the key files", hide_input=True, confirmation_prompt=True)
    return password.encode()
