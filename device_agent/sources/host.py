"""Sensors of the machine itself, through psutil."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from device_agent.readings import Reading
from device_agent.sources.feed import Feed, call_at_pace, now_us
from shoal.errors import ConfigError, PayloadError
from shoal.loop import Timer

HostValue = Literal[
    "cpu_percent",
    "load_1m",
    "load_5m",
    "load_15m",
    "memory_percent",
    "swap_percent",
    "disk_percent",
    "disk_free_bytes",
    "temperature_celsius",
]


class HostSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="host"):
    """`kind = "host"`: temperature, load, memory and disk of this machine."""

    values: Annotated[list[HostValue], Meta(min_length=1)]
    rate_hz: Annotated[float, Meta(gt=0, le=100)] = 1.0
    disk: str = "/"
    temperature: str = ""


class HostSource:
    """Polls what the kernel knows already, so that no poll takes long. `reference` is empty."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._timer: Timer | None = None

    def start(self, feed: Feed) -> None:
        psutil = _load_psutil()
        psutil.cpu_percent()  # the first call compares with nothing and returns 0
        polls = _polls(psutil, self._settings)
        wanted = [(name, polls[name]) for name in self._settings.values]
        try:
            _read(wanted)
        except PayloadError as exc:
            raise ConfigError(f"source host: {exc}") from exc
        self._timer = call_at_pace(feed, self._settings.rate_hz, lambda: feed.take(Reading(_read(wanted), now_us())))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _read(wanted: Sequence[tuple[str, Callable[[], float]]]) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    values = []
    for name, poll in wanted:
        try:
            values.append(poll())
        except (OSError, LookupError) as exc:
            raise PayloadError(str(exc), field=name) from exc
    return np.array(values, dtype=np.float32)


def _polls(psutil: Any, settings: HostSettings) -> Mapping[str, Callable[[], float]]:  # noqa: ANN401  loaded late
    return {
        "cpu_percent": psutil.cpu_percent,
        "load_1m": lambda: psutil.getloadavg()[0],
        "load_5m": lambda: psutil.getloadavg()[1],
        "load_15m": lambda: psutil.getloadavg()[2],
        "memory_percent": lambda: psutil.virtual_memory().percent,
        "swap_percent": lambda: psutil.swap_memory().percent,
        "disk_percent": lambda: psutil.disk_usage(settings.disk).percent,
        "disk_free_bytes": lambda: psutil.disk_usage(settings.disk).free,
        "temperature_celsius": lambda: _temperature(psutil, settings.temperature),
    }


def _temperature(psutil: Any, chip: str) -> float:  # noqa: ANN401  loaded late
    """The hottest sensor of a chip, or of them all."""
    chips: dict[str, Any] = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    found = [sensor.current for name, sensors in chips.items() if chip in ("", name) for sensor in sensors]
    if not found:
        raise LookupError(f"no sensor {chip or 'at all'}; there are {', '.join(sorted(chips)) or 'none'}")
    return float(max(found))


def _load_psutil() -> Any:  # noqa: ANN401  loaded late
    try:
        return import_module("psutil")
    except ImportError as exc:
        raise ConfigError("source host needs psutil: pip install 'shoal[sensors]'") from exc
