"""The agent: one device as a process."""

import logging
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from device_agent.actions import Actions
from device_agent.answers import Answers, LineWriter, Result, StdoutAnswers
from device_agent.answers_topic import MqttAnswers, TopicWriter
from device_agent.change import ChangeSettings, DeadBandSettings
from device_agent.config import DeviceConfig
from device_agent.device import Device
from device_agent.memory import give_back
from device_agent.metrics_server import MetricsServer
from device_agent.notify import ALIVE, READY, STOPPING, Notifier
from device_agent.policy import PolicyConfig
from device_agent.readings import Outcome, Reading
from device_agent.runtime import RuntimeKind, runtime_name
from device_agent.sources.call import CallSource, Sensor
from device_agent.sources.feed import Source
from device_agent.sources.settings import SourceSettings, make_source
from device_agent.timekeeping import Timekeeper, count_boot, kernel_boot_id
from shoal.config import BrokerSettings, link_config
from shoal.delivery.outbox import Hold, Limits, Outbox
from shoal.errors import ConfigError, PayloadError
from shoal.ids import parse_id
from shoal.link import Link
from shoal.link_config import Identity, LinkConfig, node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import ChildSelfTest
from shoal.release.trust import TrustStore
from shoal.state import MAX_INTERVAL_S
from shoal.v1.release_pb2 import ReleaseSpec, Tier

log = logging.getLogger(__name__)

_TICK_S = 0.1
_SESSION_EXPIRY_S = 86_400
# By then a start or an activation is over, and what it needed is garbage.
_LOADED_S = 2.0
_GOODBYE_S = 0.5

# Checked while the file is read, so that the message names the key.
_Share = Annotated[float, Meta(ge=0, le=1)]
_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(gt=0)]


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The agent's TOML file; see docs/device.md."""

    site: str
    node: str
    model: str
    data_dir: str
    trusted_root: str
    source: SourceSettings | None = None
    answers: StdoutAnswers | MqttAnswers | None = None
    runtime: RuntimeKind = RuntimeKind.AUTO
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    change: ChangeSettings = msgspec.field(default_factory=DeadBandSettings)
    audit_share: _Share = 0.005
    max_share: Annotated[float, Meta(gt=0, le=1)] = 0.2
    max_per_minute: _Count = 600
    max_per_day: _Count | None = None
    max_bytes_per_minute: _Count | None = None
    max_bytes_per_day: _Count | None = None
    score_threshold: float | None = None
    answer_within_ms: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    retry_after_s: _Positive = 10.0
    outbox_items: _Count = 20_000
    outbox_bytes: _Count = 64 << 20
    outbox_hold_s: Annotated[float, Meta(ge=0)] = 0.0
    outbox_hold_items: _Count = 256
    state_interval_s: Annotated[float, Meta(gt=0, le=MAX_INTERVAL_S)] = 60.0
    probation_s: Annotated[float, Meta(ge=0)] = 10.0
    metrics_address: str = ""

    def __post_init__(self) -> None:
        self.policy_config()  # what contradicts itself is found while the file is read

    def policy_config(self) -> PolicyConfig:
        return PolicyConfig(
            audit_share=self.audit_share,
            max_share=self.max_share,
            max_per_minute=self.max_per_minute,
            max_per_day=self.max_per_day,
            max_bytes_per_minute=self.max_bytes_per_minute,
            max_bytes_per_day=self.max_bytes_per_day,
            score_threshold=self.score_threshold,
        )

    def device_config(self) -> DeviceConfig:
        return DeviceConfig(
            site=self.site,
            node=self.node,
            model=self.model,
            change=self.change,
            policy=self.policy_config(),
            answer_within_ms=self.answer_within_ms,
            retry_after_s=self.retry_after_s,
            state_interval_s=self.state_interval_s,
            runtime=self.runtime,
        )


class _Intake:
    """The feed of the agent's source: readings to the device, bad input to its counters and, now and then, the log."""

    def __init__(self, device: Device, loop: Loop) -> None:
        self._device = device
        self._refused = 0
        self.loop = loop
        self.is_dry = False

    def take(self, reading: Reading) -> None:
        self._device.read(reading, self.loop.clock())

    def refuse(self, error: PayloadError) -> None:
        self._device.refuse()
        self._refused += 1
        if not self._refused & (self._refused - 1):  # a sensor that is broken for good must not fill the disk
            log.warning("bad input refused=%d last: %s", self._refused, error)

    def gap(self) -> None:
        self._device.gap()

    def end(self) -> None:
        self.is_dry = True


class _Ending:
    """Ends the loop on command, so that the process can be started again."""

    def __init__(self, loop: Loop) -> None:
        self.wants_restart = False
        self._loop = loop

    def restart(self) -> None:
        self.wants_restart = True
        # By then the answer to the command is with the broker.
        self._loop.call_at(self._loop.clock() + _GOODBYE_S, lambda _: self._loop.stop())


class Agent:
    """One device as a process, or part of an application's.

    Args:
        settings: see docs/device.md.
        source: where readings come from: a `Source`, or a function to call `rate_hz` times a second; by default the
            settings' own.
        rate_hz: for a function.
        on_outcome: hears what became of each reading, step by step.
        on_result: hears the answers, one final one for each reading that has a new one; by default as the settings say.
    """

    def __init__(
        self,
        settings: AgentSettings,
        source: Source | Sensor | None = None,
        *,
        rate_hz: float = 1.0,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        self._settings = settings
        self._source = CallSource(source, rate_hz) if callable(source) else source
        self._on_outcome = on_outcome
        self._on_result = on_result

    def run(self, *, until_dry: bool = False) -> bool:
        """Serve until SIGINT or SIGTERM, or with `until_dry` until the source has ended and all is answered.

        Returns whether a command asked for the process to be started again.

        Raises:
            ConfigError: a file that the settings name is missing or unusable, or a name is not an id.
        """
        settings = self._settings
        identity = check_names(settings)
        root = _read_root(settings)
        directory = _make_directory(settings)
        rng = random.SystemRandom()
        broker = link_config(settings.broker, session_expiry_s=_SESSION_EXPIRY_S)
        source = self._source or _own_source(settings, broker, rng)
        # Whatever ends the agent, what it has read is committed.
        with ExitStack() as closing:
            loop = Loop()
            closing.callback(loop.close)
            link = Link(broker, identity)
            closing.callback(link.close)
            outbox = _open_outbox(settings, directory)
            closing.callback(outbox.close)
            answers = Answers(settings.answer_within_ms / 1000, self._teller(loop, closing, rng))

            def hear(outcome: Outcome) -> None:
                self._on_outcome(outcome)
                answers.hear(outcome, loop.clock())

            device = Device(settings.device_config(), link, outbox, rng=rng, clock=loop.clock, on_outcome=hear)

            def activate(model: str, spec: ReleaseSpec, path: Path) -> None:
                device.activate(model, spec, path)
                loop.call_at(loop.clock() + _LOADED_S, lambda _: give_back())

            updates = UpdateClient(
                link,
                TrustStore(directory / "trust", root),
                directory / "models",
                [NodeModel(settings.model, Tier.TIER_DEVICE, runtime_name(settings.runtime), settings.probation_s)],
                node=settings.node,
                self_test=ChildSelfTest(f"device_agent.runtime:{settings.runtime.value}"),
                activate=activate,
                deactivate=device.deactivate,
                find_watch=device.watch,
                rng=rng,
                counters=link.counters,
            )
            closing.callback(updates.close)
            if settings.metrics_address:
                closing.callback(MetricsServer(loop, settings.metrics_address, device.metrics).close)
            device.model_states = updates.state
            device.timekeeper = _make_timekeeper(directory)
            device.clock_suspect = lambda: updates.clock_suspect
            updates.start()
            link.attach(loop)
            loop.call_at(loop.clock() + _LOADED_S, lambda _: give_back())
            loop.call_every(_TICK_S, updates.tick)
            intake = _Intake(device, loop)
            closing.callback(source.close)
            source.start(intake)

            def tick(now: float) -> None:
                outbox.commit_due(now, is_connected=link.connected)
                device.tick(now)
                answers.tick(now)

            loop.call_every(_TICK_S, tick)
            ending = _Ending(loop)
            device.actions.update(Actions(device, updates, ending.restart).table())
            service = _start_notifying(loop)
            with loop.stopping_on_signals():
                loop.run(until=lambda: until_dry and intake.is_dry and not outbox.owed)
            service.tell(STOPPING)
            updates.excuse_start()
        return ending.wants_restart

    def _teller(self, loop: Loop, closing: ExitStack, rng: random.Random) -> Callable[[Result], None]:
        """Who hears the answers: the application, or whoever the settings say."""
        if self._on_result is not None:
            return self._on_result
        match self._settings.answers:
            case StdoutAnswers():
                return LineWriter()
            case MqttAnswers() as chosen:
                writer = TopicWriter(chosen, self._settings.node, rng)
                writer.attach(loop)
                closing.callback(writer.close)
                return writer
            case None:
                return lambda _: None


def run(settings: AgentSettings, *, until_dry: bool = False) -> bool:
    """Run an agent on its settings alone; see `Agent.run`."""
    return Agent(settings).run(until_dry=until_dry)


def _open_outbox(settings: AgentSettings, directory: Path) -> Outbox:
    hold = Hold(settings.outbox_hold_s, settings.outbox_hold_items) if settings.outbox_hold_s else None
    return Outbox(directory / "outbox.sqlite", Limits(settings.outbox_items, settings.outbox_bytes), hold=hold)


def _start_notifying(loop: Loop) -> Notifier:
    """Say that the agent is ready when the loop turns, and then that it still does."""
    service = Notifier()
    loop.call_at(loop.clock(), lambda _: service.tell(READY))
    if service.beat_s is not None:
        loop.call_every(service.beat_s, lambda _: service.tell(ALIVE))
    return service


def _make_timekeeper(directory: Path) -> Timekeeper:
    boot_id = kernel_boot_id()
    return Timekeeper(boot_id, count_boot(directory / "boots", boot_id))


def _own_source(settings: AgentSettings, broker: LinkConfig, rng: random.Random) -> Source:
    if settings.source is None:
        raise ConfigError("no readings: the settings have no [source], and the application gives none")
    return make_source(settings.source, node=settings.node, broker=broker, rng=rng)


def check_names(settings: AgentSettings) -> Identity:
    """Who the settings say that this device is.

    Raises:
        ConfigError: a name is not an id, or the broker's address is none.
    """
    parse_broker_url(settings.broker.url)
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
