"""`shoal gateway`: run one, and find its settings."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

gateway_app = typer.Typer(help="Run a gateway, or find the settings that suit its models.", no_args_is_help=True)


@gateway_app.command()
def run(config: Annotated[Path, typer.Option("--config", "-c", help="TOML file, see docs/gateway.md.")]) -> None:
    """Run a gateway until Ctrl-C or SIGTERM; see docs/gateway.md."""
    from edge_gateway.service import GatewaySettings  # noqa: PLC0415
    from edge_gateway.service import run as serve  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    serve(load_config(config, GatewaySettings))
