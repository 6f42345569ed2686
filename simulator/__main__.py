"""Entry point: python -m simulator fleet|labeller --config FILE."""

import argparse
import logging
import sys
from pathlib import Path

from shoal.config import load_config
from shoal.errors import ConfigError
from simulator import fleet, labeller


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulator", description="Run one process of a simulated fleet.")
    parser.add_argument("role", choices=["fleet", "labeller"])
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        if arguments.role == "fleet":
            fleet.run(load_config(arguments.config, fleet.FleetSettings))
        else:
            labeller.run(load_config(arguments.config, labeller.LabellerSettings))
    except ConfigError as exc:
        print(exc, file=sys.stderr)  # noqa: T201  the operator's one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
