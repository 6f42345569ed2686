"""The short form of `make gateway-failover`."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="left out: needs shoal[gateway]")
sys.path.insert(0, str(Path(__file__).parent))

from gateway_failover import run


def test_killed_gateways_questions_are_answered_by_the_other_in_time_and_once(mosquitto, tmp_path):
    """Two kills and a stall under load: every question is answered within its retry time, the application hears once."""
    seen = run(mosquitto.url, tmp_path, 3, 5)
    assert (seen["kills"], seen["freezes"]) == (2, 1)
    assert seen["answered"] == seen["asked"] > 200
    assert (seen["answered_twice"], seen["late"]) == (0, 0)
    # The kill took questions along, and the stalled gateway answered what the other had answered.
    assert min(seen["asked_again"], seen["replied_twice"]) > 0
