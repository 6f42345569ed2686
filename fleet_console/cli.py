"""The `shoal` command line. Each command imports what it needs, so that `--help` is quick and extras stay optional."""

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from fleet_console.broker import BrokerKind, choose_kind, run_foreground
from fleet_console.command import command
from fleet_console.gateway_cli import gateway_app
from fleet_console.keys_cli import keys_app
from fleet_console.label_cli import label_app
from fleet_console.pipeline_cli import pipeline_app
from fleet_console.provision_cli import provision_app
from fleet_console.release_cli import models, release_app
from fleet_console.runs_cli import runs_app
from fleet_console.store_cli import store_app
from shoal.errors import ShoalError

app = typer.Typer(
    help="Run machine-learning models across a fleet of devices, gateways and the cloud, over MQTT.",
    epilog="Start with `shoal demo`. The brokers' address comes from SHOAL_BROKER or a configuration file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_INTERRUPTED = 130


class BrokerChoice(StrEnum):
    """What `--broker-kind` takes."""

    AUTO = "auto"
    MOSQUITTO = "mosquitto"
    IOTCORE = "iotcore"


ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="TOML file.")]
KindOption = Annotated[
    BrokerChoice, typer.Option(help="Which broker to start; auto takes Mosquitto where it is installed.")
]


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where the report goes.", file_okay=False)] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Decides the training, the readings' order and the drift's jitter.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path with fewer readings: under two minutes.")
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Start a process again that dies (see run/pids.json) instead of ending."),
    ] = False,
    broker_kind: KindOption = BrokerChoice.AUTO,
) -> None:
    """Show the whole loop on real data: two fleets, drift, retraining, release, recovery.

    Starts a broker, the cloud's services, a gateway and 24 simulated devices as processes that share nothing but MQTT
    topics. Writes `report.json` and `report.html`; exits 0 only if the loop closed. SHOAL_BROKER=mqtt://host:port uses
    a broker that runs already.
    """
    from fleet_console.demo.plan import Options  # noqa: PLC0415
    from fleet_console.demo.run import run_demo  # noqa: PLC0415

    options = Options(
        out=out,
        seed=seed,
        quick=quick,
        keep_going=keep_going,
        broker_kind=_kind(broker_kind),
        broker_url=os.environ.get("SHOAL_BROKER"),
    )
    raise typer.Exit(run_demo(options, Console()))


@app.command()
def broker(
    port: Annotated[int, typer.Option(help="Loopback port to listen on.", min=1, max=65535)] = 1883,
    directory: Annotated[Path, typer.Option(help="For its configuration, database and log.")] = Path(
        "shoal-data/broker"
    ),
    kind: KindOption = BrokerChoice.AUTO,
) -> None:
    """Run an MQTT 5 broker on loopback for trying Shoal: Mosquitto if it is installed, otherwise the embedded one."""
    chosen = _kind(kind) or choose_kind()
    Console(stderr=True).print(
        Text(f"{chosen.value} on mqtt://127.0.0.1:{port}, files in {directory}; Ctrl-C ends it"), soft_wrap=True
    )
    raise typer.Exit(run_foreground(directory, chosen, port))


@app.command()
def watch(
    filters: Annotated[
        list[str] | None, typer.Argument(help="MQTT topic filters; by default everything of Shoal's but model chunks.")
    ] = None,
    broker: Annotated[str, typer.Option(envvar="SHOAL_BROKER", help="The broker's address.")] = "mqtt://127.0.0.1:1883",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a message, for machines.")] = False,
    count: Annotated[int, typer.Option(help="End after this many messages; 0 never does.", min=0)] = 0,
) -> None:
    """Print messages as they pass, protobuf decoded. R marks retained ones."""
    from fleet_console.watch import watch as run  # noqa: PLC0415

    run(broker, filters, as_json=as_json, count=count)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def device(context: typer.Context) -> None:
    """Run and look after the agent of one device: init, run, check, outbox; see docs/device.md."""
    from device_agent.commands import main as run  # noqa: PLC0415

    raise typer.Exit(run(context.args))


class CloudService(StrEnum):
    """What `shoal cloud` takes."""

    INIT = "init"
    INGEST = "ingest"
    TRAINER = "trainer"
    PUBLISHER = "publisher"


@app.command()
def cloud(service: Annotated[CloudService, typer.Argument(help="Which service.")], config: ConfigOption) -> None:
    """Run one of the cloud's services, or `init` to make its keys, stores and the root that nodes trust."""
    from cloud import services  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    _log_to_stderr()
    settings = load_config(config, CloudSettings)
    if service is CloudService.INIT:
        typer.echo(services.init(settings))
    elif service is CloudService.INGEST:
        services.run_ingest(settings)
    elif service is CloudService.TRAINER:
        services.run_trainer(settings, config)
    else:
        services.run_publisher(settings)


app.add_typer(gateway_app, name="gateway")
app.add_typer(release_app, name="release")
app.add_typer(pipeline_app, name="pipeline")
app.add_typer(runs_app, name="runs")
app.command()(models)
app.command()(command)
app.add_typer(keys_app, name="keys")
app.add_typer(provision_app, name="provision")
app.add_typer(label_app, name="label")
app.add_typer(store_app, name="store")


def main() -> NoReturn:
    """Run a command; an operator's mistake is one line and exit status 2, Ctrl-C is 130."""
    try:
        app()
    except ShoalError as exc:
        Console(stderr=True).print(Text.assemble(("shoal:", "red"), f" {exc}"), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    sys.exit(0)


def _kind(choice: BrokerChoice) -> BrokerKind | None:
    return None if choice is BrokerChoice.AUTO else BrokerKind(choice.value)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
