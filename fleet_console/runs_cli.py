"""`shoal runs`: what pipelines were run, from what, and what came of it."""

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from shoal.errors import ConfigError

if TYPE_CHECKING:
    from cloud.pipelines.registry import Registry, Run, StepRow

runs_app = typer.Typer(help="List what pipelines were run; `show` draws one run.", invoke_without_command=True)

_SHORT = 12
_DEFAULT_DATA = Path("shoal-data/cloud")

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="The cloud's TOML file, or use --data-dir.")]
DataOption = Annotated[Path, typer.Option(help="Where the registry is.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]


@runs_app.callback()
def list_runs(
    context: typer.Context,
    config: ConfigOption = None,
    data_dir: DataOption = _DEFAULT_DATA,
    *,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    count: Annotated[int, typer.Option(help="At most so many, the newest first.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List runs, the newest first: when, why, and how they ended."""
    context.obj = (config, data_dir)
    if context.invoked_subcommand is not None:
        return
    with _registry(config, data_dir) as registry:
        runs = registry.runs(model, limit=count)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs]))
        return
    table = Table(
        Column("run", no_wrap=True), "model", "started", "took", "status", "release", "labelled", "reason", box=None
    )
    for run in runs:
        ended = run.error or run.reason
        release = str(run.release) if run.release else ""
        table.add_row(
            run.id[:_SHORT],
            run.model,
            when(run.started_at_us),
            took(run),
            run.status,
            release,
            str(run.labelled),
            ended,
        )
    Console(soft_wrap=True, highlight=False).print(table)


@runs_app.command()
def show(
    context: typer.Context,
    run_id: Annotated[str, typer.Argument(metavar="ID", help="A run, or how its id begins; `last` is the newest.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Where the page goes (run-ID.html).", dir_okay=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Say everything about one run, and draw it: an HTML page with training curves, sizes, speeds and metrics."""
    from fleet_console.runs_page import write_page  # noqa: PLC0415

    with _registry(*context.obj) as registry:
        run = _find(registry, run_id)
        steps, metrics = registry.steps(run.id), registry.metrics(run.id)
        if as_json:
            typer.echo(json.dumps({"run": asdict(run), "steps": [asdict(step) for step in steps]}))
            return
        releases = registry.releases(run.model)
        origin = {step.key: registry.origin(step.key) for step in steps}
        for step in steps:
            # What an earlier run trained is drawn here too: it is this run's model.
            earlier = origin[step.key]
            if step.status == "unchanged" and earlier is not None:
                metrics += [metric for metric in registry.metrics(earlier) if metric.step == step.name]
    _print(run, steps)
    path = out or Path(f"run-{run.id[:_SHORT]}.html")
    write_page(path, run, steps, metrics, releases)
    typer.echo(f"drawn in {path}")


def _print(run: "Run", steps: "list[StepRow]") -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"run {run.id} of {run.model}: {run.status}" + (f", {run.error}" if run.error else ""))
    console.print(
        f"  {run.pipeline} ({run.pipeline_digest[:_SHORT]}), {run.reason}; {when(run.started_at_us)}, took {took(run)}"
    )
    console.print(f"  seed {run.seed}, threads {run.threads}, {run.machine}, {run.labelled} labelled samples")
    console.print(f"  samples {run.samples_digest[:_SHORT]}, field {run.field_digest[:_SHORT]}")
    for step in steps:
        made = f"{step.output_name} {step.output_digest[:_SHORT]}" if step.output_digest else ""
        console.print(f"  {step.position} {step.name:<16} {step.status:<10} {step.seconds:7.1f} s  {made}")
    for tier, report in next((step.figures["tiers"] for step in steps if "tiers" in step.figures), {}).items():
        console.print(f"  {tier} ships {report['ships']}: {report['reason']}")


def _find(registry: "Registry", prefix: str) -> "Run":
    found = registry.runs(limit=1) if prefix == "last" else registry.run(prefix)
    if len(found) != 1:
        raise ConfigError(f"{len(found) or 'no'} runs begin with {prefix!r}: `shoal runs` lists them")
    return found[0]


@contextmanager
def _registry(config: Path | None, data_dir: Path) -> "Iterator[Registry]":
    from cloud.pipelines.registry import Registry  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    path = (load_config(config, CloudSettings) if config else CloudSettings(str(data_dir), [])).registry_path
    if not path.is_file():
        raise ConfigError(f"{path} is not there: nothing was run yet, or --config or --data-dir names another place")
    registry = Registry(path)
    try:
        yield registry
    finally:
        registry.close()


def when(at_us: int) -> str:
    return f"{dt.datetime.fromtimestamp(at_us / 1e6, dt.UTC):%Y-%m-%d %H:%M:%S}Z"


def took(run: "Run") -> str:
    return f"{(run.ended_at_us - run.started_at_us) / 1e6:.1f} s" if run.ended_at_us else ""
