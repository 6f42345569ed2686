"""`shoal pipeline run` as people start it, killed in each of its steps and started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleet_console.broker import free_port

EXAMPLE = Path(__file__).parents[3] / "examples" / "pipelines" / "vision.yaml"
PATIENCE_S = 120
# Where each kill falls: what the process said last. Training has made two checkpoints by then.
KILLS = [
    "epoch=2/",
    "2/5 prune_model: running",
    "tier=gateway",
    "4/5 evaluate_model: running",
    "5/5 deploy",
    "publishing",
]


def command(directory, broker, example=EXAMPLE):
    shoal = [sys.executable, "-c", "from fleet_console.entry import main; main()"]
    return [*shoal, "pipeline", "run", str(example), "--data-dir", str(directory), "--broker", broker.url, "--json"]


def run(directory, broker):
    done = subprocess.run(
        command(directory, broker),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_until(directory, broker, said, number):
    """Start a run and send it a signal once it has said something; return its exit status and what it said."""
    process = subprocess.Popen(
        command(directory, broker), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if said in line:
            os.kill(process.pid, number)
            break
    rest = process.communicate(timeout=PATIENCE_S)[1]
    return process.returncode, "".join(lines) + rest


@pytest.mark.timeout(600)
def test_killed_in_each_step_it_ends_with_the_same_digests(tmp_path, own_broker):
    """One directory is killed six times, another never; both end with the same release of the same bytes."""
    for said in KILLS:
        status, text = run_until(tmp_path / "killed", own_broker, said, signal.SIGKILL)
        assert status == -signal.SIGKILL, text
        assert said in text
    ended = run(tmp_path / "killed", own_broker)
    calm = run(tmp_path / "calm", own_broker)
    assert ended["outputs"] == calm["outputs"]
    assert set(ended["outputs"]) == {"trained", "pruned", "quantized", "release", "deploy_to_edge"}
    assert (ended["release"], calm["release"]) == (1, 1)


def test_told_to_stop_it_says_so_and_goes_on(tmp_path, own_broker):
    """SIGTERM, as a spot machine gets it: exit status 75, the run is known as stopped, and the next call goes on."""
    status, text = run_until(tmp_path, own_broker, "epoch=2/", signal.SIGTERM)
    assert status == 75, text
    assert "stopped: SIGTERM" in text
    assert "Traceback" not in text
    status, text = run_until(tmp_path, own_broker, "epoch=", signal.SIGINT)
    assert status == 75
    assert "goes on with run" in text
    assert "epoch=1/" not in text


def test_broker_that_is_not_there_is_named(tmp_path):
    """The release stays queued, exit status 2, and the message says which broker."""
    nobody = SimpleNamespace(url=f"mqtt://127.0.0.1:{free_port()}")
    done = subprocess.run(
        [*command(tmp_path, nobody, EXAMPLE.with_name("valve.yaml")), "--wait", "0.5"],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert f"broker at {nobody.url} has not confirmed the release" in done.stderr
