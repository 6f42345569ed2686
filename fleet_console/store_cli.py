"""`shoal store`: what the samples take, and making room."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

store_app = typer.Typer(help="Look after the cloud's store of samples.", no_args_is_help=True)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The cloud's TOML file.", exists=True, dir_okay=False)
]


@store_app.command()
def prune(
    config: ConfigOption,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be dropped.")] = False,
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Then write the file anew without free pages, which takes as much room again."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Drop the samples that `[retention]` lets go of, as ingest does by itself; what they were is known still.

    Never what a person labelled, what a model got wrong, or what is younger than `keep_days`.
    """
    from cloud.retention import Sweep  # noqa: PLC0415
    from cloud.services import open_samples  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    settings = load_config(config, CloudSettings)
    limits = settings.retention.limits()
    store = open_samples(settings)
    try:
        too_old = too_much = freed = left = 0
        sweep: Sweep | None = Sweep()
        while sweep is not None:
            done = store.prune_samples(sweep, limits, time.time_ns() // 1000, dry_run=dry_run)
            too_old, too_much, freed = too_old + done.too_old, too_much + done.too_much, freed + done.freed_bytes
            left, sweep = max(0, done.excess_bytes - done.freed_bytes), done.next
        if compact and not dry_run:
            store.compact()
        room = store.room()
    finally:
        store.close()
    if as_json:
        figures = {"too_old": too_old, "too_much": too_much, "freed_bytes": freed, "above_limit_bytes": left}
        typer.echo(json.dumps({"dry_run": dry_run, **figures, **asdict(room)}))
        return
    verb = "would be dropped" if dry_run else "dropped"
    typer.echo(f"{too_old} samples too old and {too_much} too much {verb}, {freed} bytes of readings")
    typer.echo(f"The store takes {room.used_bytes} bytes, and {room.free_bytes} are free in its file")
    if left:
        typer.echo(f"{left} bytes above its limit are of samples that are kept")
    if room.free_bytes and not room.is_shrinking:
        typer.echo("An earlier version made the file, so it keeps its size; --compact writes it anew once")
