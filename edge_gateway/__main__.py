"""Entry point: python -m edge_gateway --config gateway.toml."""

import argparse
import logging
import sys
from pathlib import Path

from edge_gateway.service import GatewaySettings, run
from shoal.config import load_config
from shoal.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edge_gateway", description="Run a Shoal gateway.")
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see docs/gateway.md")
    parser.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        run(load_config(arguments.config, GatewaySettings))
    except ConfigError as exc:
        print(exc, file=sys.stderr)  # noqa: T201  the operator's one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
