"""The configuration file that `shoal device init` writes."""

import io
import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from device_agent import template
from device_agent.agent import AgentSettings
from device_agent.change import DeadBandSettings
from device_agent.commands import main
from device_agent.sources.settings import SOURCES
from shoal.config import BrokerSettings, load_config

pytestmark = pytest.mark.device

FLAGS = ["--site", "plant", "--node", "dev-1", "--model", "digits", "--broker", "mqtt://gw.local"]
GUIDE = Path(__file__).parents[2] / "docs" / "device.md"


def fields_of(kind):
    return {field.name for field in msgspec.structs.fields(kind)}


@pytest.mark.parametrize("source", SOURCES)
def test_file_loads_and_says_what_the_flags_said(tmp_path, source, capsys):
    """Pins that every kind of source makes a file that the agent takes, without a question."""
    file = tmp_path / "agent.toml"
    assert main(["init", "--config", str(file), *FLAGS, "--source", source]) == 0
    settings = load_config(file, AgentSettings)
    assert (settings.site, settings.node, settings.model) == ("plant", "dev-1", "digits")
    assert settings.broker.url == "mqtt://gw.local"
    assert type(settings.source) is SOURCES[source]
    assert "check" in capsys.readouterr().out


@pytest.mark.parametrize("source", SOURCES)
def test_every_setting_is_in_the_file_with_its_default(source):
    """Pins that a default which is uncommented changes nothing: the file with all of them reads the same."""
    text = template.render(
        dict.fromkeys(("site", "node", "model", "data_dir", "trusted_root"), "x"), "mqtt://h", source
    )
    all_in = re.sub(r"^# (\w+ = |\[answers)", r"\1", text, flags=re.MULTILINE)
    table = tomllib.loads(all_in)
    assert fields_of(AgentSettings) == set(table)
    assert fields_of(BrokerSettings) == set(table["broker"])
    assert fields_of(DeadBandSettings) | {"kind"} == set(table["change"])
    assert fields_of(SOURCES[source]) | {"kind"} == set(table["source"])
    plain, full = (msgspec.toml.decode(one, type=AgentSettings) for one in (text, all_in))
    for name in fields_of(AgentSettings) - {"source", "broker", "answers"}:
        assert getattr(plain, name) in (getattr(full, name), None)  # of what is off by default, an example is shown


def test_nothing_is_overwritten(tmp_path, capsys):
    """Pins that a configuration that somebody wrote stays."""
    file = tmp_path / "agent.toml"
    file.write_text("mine")
    assert main(["init", "--config", str(file), *FLAGS, "--source", "stdin"]) == 2
    assert file.read_text() == "mine"
    assert capsys.readouterr().err == f"shoal: {file}: File exists; nothing was written\n"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (FLAGS[2:], "--site is missing"),
        (["--site", "Plant A", *FLAGS[2:]], "site: 'Plant A' is not an id"),
        ([*FLAGS[:6], "--broker", "http://x"], "expected mqtt://"),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, flags, named):
    """Pins that a script without a terminal is told which flag, and that no half-made file stays."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["init", "--config", str(tmp_path / "agent.toml"), *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "agent.toml").exists()


def test_person_is_asked_for_what_no_flag_says(tmp_path, monkeypatch):
    """Pins the questions: one for each flag that is missing, an empty answer takes the usual one."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    answers = iter(["plant", "dev-9", "digits", "", "host"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    file = tmp_path / "agent.toml"
    assert main(["init", "--config", str(file)]) == 0
    settings = load_config(file, AgentSettings)
    assert (settings.node, settings.broker.url, type(settings.source)) == (
        "dev-9", "mqtt://127.0.0.1:1883", SOURCES["host"],
    )  # fmt: skip


def test_every_setting_is_in_the_guide():
    """Pins the table of docs/device.md against the code."""
    rows = [line for line in GUIDE.read_text().splitlines() if line.startswith("|")]
    shown = set(re.findall(r"`([\w.]+)`", "\n".join(row.split("|")[1] for row in rows)))
    wanted = fields_of(AgentSettings) | {f"broker.{name}" for name in fields_of(BrokerSettings)}
    assert wanted - {"broker"} <= shown
