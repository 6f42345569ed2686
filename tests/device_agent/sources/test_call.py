import numpy as np
import pytest

from device_agent.readings import Reading
from device_agent.sources.call import CallSource

pytestmark = pytest.mark.device


def test_whatever_a_function_returns_becomes_a_reading(feed):
    """Pins the Python API: readings as they are, arrays, lists, numbers, nothing, and the end."""
    answers = iter([Reading(np.float32([1]), 17, "mine"), np.array([2, 3]), [4.5], 6, None, "seven", [7]])
    feed.serve(CallSource(lambda: next(answers), 1000.0), until=lambda: feed.is_ended)
    assert feed.values == [[1], [2, 3], [4.5], [6], [7]]
    assert feed.heard == ["mine", "", "", "", "refused", "", "end"]
    assert feed.readings[0].captured_at_us == 17
    assert feed.readings[1].captured_at_us > 1_700_000_000_000_000
    assert feed.refused == ["source: could not convert string to float: 'seven'"]


def test_error_of_the_application_is_not_hidden(feed):
    """Pins that an agent does not run on beside a broken function."""

    def broken():
        raise RuntimeError("no such bus")

    with pytest.raises(RuntimeError, match="no such bus"):
        feed.serve(CallSource(broken), until=lambda: feed.is_ended)


def test_pace_must_be_one():
    """Pins a mistake of the caller's."""
    with pytest.raises(ValueError, match="rate_hz 0 must be positive"):
        CallSource(lambda: 1.0, 0)
