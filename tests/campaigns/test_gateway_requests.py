"""The gateway's campaign in its short form: everything it counts as wrong is 0."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="left out: needs shoal[gateway]")
sys.path.insert(0, str(Path(__file__).parent))

from gateway_requests import run


@pytest.mark.parametrize("seed", [2, 3])
def test_every_request_gets_what_it_must(seed):
    """Each valid one its own answer once, each invalid one its own code, and nothing is left over."""
    result = run(1500, seed)
    assert {name: result[name] for name in ("missing", "twice", "strays", "wrong", "wrong_codes")} == dict.fromkeys(
        ("missing", "twice", "strays", "wrong", "wrong_codes"), 0
    )
    assert result["rows"] > 1500
    assert result["refused"] > 100
