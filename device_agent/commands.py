"""`shoal device`: what is done on a device itself. Needs nothing but the device's own dependencies.

shoal device run --config agent.toml
shoal device check --config agent.toml
shoal device outbox --config agent.toml
shoal device outbox --config agent.toml --quarantined
shoal device outbox size --rate 10 --hours 6
"""

import argparse
import base64
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from device_agent.agent import AgentSettings, run
from device_agent.check import check
from device_agent.outbox_report import Quarantined, read_outbox, read_quarantine, size_for
from shoal.config import load_config
from shoal.errors import ConfigError

_WRONG = 1
_MISTAKE = 2


def main(arguments: Sequence[str] | None = None, prog: str = "shoal device") -> int:
    """Run a command; return its exit status: 0, 1 where `check` found something, 2 for an operator's mistake."""
    options = _parser(prog).parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigError as exc:
        print(f"shoal: {exc}", file=sys.stderr)  # noqa: T201  the operator's one line
        return _MISTAKE


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Run and look after the Shoal agent of this device.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    running = commands.add_parser("run", help="run the agent until Ctrl-C or SIGTERM")
    _add_config(running)
    running.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: %(default)s)")
    running.set_defaults(command=_run)
    checking = commands.add_parser("check", help="say in plain words what is wrong; starts nothing")
    _add_config(checking)
    checking.add_argument("--json", action="store_true", help="one JSON object a finding, for machines")
    checking.set_defaults(command=_check)
    outbox = commands.add_parser("outbox", help="what waits for the gateway; the agent may run")
    outbox.add_argument("--config", "-c", type=Path, help="TOML file, see docs/devices.md")
    outbox.add_argument("--quarantined", action="store_true", help="the readings that were refused for ever, and why")
    outbox.add_argument("--json", action="store_true", help="one JSON object, or one a reading, for machines")
    outbox.set_defaults(command=_outbox)
    sizing = outbox.add_subparsers(metavar="size", title="question").add_parser(
        "size", help="how large it must be to lose nothing while the gateway is silent"
    )
    sizing.add_argument("--rate", type=float, required=True, help="readings a second")
    sizing.add_argument("--hours", type=float, required=True, help="of silence")
    sizing.add_argument("--share", type=float, default=1.0, help="of readings that are asked (default: %(default)s)")
    sizing.add_argument("--bytes", type=int, default=100, help="of an asked reading (default: %(default)s)")
    sizing.add_argument("--json", action="store_true", help="one JSON object, for machines")
    sizing.set_defaults(command=_outbox_size)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", "-c", type=Path, required=True, help="TOML file, see docs/devices.md")


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run(load_config(options.config, AgentSettings))
    return 0


def _check(options: argparse.Namespace) -> int:
    settings = load_config(options.config, AgentSettings)
    is_well = True
    for finding in check(settings):
        is_well &= finding.is_well
        if options.json:
            _say(json.dumps(dataclasses.asdict(finding)))
        else:
            _say(f"{'ok   ' if finding.is_well else 'WRONG'}  {finding.name:<15} {finding.text}")
    return 0 if is_well else _WRONG


def _outbox(options: argparse.Namespace) -> int:
    if options.config is None:
        raise ConfigError("--config is missing: which device's outbox?")
    path = Path(load_config(options.config, AgentSettings).data_dir) / "outbox.sqlite"
    if options.quarantined:
        for reading in read_quarantine(path):
            _say(json.dumps(_as_json(reading)) if options.json else _as_text(reading))
        return 0
    report = read_outbox(path)
    if options.json:
        _say(json.dumps(dataclasses.asdict(report)))
        return 0
    models = ", ".join(f"{count} for {model}" for model, count in report.by_model.items())
    _say(f"{report.waiting} readings wait, {report.waiting_bytes} bytes{f': {models}' if models else ''}")
    _say(f"{report.quarantined} readings in quarantine{': see --quarantined' if report.quarantined else ''}")
    _say(f"the file takes {report.file_bytes} bytes")
    for name, value in report.counters.items():
        _say(f"  {name:<24} {value}")
    return 0


def _as_text(reading: Quarantined) -> str:
    at = datetime.fromtimestamp(reading.refused_at, UTC)
    where = f" {reading.field}" if reading.field else ""
    return f"{at:%Y-%m-%dT%H:%M:%SZ}  {reading.seq:>8}  {reading.status}{where}: {reading.message}"


def _as_json(reading: Quarantined) -> dict[str, object]:
    return dataclasses.asdict(reading) | {
        "epoch": reading.epoch.hex(),
        "payload": base64.b64encode(reading.payload).decode(),
    }


def _outbox_size(options: argparse.Namespace) -> int:
    size = size_for(options.rate, options.hours, options.share, options.bytes)
    if options.json:
        _say(json.dumps(dataclasses.asdict(size)))
    else:
        _say(f"outbox_items = {size.outbox_items}\noutbox_bytes = {size.outbox_bytes}")
        _say(f"# on disk: about {size.disk_bytes} bytes")
    return 0


def _say(line: str) -> None:
    print(line)  # noqa: T201  a command's answer
