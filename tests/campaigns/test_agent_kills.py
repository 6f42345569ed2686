"""The short form of `make agent-kills`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_console.broker import find_mosquitto

pytest.importorskip("onnxruntime", reason="left out: needs shoal[gateway]")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hold_s", [0.0, 2.0])
def test_killed_agents_lose_nothing_that_they_accepted(hold_s):
    """Eight kills in each mode: the books close without a hole, and no answer is counted twice."""
    if find_mosquitto() is None:
        pytest.skip("left out: needs Mosquitto, which is not installed")
    campaign = Path(__file__).parent / "agent_kills.py"
    arguments = ["--kills", "8", "--seed", "3", "--hold-s", str(hold_s)]
    done = subprocess.run([sys.executable, campaign, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["kills"], figures["holes"], figures["counted_twice"], figures["in_flight"]) == (8, 0, 0, 0)
    assert figures["answered"] == figures["accepted"] > 0
    assert figures["readings"] == figures["accepted"] + figures["lost_before_accept"]
