"""The agent: one device as a process."""

import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from device_agent.device import Device, DeviceConfig
from device_agent.policy import PolicyConfig
from device_agent.readings import Reading
from device_agent.runtime import runtime_name
from device_agent.sources import CsvSource, Source
from shoal.config import BrokerSettings, link_config
from shoal.delivery.outbox import Limits, Outbox
from shoal.errors import ConfigError, PayloadError
from shoal.ids import parse_id
from shoal.link import Link
from shoal.link_config import Identity, node_identity
from shoal.loop import Loop
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import ChildSelfTest
from shoal.release.trust import TrustStore
from shoal.state import MAX_INTERVAL_S
from shoal.v1.release_pb2 import Tier

log = logging.getLogger(__name__)

_TICK_S = 0.1
_SESSION_EXPIRY_S = 86_400

# Checked while the file is read, so that the message names the key.
_Share = Annotated[float, Meta(ge=0, le=1)]
_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(gt=0)]


class CsvSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `[source]` table: a CSV file to replay."""

    path: str
    columns: Annotated[list[str], Meta(min_length=1)]
    rate_hz: _Positive = 1.0


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The agent's TOML file; see docs/devices.md."""

    site: str
    node: str
    model: str
    data_dir: str
    trusted_root: str
    source: CsvSettings
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    change_threshold: Annotated[float, Meta(ge=0)] = 0.0
    change_adapt: _Share = 0.0
    audit_share: _Share = 0.005
    max_share: Annotated[float, Meta(gt=0, le=1)] = 0.2
    max_per_minute: _Count = 600
    answer_within_ms: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    retry_after_s: _Positive = 10.0
    outbox_items: _Count = 20_000
    outbox_bytes: _Count = 64 << 20
    state_interval_s: Annotated[float, Meta(gt=0, le=MAX_INTERVAL_S)] = 60.0
    probation_s: Annotated[float, Meta(ge=0)] = 10.0

    def device_config(self) -> DeviceConfig:
        return DeviceConfig(
            site=self.site,
            node=self.node,
            model=self.model,
            change_threshold=self.change_threshold,
            change_adapt=self.change_adapt,
            policy=PolicyConfig(self.audit_share, self.max_share, self.max_per_minute),
            answer_within_ms=self.answer_within_ms,
            retry_after_s=self.retry_after_s,
            state_interval_s=self.state_interval_s,
        )


class _Pump:
    """Reads the source at its rate, commits, sends."""

    def __init__(self, device: Device, outbox: Outbox, source: Source) -> None:
        self._device = device
        self._outbox = outbox
        self._readings: Iterator[Reading] = iter(source)
        self.is_dry = False

    def read(self, now: float) -> None:
        reading = None if self.is_dry else next(self._readings, None)
        if reading is None:
            self.is_dry = True
        else:
            self._device.read(reading, now)

    def tick(self, now: float) -> None:
        self._outbox.commit()
        self._device.tick(now)


def run(settings: AgentSettings, *, until_dry: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, or with `until_dry` until the source has ended and all is answered.

    Raises:
        ConfigError: a file that the settings name is missing or unusable, or a name is not an id.
    """
    identity = _identity(settings)
    root = _read_root(settings)
    directory = _make_directory(settings)
    # Whatever ends the agent, what it has read is committed.
    with ExitStack() as closing:
        loop = Loop()
        closing.callback(loop.close)
        rng = random.SystemRandom()
        link = Link(link_config(settings.broker, session_expiry_s=_SESSION_EXPIRY_S), identity)
        closing.callback(link.close)
        outbox = Outbox(directory / "outbox.sqlite", Limits(settings.outbox_items, settings.outbox_bytes))
        closing.callback(outbox.close)
        device = Device(settings.device_config(), link, outbox, rng=rng, clock=loop.clock)
        updates = UpdateClient(
            link,
            TrustStore(directory / "trust", root),
            directory / "models",
            [NodeModel(settings.model, Tier.TIER_DEVICE, runtime_name(), settings.probation_s)],
            node=settings.node,
            self_test=ChildSelfTest("device_agent.runtime"),
            activate=device.activate,
            deactivate=device.deactivate,
            find_watch=device.watch,
            rng=rng,
            counters=link.counters,
        )
        closing.callback(updates.close)
        device.model_states = updates.state
        device.clock_suspect = lambda: updates.clock_suspect
        updates.start()
        pump = _Pump(device, outbox, CsvSource(Path(settings.source.path), settings.source.columns))
        link.attach(loop)
        loop.call_every(_TICK_S, updates.tick)
        loop.call_every(_TICK_S, pump.tick)
        loop.call_every(1.0 / settings.source.rate_hz, pump.read)
        with loop.stopping_on_signals():
            loop.run(until=lambda: until_dry and pump.is_dry and not outbox.in_flight and not outbox.is_dirty)
        updates.excuse_start()


def _identity(settings: AgentSettings) -> Identity:
    try:
        parse_id(settings.model, "model")
        return node_identity(settings.site, settings.node, "device")
    except PayloadError as exc:
        raise ConfigError(str(exc)) from exc


def _read_root(settings: AgentSettings) -> bytes:
    try:
        return Path(settings.trusted_root).read_bytes()
    except OSError as exc:
        raise ConfigError(f"trusted_root {settings.trusted_root}: {exc.strerror}") from exc


def _make_directory(settings: AgentSettings) -> Path:
    directory = Path(settings.data_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data_dir {settings.data_dir}: {exc.strerror}") from exc
    return directory
