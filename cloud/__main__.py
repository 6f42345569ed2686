"""Entry point: python -m cloud init|ingest|trainer|publisher --config cloud.toml."""

import argparse
import logging
import sys
from pathlib import Path

from cloud import services
from cloud.settings import CloudSettings
from shoal.config import load_config
from shoal.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloud", description="Run one of Shoal's cloud services.")
    parser.add_argument("service", choices=["init", "ingest", "trainer", "publisher"])
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see docs/cloud.md")
    parser.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = load_config(arguments.config, CloudSettings)
        if arguments.service == "init":
            print(services.init(settings))  # noqa: T201  the file to provision nodes with
        elif arguments.service == "ingest":
            services.run_ingest(settings)
        elif arguments.service == "trainer":
            services.run_trainer(settings, arguments.config)
        else:
            services.run_publisher(settings)
    except ConfigError as exc:
        print(exc, file=sys.stderr)  # noqa: T201  the operator's one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
