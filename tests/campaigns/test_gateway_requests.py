"""The gateway's campaign in its short form: everything it counts as wrong is 0."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="left out: needs shoal[gateway]")
sys.path.insert(0, str(Path(__file__).parent))

from gateway_requests import is_bad, run, run_over_broker


@pytest.mark.parametrize("seed", [2, 3])
def test_every_request_gets_what_it_must(seed):
    """Each valid one its own answer once, each invalid one its own code, and nothing is left over."""
    result = run(1500, seed)
    assert not is_bad(result), result
    assert result["rows"] > 1500
    assert min(result["refused"], result["late"]) > 50


def test_every_request_over_a_broker_gets_what_it_must(mosquitto):
    """The same of a gateway process, asked by another client with QoS 1."""
    result = run_over_broker(1500, 4, mosquitto)
    assert not is_bad(result), result
    assert result["rows"] > 1500
    assert result["refused"] > 100
