"""`shoal release` and `shoal models`: bring a model of one's own, check a store, see what is out."""

import datetime as dt
import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fleet_console.models import Listed, Listing


class Resizing(StrEnum):
    """The ways to bring a picture to a model's size."""

    AREA = "area"
    NEAREST = "nearest"


release_app = typer.Typer(help="Release a model of your own, and check what is released.", no_args_is_help=True)

_SHORT_DIGEST = 12
_HEADINGS = ("model", "release", "for", "bytes", "sha256", "signed by", "plan", "runs on")
RootOption = Annotated[
    Path | None,
    typer.Option("--root", help="The root that nodes are provisioned with.", exists=True, dir_okay=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]


@release_app.command()
def publish(
    file: Annotated[Path, typer.Argument(help="A .tflite file for devices, or an .onnx file for gateways.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="The cloud's TOML file.", exists=True, dir_okay=False)],
    *,
    model: Annotated[str, typer.Option(help="Whose next release it is; `shoal keys add-model` makes a new one.")],
    golden: Annotated[
        Path | None,
        typer.Option(help="NPZ with `inputs`, and perhaps `outputs` and `tolerance`, that nodes must reproduce."),
    ] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Patterns of nodes that get it; all by default.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Scores above this ask the next layer; by default none does.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Readings in a row that make one input.")] = 1,
    stride: Annotated[int, typer.Option(min=0, help="Readings between two windows' starts; 0: no overlap.")] = 0,
    resize: Annotated[
        Resizing | None, typer.Option(help="Readings are pictures: bring them to the model's size this way.")
    ] = None,
    mean: Annotated[list[float] | None, typer.Option(help="Subtracted; once, or once for each channel.")] = None,
    std: Annotated[list[float] | None, typer.Option(help="Divided by, likewise.")] = None,
) -> None:
    """Release a model that was made elsewhere, with a plan that brings it to its targets at once.

    Shape, score and golden vectors are derived from the file, which only a child process opens. A file that cannot be
    released is refused with the reason, and nothing is queued.
    """
    from cloud import byo  # noqa: PLC0415
    from cloud.keys import FileKeyStore, key_password  # noqa: PLC0415
    from cloud.release_store import ReleaseStore  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415
    from shoal.v1.release_pb2 import ScoreKind  # noqa: PLC0415

    settings = load_config(config, CloudSettings)
    preparation = byo.Preparation(window, stride, resize.value if resize else None, mean or [0.0], std or [1.0])
    described = byo.describe(file, None if golden is None else byo.load_golden(golden), threshold, preparation)
    store, keys = ReleaseStore(settings.releases_dir), FileKeyStore(settings.keys_dir, key_password)
    budget_bytes = settings.retained_budget_bytes
    spec = byo.publish(store, keys, described, model=model, targets=targets or ["*"], budget_bytes=budget_bytes)
    artefact = spec.artefacts[0]
    score = ScoreKind.Name(spec.score).removeprefix("SCORE_KIND_").lower()
    typer.echo(
        f"Queued release {spec.release} of {model}: {artefact.length_bytes} bytes, sha256 {artefact.sha256.hex()}, "
        f"input {list(spec.input.shape)}, score {score} above {artefact.threshold:g}, "
        f"{artefact.golden.inputs.shape[0]} golden vectors within {artefact.golden.tolerance:g}"
    )


@release_app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A release store or a copy of one.", exists=True, file_okay=False)],
    *,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every signature, version, expiry, digest and file, offline; one line a fault, exit status 1 if any."""
    from cloud.verify import verify_store  # noqa: PLC0415

    checked = verify_store(directory, dt.datetime.now(dt.UTC), None if root is None else root.read_bytes())
    if as_json:
        typer.echo(json.dumps({"ok": not checked.faults, **asdict(checked)}, indent=2))
    else:
        for fault in checked.faults:
            typer.echo(fault)
        if not checked.faults:
            versions = ", ".join(f"{role} {version}" for role, version in checked.versions.items())
            typer.echo(f"{checked.files} files, all whole and signed: {versions}")
    raise typer.Exit(1 if checked.faults else 0)


def models(
    broker: Annotated[str, typer.Option(envvar="SHOAL_BROKER", help="The broker's address.")] = "mqtt://127.0.0.1:1883",
    *,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the releases on a broker: size, digest, who signed them, who runs them. All signatures are checked.

    With --root from the root that nodes trust, otherwise from the broker's own first one.
    """
    from fleet_console.models import read_listing  # noqa: PLC0415
    from fleet_console.retained import open_reader  # noqa: PLC0415

    with open_reader(broker) as reader:
        listing = read_listing(reader, None if root is None else root.read_bytes())
    if as_json:
        typer.echo(json.dumps({"root_given": root is not None, **asdict(listing)}, indent=2))
    else:
        _print(listing, is_root_given=root is not None)


def _print(listing: "Listing", *, is_root_given: bool) -> None:
    table = [_HEADINGS, *map(_cells, listing.models)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for model, release, run in listing.others:
        typer.echo(f"{run.site}/{run.node} runs {model} {release} ({run.phase}), which is not among these")
    if listing.room is not None:
        typer.echo(f"Retained: {listing.room.retained_bytes} of at most {listing.room.budget_bytes} bytes")
    if not is_root_given:
        typer.echo("Verified from the broker's own first root: give --root to verify from that of your nodes.")


def _cells(row: "Listed") -> tuple[str, ...]:
    plan = f"{', '.join(row.targets)} {row.share_permille / 10:g} %" if row.targets else "-"
    nodes = ", ".join(f"{run.node} ({run.phase})" for run in row.nodes) or "-"
    signed_by = " ".join(keyid[:_SHORT_DIGEST] for keyid in row.signed_by)
    return (
        row.model,
        str(row.release),
        f"{row.tier} {row.format}",
        str(row.bytes),
        row.sha256[:_SHORT_DIGEST],
        signed_by,
        plan,
        nodes,
    )
