"""The short form of `make faults-install`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_faults_during_installs_neither_brick_nor_corrupt():
    """Every thirtieth fault, and the control that must fail."""
    if shutil.which("strace") is None:
        pytest.skip("left out: fault injection needs strace")
    campaign = Path(__file__).parent / "faults_install.py"
    done = subprocess.run([sys.executable, campaign, "--every", "30"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["bad_active"], figures["stuck"], figures["died"]) == (0, 0, 0)
    assert figures["control_failed"]
