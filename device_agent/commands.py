"""`shoal device`: what is done on a device itself. Needs nothing but the device's own dependencies.

shoal device init --site plant-a --node cam-01 --model digits --broker mqtt://gateway.local --source camera
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
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from device_agent.agent import AgentSettings, check_names, run
from device_agent.check import check
from device_agent.logs import LEVELS, LogFormat, start_logging
from device_agent.outbox_report import Quarantined, read_outbox, read_quarantine, size_for
from device_agent.sources.settings import SOURCES
from device_agent.template import MEANINGS, render
from shoal.config import load_config
from shoal.errors import ConfigError

_WRONG = 1
_MISTAKE = 2
# EX_TEMPFAIL of sysexits(3): try again.
_RESTART = 75
# What `init` needs: meaning, and the usual answer.
_ASKED = {name: (MEANINGS[name], "") for name in ("site", "node", "model")} | {
    "broker": ("where the broker is", "mqtt://127.0.0.1:1883")
}


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
    making = commands.add_parser(
        "init", help="write a configuration file with every setting; asks for what no flag says"
    )
    making.add_argument("--config", "-c", type=Path, default=Path("agent.toml"), help="where (default: %(default)s)")
    for name, (meaning, _) in _ASKED.items():
        making.add_argument(f"--{name}", help=meaning)
    making.add_argument("--source", choices=sorted(SOURCES), help="where readings come from")
    making.add_argument("--data-dir", default="/var/lib/shoal", help="(default: %(default)s)")
    making.add_argument("--trusted-root", default="/etc/shoal/root.json", help="(default: %(default)s)")
    making.set_defaults(command=_init)
    running = commands.add_parser("run", help="run the agent until Ctrl-C or SIGTERM")
    _add_config(running)
    running.add_argument("--log-level", default="INFO", choices=LEVELS, help="(default: %(default)s)")
    running.add_argument("--log-format", default=LogFormat.TEXT, choices=list(LogFormat), help="(default: %(default)s)")
    running.set_defaults(command=_run)
    checking = commands.add_parser("check", help="say in plain words what is wrong; starts nothing")
    _add_config(checking)
    checking.add_argument("--json", action="store_true", help="one JSON object a finding, for machines")
    checking.set_defaults(command=_check)
    outbox = commands.add_parser("outbox", help="what waits for the gateway; the agent may run")
    outbox.add_argument("--config", "-c", type=Path, help="TOML file, see docs/device.md")
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


def _init(options: argparse.Namespace) -> int:
    answers = {
        name: getattr(options, name) or _answer(name, meaning, usual) for name, (meaning, usual) in _ASKED.items()
    }
    source = options.source or _answer("source", f"where readings come from, of {', '.join(sorted(SOURCES))}", "csv")
    if source not in SOURCES:
        raise ConfigError(f"source {source!r}, expected one of {', '.join(sorted(SOURCES))}")
    broker = answers.pop("broker")
    text = render(answers | {"data_dir": options.data_dir, "trusted_root": options.trusted_root}, broker, source)
    check_names(msgspec.toml.decode(text, type=AgentSettings))
    try:
        with options.config.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise ConfigError(f"{options.config}: {exc.strerror}; nothing was written") from exc
    _say(f"{options.config}: see to [source] and trusted_root, then: shoal device check --config {options.config}")
    return 0


def _answer(name: str, meaning: str, usual: str) -> str:
    """Ask a person; where there is none, say which flag is missing."""
    if not sys.stdin.isatty():
        if usual:
            return usual
        raise ConfigError(f"--{name} is missing: {meaning}")
    return input(f"{name} ({meaning}){f' [{usual}]' if usual else ''}: ").strip() or usual


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", "-c", type=Path, required=True, help="TOML file, see docs/device.md")


def _run(options: argparse.Namespace) -> int:
    start_logging(options.log_level, LogFormat(options.log_format))
    return _RESTART if run(load_config(options.config, AgentSettings)) else 0


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
