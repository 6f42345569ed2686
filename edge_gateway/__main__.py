"""Entry point.

python -m edge_gateway --config gateway.toml
python -m edge_gateway --model resnet18.onnx --devices cam01,cam02 --broker mqtt://localhost:1883
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from edge_gateway.deploy import Deploy
from edge_gateway.service import GatewaySettings, run
from shoal.config import load_config
from shoal.errors import ConfigError, ShoalError


def main() -> int:
    arguments = _parser().parse_args()
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        if arguments.config is not None:
            run(load_config(arguments.config, GatewaySettings))
        else:
            _serve_files(arguments)
    except (ShoalError, ValueError) as exc:
        print(exc, file=sys.stderr)  # noqa: T201  the operator's one line
        return 2 if isinstance(exc, ConfigError | ValueError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edge_gateway",
        description="Run a Shoal gateway: managed by the cloud, or with local ONNX files.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="TOML file of a managed gateway, see docs/gateway.md")
    what.add_argument("--model", action="append", help="ONNX file to serve without a cloud; may be given again")
    parser.add_argument("--devices", default="", help="whom to serve, by commas (default: every device of the site)")
    parser.add_argument(
        "--broker",
        default=os.environ.get("SHOAL_BROKER", "mqtt://127.0.0.1:1883"),
        help="its address (default: SHOAL_BROKER, or %(default)s)",
    )
    parser.add_argument("--site", default="site", help="(default: %(default)s)")
    parser.add_argument("--name", default="gw-local", help="of this gateway (default: %(default)s)")
    parser.add_argument("--max-batch-size", type=int, default=32, help="rows of one model call (default: %(default)s)")
    parser.add_argument("--max-delay-ms", type=float, default=0.0, help="a first row's wait (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="threads for slow models (default: one a core)")
    parser.add_argument("--metrics-address", default="127.0.0.1:5000", help="empty for none (default: %(default)s)")
    parser.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: %(default)s)")
    return parser


def _serve_files(arguments: argparse.Namespace) -> None:
    stops = {signal.SIGTERM, signal.SIGINT}
    # Blocked before the first thread is made, so that all of them leave both to `sigwait`.
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    service = Deploy(
        arguments.model,
        [device for device in arguments.devices.split(",") if device],
        arguments.max_batch_size,
        broker=arguments.broker,
        site=arguments.site,
        name=arguments.name,
        max_delay_ms=arguments.max_delay_ms,
        metrics_address=arguments.metrics_address,
        workers=arguments.workers,
    )
    with service:
        logging.getLogger(__name__).info("serving models=%s broker=%s", ",".join(service.models), arguments.broker)
        signal.sigwait(stops)
        logging.getLogger(__name__).info("stopping stats=%s", service.stats())


if __name__ == "__main__":
    sys.exit(main())
