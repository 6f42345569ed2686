import contextlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.sources.mapping import MAX_INPUT_BYTES, Mapping
from shoal.errors import ConfigError, PayloadError

pytestmark = pytest.mark.device

ZIGBEE = b'{"battery":97,"humidity":41.2,"last_seen":"2026-05-01T09:00:00Z","occupancy":true,"temperature":21.5}'
TASMOTA = b'{"Time":"2026-05-01T09:00:00","AM2301":{"Temperature":21.5,"Humidity":41.2},"POWER":"ON"}'


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"21.5", [21.5]),
        (b" 21.5\r", [21.5]),
        (b"[1, 2.5, true]", [1, 2.5, 1]),
        (b"1, 2,3.5", [1, 2, 3.5]),
        (b'"7"', [7]),
        (b"-1e3", [-1000]),
    ],
)
def test_plain_values_need_no_library(payload, expected, monkeypatch):
    """Pins `@`, the default, where JMESPath is not installed."""
    monkeypatch.setitem(sys.modules, "jmespath", None)
    values = Mapping(["@"]).values(payload)
    assert (values.tolist(), values.dtype) == (expected, np.float32)


@pytest.mark.parametrize(
    ("payload", "expressions", "expected"),
    [
        (ZIGBEE, ["humidity", "temperature", "occupancy"], [41.2, 21.5, 1]),
        (TASMOTA, ["AM2301.Temperature", "POWER == 'ON'"], [21.5, 1]),
        (TASMOTA, ["AM2301.[Temperature, Humidity]"], [21.5, 41.2]),
        (b"[[1,2],[3,4]]", ["[]"], [1, 2, 3, 4]),
        (b"21.5,40", ["[1]"], [40]),
    ],
)
def test_expressions_pick_values_in_their_order(payload, expressions, expected):
    """Pins what other programs publish, one value or several for each expression."""
    pytest.importorskip("jmespath", reason="left out: needs shoal[sensors]")
    assert Mapping(expressions).values(payload) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("payload", "expression", "message"),
    [
        (ZIGBEE, "pressure", "pressure: nothing is not a number"),
        (ZIGBEE, "last_seen", "last_seen: '2026-05-01T09:00:00Z' is not a number"),
        (b'{"a": {"b": 1}}', "a", "a: {'b': 1} is not a number"),
        (b'{"a": [1, null]}', "a", "a: nothing is not a number"),
        (b'{"a": []}', "a", r"a: \[\] is not a number"),
        (b'{"a": "1"}', "sum(a)", r"sum\(a\): .*invalid type"),
    ],
)
def test_bad_value_is_named_by_its_expression(payload, expression, message):
    """Pins the line of the log, which names the field and what is there."""
    pytest.importorskip("jmespath", reason="left out: needs shoal[sensors]")
    with pytest.raises(PayloadError, match=message) as caught:
        Mapping([expression]).values(payload)
    assert caught.value.field == expression


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"offline", "@: 'offline' is not a number"),
        (b"", "@: '' is not a number"),
        (b"null", "@: nothing is not a number"),
        (b"nan", "@: 'nan' is not a finite float32"),
        (b"1e39", "@: 1e\\+39 is not a finite float32"),
        (b"9" * 400, "@: 9.*\\.\\.\\. is not a number"),
        (b"\xff", "1 bytes are not UTF-8"),
        (b"[" * 60_000, "is not a number"),
        (b" " * (MAX_INPUT_BYTES + 1), "at most 65536"),
        (b"[" + b"1," * 20_000 + b"1]", "20001 values, at most 16384"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_what_is_no_reading_is_refused(payload, message):
    """Pins that anything a topic may carry is told in one line, bounded, and never believed."""
    with pytest.raises(PayloadError, match=message):
        Mapping(["@"]).values(payload)


@given(st.binary(max_size=200))
def test_any_bytes_are_values_or_refused(payload):
    """Pins that nothing else comes out of foreign bytes."""
    with contextlib.suppress(PayloadError):
        assert np.isfinite(Mapping(["@"]).values(payload)).all()


def test_expression_that_is_none_is_the_operators_to_change():
    """Pins one line that quotes the expression."""
    pytest.importorskip("jmespath", reason="left out: needs shoal[sensors]")
    with pytest.raises(ConfigError, match=r"source value 'a\.\[': ") as caught:
        Mapping(["a.["])
    assert "\n" not in str(caught.value)


def test_expression_without_the_library_says_what_to_install(monkeypatch):
    """Pins the extra's name."""
    monkeypatch.setitem(sys.modules, "jmespath", None)
    with pytest.raises(ConfigError, match=r"'temperature' needs JMESPath: pip install 'shoal\[sensors\]'"):
        Mapping(["temperature"])
