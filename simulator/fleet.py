"""A fleet of simulated devices in one process: the real device, one MQTT session each, on one loop and one store.

python -m simulator fleet --config fleet.toml
"""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from google.protobuf.json_format import MessageToDict
from msgspec import Meta

from device_agent.change import ChangeSettings, DeadBandSettings
from device_agent.config import DeviceConfig
from device_agent.device import Device
from device_agent.policy import PolicyConfig
from device_agent.readings import Outcome, Reading
from device_agent.runtime import runtime_name
from shoal.config import BrokerSettings, link_config
from shoal.delivery.outbox import Limits, Outbox, lane_by_device
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
from shoal.v1.sensor_pb2 import TIME_QUALITY_SYNCED, Scalars, SensorData
from simulator.datasets import load_digits, load_shuttle
from simulator.journal import Entry, Journal, unix_time
from simulator.script import Phase, Script, ScriptConfig
from simulator.selftest import SharedSelfTest
from simulator.streams import FleetKind, Share, SimReading, Stream, open_stream

_TICK_S = 0.05
_FLUSH_S = 0.5
_SESSION_EXPIRY_S = 86_400


class FleetSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet's TOML file: `devices` devices named `{prefix}-NN` that all read the same kind of data.

    Attributes:
        readings: of the whole fleet for sensors, of each device before the drift for cameras.
        readings_after: of each device with the release that came after the drift.
    """

    kind: Literal["sensors", "cameras"]
    site: str
    prefix: str
    model: str
    devices: Annotated[int, Meta(ge=1)]
    rate_hz: Annotated[float, Meta(gt=0)]
    readings: Annotated[int, Meta(ge=0)]
    data_dir: str
    journal: str
    trusted_root: str
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    seed: int = 0
    drifts: bool = False
    readings_after: Annotated[int, Meta(ge=0)] = 0
    max_readings: Annotated[int, Meta(ge=0)] = 100_000
    change: ChangeSettings = msgspec.field(default_factory=DeadBandSettings)
    audit_share: Annotated[float, Meta(ge=0, le=1)] = 0.005
    max_share: Annotated[float, Meta(gt=0, le=1)] = 0.2
    retry_after_s: Annotated[float, Meta(gt=0)] = 10.0
    linger_s: Annotated[float, Meta(ge=0)] = 0.0
    state_interval_s: Annotated[float, Meta(gt=0, le=MAX_INTERVAL_S)] = 5.0
    probation_s: Annotated[float, Meta(ge=0)] = 5.0

    def __post_init__(self) -> None:
        self.policy_config()  # what contradicts itself is found while the file is read

    def policy_config(self) -> PolicyConfig:
        return PolicyConfig(audit_share=self.audit_share, max_share=self.max_share, max_per_minute=60_000)

    def device_config(self, node: str) -> DeviceConfig:
        return DeviceConfig(
            site=self.site,
            node=node,
            model=self.model,
            change=self.change,
            policy=self.policy_config(),
            retry_after_s=self.retry_after_s,
            linger_s=self.linger_s,
            state_interval_s=self.state_interval_s,
        )


@dataclass(slots=True)
class _Member:
    device: Device
    updates: UpdateClient
    stream: Stream
    script: Script
    waiting: dict[int, SimReading]


class Fleet:
    """Builds the devices and drives them. Constructing it touches the disk, `run` the network."""

    def __init__(self, settings: FleetSettings, loop: Loop) -> None:
        """Open the files.

        Raises:
            ConfigError: one that the settings name is missing or in the way, or a name is not an id.
        """
        self._settings = settings
        self._loop = loop
        self._identities = _identities(settings)
        directory = Path(settings.data_dir)
        try:
            self._root = Path(settings.trusted_root).read_bytes()
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"{exc.filename}: {exc.strerror}") from exc
        self._outbox = Outbox(directory / "outbox.sqlite", Limits(200_000, 1 << 30), lane_by_device)
        self._journal = Journal(Path(settings.journal))
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="shoal-disk")
        self._self_test = SharedSelfTest(ChildSelfTest("device_agent.runtime"))
        self._kind = FleetKind(settings.kind)
        self._data = load_shuttle() if self._kind is FleetKind.SENSORS else load_digits()
        self._members = [self._member(index, directory) for index in range(settings.devices)]
        self._finished = False

    def run(self) -> None:
        """Serve until every device is done and its questions are answered, or until SIGINT or SIGTERM."""
        period_s = 1.0 / self._settings.rate_hz
        start = self._loop.clock()
        for index, member in enumerate(self._members):
            member.updates.start()
            member.device.link.attach(self._loop)
            # Devices do not beat in time: each has its own phase.
            offset_s = period_s * index / len(self._members)
            self._loop.call_at(start + offset_s, _Reader(self, self._loop, member, period_s))
        self._loop.call_every(_TICK_S, self._tick)
        self._loop.call_every(_FLUSH_S, lambda _: self._journal.flush())
        try:
            with self._loop.stopping_on_signals():
                self._loop.run(until=self._is_over)
            for member in self._members:
                member.updates.excuse_start()
        finally:
            self._close()

    def _member(self, index: int, directory: Path) -> _Member:
        settings = self._settings
        identity = self._identities[index]
        node = identity.client_id
        rng = random.Random(f"{settings.seed}/{node}")  # noqa: S311  a simulation repeats itself
        link = Link(link_config(settings.broker, session_expiry_s=_SESSION_EXPIRY_S), identity)
        waiting: dict[int, SimReading] = {}
        device = Device(
            settings.device_config(node),
            link,
            self._outbox,
            rng=rng,
            clock=self._loop.clock,
            lane=node,
            on_outcome=lambda outcome: self._heard(node, waiting, outcome),
        )
        updates = UpdateClient(
            link,
            TrustStore(directory / node / "trust", self._root),
            directory / node / "models",
            [NodeModel(settings.model, Tier.TIER_DEVICE, runtime_name(), settings.probation_s)],
            node=node,
            self_test=self._self_test,
            activate=device.activate,
            deactivate=device.deactivate,
            find_watch=device.watch,
            rng=rng,
            counters=link.counters,
            disk=self._disk,
        )
        device.model_states = updates.state
        device.clock_suspect = lambda: updates.clock_suspect
        stream = open_stream(
            self._kind,
            self._data,
            seed=settings.seed,
            device=node,
            share=Share(index, settings.devices),
            max_rows=settings.readings,
        )
        return _Member(device, updates, stream, Script(self._script()), waiting)

    def _script(self) -> ScriptConfig:
        settings = self._settings
        if self._kind is FleetKind.SENSORS:
            return ScriptConfig(readings_before=settings.max_readings)
        return ScriptConfig(settings.readings, settings.drifts, settings.readings_after, settings.max_readings)

    # -- readings --------------------------------------------------------------------------------------------------

    def read(self, member: _Member, now: float) -> None:
        """Make one reading, if the story has one now."""
        phase = member.script.next(member.device.release)
        if phase in (Phase.WAITING, Phase.DONE):
            return
        truth = member.stream.next(drifted=phase in (Phase.AFTER_DRIFT, Phase.AFTER_UPDATE))
        if truth is None:
            member.script.phase = Phase.DONE
            return
        reading = Reading(truth.values, int(unix_time() * 1e6), truth.reference)
        outcome = member.device.read(reading, now)
        if outcome.reason.startswith("asked."):
            member.waiting[outcome.seq] = truth
        self._write("read", member.device.config.node, truth, outcome, phase.value)

    def _heard(self, node: str, waiting: dict[int, SimReading], outcome: Outcome) -> None:
        """Take down a gateway's answer; what was asked before this process started is in another file."""
        truth = waiting.pop(outcome.seq, None) if outcome.by.is_gateways else None
        if truth is not None:
            self._write("reply", node, truth, outcome, "")

    def _write(self, event: str, node: str, truth: SimReading, outcome: Outcome, phase: str) -> None:
        canonical, compact = json_sizes(node, outcome.seq, truth) if event == "read" else (0, 0)
        self._journal.write(
            Entry(
                at=round(unix_time(), 4),
                event=event,
                device=node,
                seq=outcome.seq,
                reference=truth.reference,
                phase=phase,
                label=truth.label,
                held_out=int(truth.held_out),
                reason=outcome.reason,
                release=outcome.release,
                score=round(outcome.score, 6),
                predicted=outcome.label,
                latency_ms=round(outcome.latency_s * 1000, 3),
                bytes_json=canonical,
                bytes_json_compact=compact,
            )
        )

    # -- the loop's callbacks ----------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self._outbox.commit()
        for member in self._members:
            member.device.tick(now)
            member.updates.tick(now)

    def _is_over(self) -> bool:
        done = all(member.script.phase is Phase.DONE for member in self._members)
        if not done or self._outbox.in_flight or self._outbox.is_dirty:
            return False
        if not self._finished:
            self._finished = True
            for member in self._members:
                member.device.report_soon()
            return False
        return all(member.device.is_settled for member in self._members)

    def _close(self) -> None:
        self._outbox.commit()
        for member in self._members:
            member.updates.close()
            member.device.link.close()
        self._disk.shutdown()
        self._self_test.close()
        self._journal.close()
        self._outbox.close()


class _Reader:
    """Calls for one device's next reading at its own pace, without drifting late."""

    def __init__(self, fleet: Fleet, loop: Loop, member: _Member, period_s: float) -> None:
        self._fleet = fleet
        self._loop = loop
        self._member = member
        self._period_s = period_s
        self._next: float | None = None

    def __call__(self, now: float) -> None:
        self._fleet.read(self._member, now)
        self._next = (self._next or now) + self._period_s
        self._loop.call_at(self._next, self)


def _identities(settings: FleetSettings) -> list[Identity]:
    try:
        parse_id(settings.model, "model")
        nodes = [f"{settings.prefix}-{index:02d}" for index in range(settings.devices)]
        return [node_identity(settings.site, node, "device") for node in nodes]
    except PayloadError as exc:
        raise ConfigError(str(exc)) from exc


def json_sizes(node: str, seq: int, truth: SimReading) -> tuple[int, int]:
    """Bytes of a reading as JSON: in protobuf's canonical mapping, and as short as an engineer would write it."""
    at = time.time()
    values = truth.values.ravel().tolist()
    data = SensorData(
        device=node,
        epoch=bytes(16),
        seq=seq,
        captured_at_us=int(at * 1e6),
        time_quality=TIME_QUALITY_SYNCED,
        scalars=Scalars(values=values),
        reference=truth.reference,
    )
    canonical = json.dumps(MessageToDict(data), separators=(",", ":"))
    short = [int(value) if value == int(value) else round(value, 2) for value in values]
    compact = json.dumps({"device": node, "seq": seq, "t": round(at, 3), "values": short}, separators=(",", ":"))
    return len(canonical), len(compact)


def run(settings: FleetSettings) -> None:
    """Run one fleet process to its end."""
    loop = Loop()
    try:
        Fleet(settings, loop).run()
    finally:
        loop.close()
