"""`shoal pipeline`: run, watch and show pipeline files. A run needs no services but a broker."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cloud.pipelines.file import Pipeline
    from cloud.pipelines.registry import StepStatus
    from cloud.settings import CloudSettings

pipeline_app = typer.Typer(
    help="Train, prune, quantize, prove and deploy models, as a YAML file says.", no_args_is_help=True
)

# EX_TEMPFAIL of sysexits.h: run it again and it goes on.
_STOPPED = 75
_REFUSED = 3
_SHORT = 12
_DEFAULT_DATA = Path("shoal-data/cloud")

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="The pipeline, see docs/pipeline.md.", dir_okay=False)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The cloud's TOML file; without one, --data-dir and --broker say all."),
]
DataOption = Annotated[Path, typer.Option(help="Where stores, keys and the registry are; made where it is not there.")]
BrokerOption = Annotated[str, typer.Option(envvar="SHOAL_BROKER", help="The broker's address.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]


@pipeline_app.command()
def run(
    file: FileArgument,
    config: ConfigOption = None,
    data_dir: DataOption = _DEFAULT_DATA,
    broker: BrokerOption = "mqtt://127.0.0.1:1883",
    *,
    publish: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Wait until the broker has the release, or only queue it.")
    ] = True,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for the broker.", min=0)] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Run a pipeline once: what is done already is not done again, and a run that was killed goes on.

    Exit status: 0 it is deployed; 3 the gate refused it; 75 it was told to stop, run it again; 2 anything else.
    """
    from cloud.pipelines.command import opened_engine, publish_waiting, stopping_on_signals  # noqa: PLC0415
    from cloud.pipelines.engine import StoppedError  # noqa: PLC0415
    from cloud.pipelines.evaluate import RefusedError  # noqa: PLC0415

    settings, pipeline = _open(file, config, data_dir, broker)
    console = Console(stderr=True)
    try:
        with (
            stopping_on_signals(),
            _shown(console, len(pipeline.steps)) as shown,
            opened_engine(settings, file, pipeline, shown) as engine,
        ):
            ended = engine.run("asked for")
            if publish and any(step.step_name == "deploy_to_edge" for step in pipeline.steps):
                shown.line(f"publishing to {settings.broker.url}")
                publish_waiting(settings, wait_s)
            steps = engine.registry.steps(ended.id)
    except StoppedError as exc:
        console.print(Text(f"stopped: {exc}; the same command goes on"), soft_wrap=True)
        raise typer.Exit(_STOPPED) from exc
    except RefusedError as exc:
        console.print(Text.assemble(("refused: ", "red"), str(exc)), soft_wrap=True)
        raise typer.Exit(_REFUSED) from exc
    if as_json:
        outputs = {step.output_name: step.output_digest for step in steps}
        typer.echo(json.dumps({"run": ended.id, "model": ended.model, "release": ended.release, "outputs": outputs}))
        return
    for step in steps:
        typer.echo(
            f"{step.name:<16} {step.status:<10} {step.seconds:6.1f} s  {step.output_name} {step.output_digest[:_SHORT]}"
        )
    typer.echo(f"run {ended.id}: release {ended.release} of {ended.model}; more with `shoal runs show {ended.id}`")


@pipeline_app.command()
def watch(
    file: FileArgument,
    config: ConfigOption = None,
    data_dir: DataOption = _DEFAULT_DATA,
    broker: BrokerOption = "mqtt://127.0.0.1:1883",
) -> None:
    """Run a pipeline whenever its triggers say so, until SIGINT or SIGTERM: labels, drift, hours, or by command.

    The services `ingest` and `publisher` of the same data directory bring samples and take releases: `shoal cloud`.
    """
    import logging  # noqa: PLC0415

    from cloud import services  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings, _ = _open(file, config, data_dir, broker)
    if config is None:
        config = settings.directory / "watch.toml"
        config.write_text(_toml(settings), encoding="utf-8")
    services.run_trainer(settings, config)


@pipeline_app.command()
def show(
    file: FileArgument,
    config: ConfigOption = None,
    data_dir: DataOption = _DEFAULT_DATA,
    *,
    as_json: JsonOption = False,
) -> None:
    """Check a pipeline file, and say what each of its steps takes and makes, and whether a run would do it again."""
    from cloud.pipelines.command import opened_engine  # noqa: PLC0415
    from cloud.pipelines.engine import LoggedProgress  # noqa: PLC0415

    settings, pipeline = _read(file, config, data_dir, "")
    done: dict[str, str | None] = {}
    if settings.samples_path.is_file():
        with opened_engine(settings, file, pipeline, LoggedProgress(pipeline.model)) as engine:
            done = {planned.step.output: planned.output_digest for planned in engine.plan()}
    steps = pipeline.steps
    if as_json:
        rows = [
            {"step": step.step_name, "inputs": step.input_names, "output": step.output, "made": done.get(step.output)}
            for step in steps
        ]
        typer.echo(json.dumps({"model": pipeline.model, "task": pipeline.task, "steps": rows}))
        return
    typer.echo(f"{file}: makes {pipeline.model} by task {pipeline.task}")
    for step in steps:
        made = done.get(step.output)
        state = f"unchanged {made[:_SHORT]}" if made else "would run"
        typer.echo(f"  {step.step_name:<16} {', '.join(step.input_names)} -> {step.output:<12} {state}")


def _read(file: Path, config: Path | None, data_dir: Path, broker: str) -> "tuple[CloudSettings, Pipeline]":
    from cloud.pipelines.command import settings_of  # noqa: PLC0415
    from cloud.pipelines.file import load_pipeline  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    pipeline = load_pipeline(file)
    settings = (
        load_config(config, CloudSettings) if config is not None else settings_of(file, pipeline, data_dir, broker)
    )
    return settings, pipeline


def _open(file: Path, config: Path | None, data_dir: Path, broker: str) -> "tuple[CloudSettings, Pipeline]":
    """Read everything; make the data directory where no configuration names one that somebody else must make."""
    from cloud import services  # noqa: PLC0415

    settings, pipeline = _read(file, config, data_dir, broker)
    if config is None and not settings.samples_path.is_file():
        root = services.init(settings)
        Console(stderr=True).print(
            Text(f"made {settings.directory}: keys are NOT encrypted; nodes need {root}"), soft_wrap=True
        )
    return settings, pipeline


def _toml(settings: "CloudSettings") -> str:
    import msgspec  # noqa: PLC0415
    import tomli_w  # noqa: PLC0415

    table = msgspec.to_builtins(settings)
    table["broker"] = {name: value for name, value in table["broker"].items() if value is not None}
    return tomli_w.dumps(table)


@dataclass(slots=True)
class _Shown:
    """A bar for the steps, and one for what is being trained; without a terminal, a line for each step."""

    console: Console
    total: int
    bars: Progress
    steps: TaskID
    series: dict[str, TaskID] = field(default_factory=dict)

    def step(self, position: int, total: int, name: str, status: "StepStatus") -> None:
        running = status.value == "running"
        self.bars.update(self.steps, total=total, completed=position - running, description=name)
        for bar in self.series.values():
            self.bars.remove_task(bar)
        self.series.clear()
        if not self.console.is_terminal:
            self.console.print(Text(f"{position}/{total} {name}: {status.value}"), soft_wrap=True)

    def line(self, text: str) -> None:
        if self.console.is_terminal:
            self.bars.update(self.steps, note=text)
        else:
            self.console.print(Text(f"    {text}"), soft_wrap=True)

    def measure(self, series: str, x: int, last: int, figures: "Mapping[str, float]") -> None:
        bar = self.series.get(series)
        if bar is None:
            bar = self.series[series] = self.bars.add_task(f"  {series}", total=last, note="")
        note = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.bars.update(bar, completed=x, note=note)


@contextmanager
def _shown(console: Console, total: int) -> "Iterator[_Shown]":
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _Shown(console, total, bars, bars.add_task("starting", total=total, note=""))
