"""`shoal gateway`: run one, and find its settings."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edge_gateway.replay import Costs, Replayed
    from edge_gateway.tune import Advice

gateway_app = typer.Typer(help="Run a gateway, or find the settings that suit its models.", no_args_is_help=True)

_NOTHING_KEEPS_UP = 1


@gateway_app.command()
def run(config: Annotated[Path, typer.Option("--config", "-c", help="TOML file, see docs/gateway.md.")]) -> None:
    """Run a gateway until Ctrl-C or SIGTERM; see docs/gateway.md."""
    from edge_gateway.service import GatewaySettings  # noqa: PLC0415
    from edge_gateway.service import run as serve  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    serve(load_config(config, GatewaySettings))


@gateway_app.command()
def record(
    site: Annotated[str, typer.Option(help="Whose devices.")],
    out: Annotated[Path, typer.Option(help="The file to write, a line of JSON for each question.", dir_okay=False)],
    *,
    seconds: Annotated[float, typer.Option(help="For how long.", min=0.1)] = 60.0,
    count: Annotated[int, typer.Option(help="End after so many questions; 0 counts none.", min=0)] = 0,
    broker: Annotated[str, typer.Option(envvar="SHOAL_BROKER", help="The broker's address.")] = "mqtt://127.0.0.1:1883",
) -> None:
    """Record which device of a site asks which model when, without what it says: the trace for `shoal gateway tune`.

    Listens beside the gateways, which get their questions all the same.
    """
    from fleet_console.recorder import record as listen  # noqa: PLC0415

    recorder = listen(broker, site, out, seconds, count)
    left = f", {recorder.unreadable} messages could not be read" if recorder.unreadable else ""
    typer.echo(f"{recorder.written} questions in {out}{left}")


@gateway_app.command()
def tune(
    model: Annotated[Path, typer.Option(help="The ONNX file that the gateway serves.", exists=True, dir_okay=False)],
    trace: Annotated[Path, typer.Option(help="What `shoal gateway record` wrote.", exists=True, dir_okay=False)],
    *,
    name: Annotated[str | None, typer.Option(help="The model's name in the trace, where it has several.")] = None,
    cores: Annotated[int, typer.Option(help="Workers to try at most; 0 means as many as there are cores.", min=0)] = 0,
    speed: Annotated[float, typer.Option(help="Replay so many times as fast: what if the fleet grows?", min=0.001)] = 1,
    seconds: Annotated[float, typer.Option(help="To measure for, about.", min=0.1)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Recommend max_batch_size, max_delay_ms and workers: measure the model here, then replay a trace in virtual time.

    Exits 1 where no setting keeps up with the trace.
    """
    from edge_gateway.costs import element_of, measure  # noqa: PLC0415
    from edge_gateway.deploy import local_model  # noqa: PLC0415
    from edge_gateway.service import WINDOW  # noqa: PLC0415
    from edge_gateway.trace import faster, of_model, parse_trace  # noqa: PLC0415
    from edge_gateway.tune import MAX_REQUESTS, advise  # noqa: PLC0415
    from shoal.errors import ConfigError  # noqa: PLC0415

    try:
        with trace.open("rb") as lines:
            asked = of_model(parse_trace(lines), name)
    except ConfigError as exc:
        raise ConfigError(f"{trace}: {exc}") from exc
    served = local_model(asked[0].model, model)
    row_bytes = sum(each.bytes for each in asked) / sum(each.rows for each in asked)
    costs = measure(served, cores or os.cpu_count() or 1, seconds, element=element_of(row_bytes, served.values))
    left_out = max(0, len(asked) - MAX_REQUESTS)
    advice = advise(faster(asked[:MAX_REQUESTS], speed), costs, window=WINDOW)
    if as_json:
        typer.echo(json.dumps(_as_json(advice, costs, left_out), indent=2))
    else:
        _print(advice, costs, left_out)
    raise typer.Exit(0 if advice.best else _NOTHING_KEEPS_UP)


def _print(advice: "Advice", costs: "Costs", left_out: int) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table("max_batch_size", "max_delay_ms", "workers", "p50 ms", "p99 ms", "busy", "batches", "rows each", "")
    for each in advice.tried:
        verdict = "best" if each is advice.best else "" if each.keeps_up else "falls behind"
        figures = _figures(each, costs)
        table.add_row(*map(str, figures.values()), verdict, style="bold green" if each is advice.best else None)
    console = Console()
    console.print(table)
    if left_out:
        console.print(f"The last {left_out} questions of the trace were left out.")
    if advice.best is None:
        console.print(
            "No setting keeps up with this trace: spread the devices over more gateways, or use faster cores."
        )
        return
    best = _figures(advice.best, costs)
    wait = f"p50 {best['p50_ms']} ms, p99 {best['p99_ms']} ms without broker and network, {best['busy_percent']} % busy"
    settings = [f"max_batch_size = {best['max_batch_size']}", f"max_delay_ms = {best['max_delay_ms']}"]
    settings += [f"workers = {best['workers']}"] if best["workers"] != "-" else []
    console.print("\n".join([*settings, f"# {wait}"]), highlight=False)


def _figures(each: "Replayed", costs: "Costs") -> dict[str, object]:
    setting = each.setting
    return {
        "max_batch_size": setting.max_batch_size,
        "max_delay_ms": setting.max_delay_s * 1000,
        # A fast model runs in the loop's own thread.
        "workers": setting.workers if costs.is_slow(setting.max_batch_size) else "-",
        "p50_ms": round(each.quantile_s(0.5) * 1000, 2),
        "p99_ms": round(each.quantile_s(0.99) * 1000, 2),
        "busy_percent": round(each.utilisation * 100),
        "batches": each.batches,
        "rows_each": round(each.rows / max(1, each.batches), 1),
    }


def _as_json(advice: "Advice", costs: "Costs", left_out: int) -> dict[str, object]:
    def described(each: "Replayed") -> dict[str, object]:
        return {**_figures(each, costs), "refused": each.refused, "keeps_up": each.keeps_up}

    return {
        "best": None if advice.best is None else described(advice.best),
        "candidates": [described(each) for each in advice.tried],
        "costs_us": {
            "round": round(costs.round_s * 1e6, 2),
            "request": round(costs.request_s * 1e6, 2),
            "row": round(costs.row_s * 1e6, 2),
            "batch": [
                {"workers": workers, "rows": rows, "us": round(took_s * 1e6, 1)}
                for (workers, rows), took_s in costs.batch_s.items()
            ],
        },
        "left_out": left_out,
    }
