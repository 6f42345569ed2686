"""What other programs publish or print, made into values: JSON or plain numbers, through JMESPath."""

import json
import math
from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, PayloadError

# Sensors send tens of bytes; what is larger is not theirs.
MAX_INPUT_BYTES = 64 << 10
_MAX_VALUES = 16_384
_WHOLE = "@"
_SHOWN_CHARS = 40
_LARGEST = float(np.finfo(np.float32).max)

Expression = Callable[[object], object]


class Mapping:
    """Applies one JMESPath expression for each value; `@` is the whole input and needs no library.

    Raises:
        ConfigError: an expression is none, or needs JMESPath where that is not installed.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self._expressions = [(text, _compile(text)) for text in values]

    def values(self, payload: bytes) -> NDArray[np.float32]:
        """Read one message or line: JSON, or plain numbers such as `21.5` or `21.5, 40`.

        An expression answers with a number, a truth value (1 or 0), a text that holds a number, or a list of these.

        Raises:
            PayloadError: it is too large, or what an expression finds is none of these; the expression is the field.
        """
        if len(payload) > MAX_INPUT_BYTES:
            raise PayloadError(f"{len(payload)} bytes, at most {MAX_INPUT_BYTES}")
        document = _parse(payload)
        found = [value for text, expression in self._expressions for value in _find(text, expression, document)]
        if len(found) > _MAX_VALUES:
            raise PayloadError(f"{len(found)} values, at most {_MAX_VALUES}")
        return np.array(found, dtype=np.float32)


def _compile(text: str) -> Expression:
    if text.strip() == _WHOLE:
        return lambda document: document
    try:
        jmespath = import_module("jmespath")
    except ImportError as exc:
        raise ConfigError(f"source value {text!r} needs JMESPath: pip install 'shoal[sensors]'") from exc
    try:
        compiled = jmespath.compile(text)
    except jmespath.exceptions.JMESPathError as exc:
        raise ConfigError(f"source value {text!r}: {str(exc).splitlines()[0]}") from exc

    def search(document: object) -> object:
        try:
            found: object = compiled.search(document)
        except (jmespath.exceptions.JMESPathError, TypeError, ValueError, ArithmeticError) as exc:
            raise PayloadError(str(exc), field=text) from exc
        return found

    return search


def _parse(payload: bytes) -> object:
    try:
        text = payload.decode()
    except UnicodeDecodeError as exc:
        raise PayloadError(f"{len(payload)} bytes are not UTF-8") from exc
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter for nesting without end
        parts = [part.strip() for part in text.split(",")]
        return parts if len(parts) > 1 else parts[0]


def _find(text: str, expression: Expression, document: object) -> list[float]:
    found = expression(document)
    if isinstance(found, list) and found:
        return [_number(text, value) for value in found]
    return [_number(text, found)]


def _number(field: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise PayloadError(f"{_shown(value)} is not a number", field=field)
    # What float32 cannot hold is infinite there.
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise PayloadError(f"{_shown(value)} is not a finite float32", field=field)
    return number


def _shown(value: object) -> str:
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
