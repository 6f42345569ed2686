"""`shoal device`, without the console's dependencies."""

import json
import socket
import subprocess
import sys
import time

import pytest

from device_agent.commands import main
from device_agent.outbox_report import size_for
from shoal.delivery.outbox import Item, Key, Limits, Outbox, Refusal

pytestmark = pytest.mark.device

ROOT = {"signed": {"_type": "root", "version": 3, "expires": "2036-01-01T00:00:00Z"}, "signatures": []}


@pytest.fixture
def config(tmp_path):
    """A configuration whose broker is a socket of this test."""
    (tmp_path / "root.json").write_text(json.dumps(ROOT))
    with socket.create_server(("127.0.0.1", 0)) as server:
        path = tmp_path / "agent.toml"
        path.write_text(
            f'site = "plant"\nnode = "dev-1"\nmodel = "m"\ndata_dir = "{tmp_path}/data"\n'
            f'trusted_root = "{tmp_path}/root.json"\noutbox_bytes = 1000000\n'
            f'[source]\nkind = "csv"\npath = "rows.csv"\ncolumns = ["a"]\n'
            f'[broker]\nurl = "mqtt://127.0.0.1:{server.getsockname()[1]}"\n'
        )
        yield path


def findings(capsys, config):
    status = main(["check", "--config", str(config), "--json"])
    return status, {item["name"]: item for item in map(json.loads, capsys.readouterr().out.splitlines())}


def test_check_finds_nothing_wrong_with_a_good_device(config, capsys):
    """And says what it looked at; nothing was made."""
    status, found = findings(capsys, config)
    assert status == 0
    assert set(found) == {"runtime", "data directory", "trusted root", "clock", "broker"}
    assert all(item["is_well"] for item in found.values())
    assert "version 3" in found["trusted root"]["text"]
    assert not (config.parent / "data").exists()


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        (("root.json", "none.json"), "trusted root", "No such file"),
        (("root.json", "agent.toml"), "trusted root", "no TUF root"),
        (("1000000", "9000000000000000"), "data directory", "lower outbox_bytes"),
        (("/data", "/agent.toml/data"), "data directory", "cannot be written"),
        (("127.0.0.1:", "127.0.0.2:"), "broker", "refused"),
    ],
)
def test_check_says_in_plain_words_what_is_wrong(config, capsys, change, name, text):
    """Each by itself, and the others are looked at all the same."""
    config.write_text(config.read_text().replace(*change))
    status, found = findings(capsys, config)
    assert status == 1
    assert text in found[name]["text"]
    assert [item["name"] for item in found.values() if not item["is_well"]] == [name]


def test_check_is_for_people_too(config, capsys):
    """One line each."""
    assert main(["check", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("ok") for line in lines)


def test_outbox_is_read_while_its_agent_runs(config, capsys):
    """What waits, for which model, and the ledger's counters as committed."""
    directory = config.parent / "data"
    directory.mkdir()
    outbox = Outbox(directory / "outbox.sqlite")
    for seq in range(3):
        outbox.put(Item(Key("dev-1", b"e" * 16, seq), "m", b"x" * 10))
    outbox.commit()
    assert main(["outbox", "--config", str(config), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["waiting"], report["waiting_bytes"], report["by_model"]) == (3, 30, {"m": 3})
    assert report["counters"] == {"accepted": 3}
    assert main(["outbox", "--config", str(config)]) == 0
    assert "3 readings wait, 30 bytes: 3 for m" in capsys.readouterr().out
    outbox.close()


@pytest.mark.parametrize("arguments", [["outbox"], ["outbox", "size", "--rate", "0", "--hours", "1"]])
def test_questions_that_cannot_be_answered_are_one_line(arguments, capsys):
    """Exit status 2."""
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_outbox_yet_is_said(config, capsys):
    """Not an empty one made on the way."""
    assert main(["outbox", "--config", str(config)]) == 2
    assert "no outbox yet" in capsys.readouterr().err


def test_size_holds_what_it_promises(tmp_path, capsys):
    """Ten a second for a quarter of an hour fit, none more than asked for, and the file is as large as foretold."""
    assert main(["outbox", "size", "--rate", "10", "--hours", "0.25", "--bytes", "100", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)
    assert size["outbox_items"] == 9000
    path = tmp_path / "outbox.sqlite"
    outbox = Outbox(path, Limits(size["outbox_items"], size["outbox_bytes"]))
    for seq in range(9000):
        assert outbox.put(Item(Key("dev-1", b"e" * 16, seq), "vibration", b"x" * 100))
    assert not outbox.put(Item(Key("dev-1", b"e" * 16, 9000), "vibration", b"x" * 100))
    outbox.close()
    assert 0.8 < size["disk_bytes"] / path.stat().st_size < 1.3
    assert size_for(10, 0.25, 0.02, 100).outbox_items == 180


def test_no_command_needs_the_console():
    """`shoal device` on a machine without Typer, Rich, torch or onnxruntime."""
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'torch', 'onnxruntime', 'sklearn'): sys.modules[name] = None\n"
        "sys.argv = ['shoal', 'device', 'outbox', 'size', '--rate', '1', '--hours', '1']\n"
        "from fleet_console.entry import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "outbox_items = 3600" in done.stdout


def test_console_that_is_not_installed_is_said():
    """With what to install."""
    program = (
        "import sys\n"
        "sys.modules['typer'] = None\n"
        "sys.argv = ['shoal', 'demo']\n"
        "from fleet_console.entry import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "shoal[console]" in done.stderr


def test_quarantine_is_listed_with_its_reasons(config, capsys):
    """One line a reading for people, one object for machines, while the agent runs."""
    directory = config.parent / "data"
    directory.mkdir()
    outbox = Outbox(directory / "outbox.sqlite")
    outbox.refuse(Item(Key("dev-1", b"e" * 16, 7), "m", b"x" * 10), Refusal("TOO_LARGE", "rows", "10 bytes, at most 9"))
    outbox.commit()
    assert main(["outbox", "--config", str(config)]) == 0
    assert "1 readings in quarantine: see --quarantined" in capsys.readouterr().out
    assert main(["outbox", "--config", str(config), "--quarantined"]) == 0
    assert capsys.readouterr().out.endswith("Z         7  TOO_LARGE rows: 10 bytes, at most 9\n")
    assert main(["outbox", "--config", str(config), "--quarantined", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert abs(row.pop("refused_at") - time.time()) < 60
    assert row == {
        "device": "dev-1",
        "epoch": (b"e" * 16).hex(),
        "seq": 7,
        "model": "m",
        "status": "TOO_LARGE",
        "field": "rows",
        "message": "10 bytes, at most 9",
        "size_bytes": 10,
        "payload": "eHh4eHh4eHh4eA==",
    }
    outbox.close()
