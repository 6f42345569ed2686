"""The command line as an operator meets it."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from fleet_console.broker import free_port
from fleet_console.cli import CloudService, app, main

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0
SHOAL = [sys.executable, "-c", "from fleet_console.cli import main; main()"]


def commands(group, path=()):
    """Every command below a group, by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = list(commands(typer.main.get_command(app)))


@pytest.fixture(scope="session")
def documents():
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(path):
    """`--help` works for each and says what it does and what each option is for."""
    result = CliRunner().invoke(app, [*path, "--help"], prog_name="shoal", terminal_width=120)
    assert result.exit_code == 0
    assert f"usage: shoal {' '.join(path)}" in result.output.lower()
    command = typer.main.get_command(app)
    for word in path:
        command = command.commands[word]
    assert command.help
    assert [option.name for option in command.params if not getattr(option, "help", None)] == []


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_is_documented(path, documents):
    """The README or a page in docs shows it as it is typed."""
    assert re.search(rf"\bshoal {' '.join(path)}\b", documents)


ATTACKS = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "models.md").read_text())


@pytest.mark.parametrize(("file", "test"), ATTACKS)
def test_every_attack_of_the_documents_has_its_test(file, test):
    """What the table of attacks names is there to be run."""
    (path,) = ROOT.glob(f"tests/**/{file}")
    assert f"def {test}(" in path.read_text()


def test_attacks_are_found_in_the_documents():
    """What the last test looks for, it can find; and every test of attacks is in the table."""
    named = {test for file, test in ATTACKS if file == "test_attacks.py"}
    there = re.findall(r"^def (test_\w+)\(", (ROOT / "tests/shoal/release/test_attacks.py").read_text(), re.MULTILINE)
    assert set(there) - named == {"test_attacked_chunk_costs_no_other_chunk"}


@pytest.mark.parametrize("service", CloudService)
def test_every_cloud_service_is_documented(service, documents):
    """So for the services, which are arguments of one command."""
    assert f"shoal cloud {service.value}" in documents


def test_commands_are_listed_without_one():
    """`shoal` alone is a question for help."""
    result = CliRunner().invoke(app, [], terminal_width=120)
    assert {path[0] for path in COMMANDS} <= set(result.output.split())


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; return its exit status and what it printed."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.delenv("SHOAL_BROKER", raising=False)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["shoal", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return run


SERVICES = [["gateway", "run"], *(["cloud", service.value] for service in CloudService)]


@pytest.mark.parametrize("service", SERVICES, ids=" ".join)
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file or directory"),
        ("colour = 1", "unknown field `colour`|missing required field"),
        ("[broken", "Invalid|Expected|expected"),
    ],
    ids=["missing", "unknown key", "no TOML"],
)
def test_wrong_configuration_is_one_line_and_exit_status_2(run, tmp_path, service, content, named):
    """Nothing starts; the line names the file and what is wrong with it, however long that is."""
    path = tmp_path / ("a-rather-long-name-that-a-terminal-would-wrap" * 2 + ".toml")
    if content is not None:
        path.write_text(content)
    status, out, err = run(*service, "--config", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"shoal: {path}: ")
    assert re.search(named, err)


def test_brackets_in_a_message_are_shown(run, tmp_path):
    """What is wrong is printed as it is, and not taken for markup."""
    path = tmp_path / "agent.toml"
    keys = {"site": "[/red]", "node": "n", "model": "m", "data_dir": str(tmp_path), "trusted_root": "root.json"}
    lines = [
        *(f'{key} = "{value}"' for key, value in keys.items()),
        "[source]",
        'kind = "csv"',
        'path = "x.csv"',
        'columns = ["a"]',
    ]
    path.write_text("\n".join(lines))
    status, _, err = run("device", "run", "--config", str(path))
    assert status == 2
    assert err == "shoal: site: '[/red]' is not an id ([a-z0-9][a-z0-9_-]{0,62})\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--broker", "http://nowhere"], "expected mqtt://host:port"),
        (["--broker", "mqtt://127.0.0.1:1"], "start one with `shoal broker`"),
    ],
)
def test_watch_without_a_broker_says_so(run, arguments, named):
    """One line, with what to do."""
    status, out, err = run("watch", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_demo_does_not_take_a_file_for_a_folder(run, tmp_path):
    """What is in the way is not removed."""
    (tmp_path / "out").write_text("mine")
    status, _, err = run("demo", "--out", str(tmp_path / "out"))
    assert status == 2
    assert "out" in err
    assert (tmp_path / "out").read_text() == "mine"


def test_taken_port_is_one_line_and_exit_status_2(run, tmp_path, broker):
    """The broker's own complaint reaches the operator."""
    status, out, err = run("broker", "--port", str(broker.port), "--directory", str(tmp_path))
    assert (status, out) == (2, "")
    assert f"shoal: port {broker.port} is taken" in err


@pytest.fixture
def start():
    """Start `shoal` as a process."""
    started = []

    def start(*arguments):
        environment = {key: value for key, value in os.environ.items() if key != "SHOAL_BROKER"}
        process = subprocess.Popen(
            [*SHOAL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_broker_runs_until_it_is_told_to_end(start, tmp_path, number):
    """It listens, and no process of it is left, whoever ends it."""
    port = free_port()
    process = start("broker", "--port", str(port), "--directory", str(tmp_path / "broker"))
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        assert time.monotonic() < deadline
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert f"mqtt://127.0.0.1:{port}, files in {tmp_path / 'broker'}; Ctrl-C ends it\n" in err
    assert not any(child.is_running() for child in children)


def test_ctrl_c_is_exit_status_130(start, broker):
    """As for every Unix command."""
    process = start("watch", "shoal/v1/up/nobody/#", "--broker", broker.url)
    ours = psutil.Process(process.pid)
    deadline = time.monotonic() + PATIENCE_S
    while not any(connection.status == "ESTABLISHED" for connection in ours.net_connections()):
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
