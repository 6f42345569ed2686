"""Runs the demo: broker, processes, witness, judge, report."""

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, unique

from rich.console import Console

from cloud.pipelines.registry import Registry, ReleaseReport
from cloud.sqlite_store import SqliteSampleStore
from device_agent.runtime import runtime_name as device_runtime
from edge_gateway.engine import runtime_name as gateway_runtime
from fleet_console.broker import start_broker
from fleet_console.demo.live import LiveView, Snapshot, print_summary
from fleet_console.demo.measure import accuracy_by_release, make_books, reads, uplink
from fleet_console.demo.observer import Observer
from fleet_console.demo.page import write_html
from fleet_console.demo.plan import CAMERAS, SENSORS, Config, Options, make_config
from fleet_console.demo.processes import Processes
from fleet_console.demo.report import Evidence, make_report
from shoal.delivery.ledger import Account, Row, reconcile
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import parse_broker_url, service_identity
from shoal.loop import Loop
from simulator.datasets import load_shuttle
from simulator.journal import Entry, JournalReader
from simulator.streams import SensorStream, Share

_TICK_S = 0.5
# After the fleets have ended: what gateway and cloud still exchange.
_SETTLE_S = 20.0
_FLEETS = ("sensors", "cameras")


@unique
class Stage(Enum):
    """Where the run is, in words for the live view."""

    TRAINING = "training the first releases"
    RUNNING = "fleets are reading"
    DRIFTED = "the cameras drift: accuracy falls, samples flow up, labels come back"
    UPDATED = "a better release is out: the cameras recover"
    SETTLING = "readings have ended: the last samples reach the cloud"
    OVER = "over"


@dataclass(slots=True)
class _Journals:
    """Both journals, as far as they have been read."""

    sensors: list[Entry]
    cameras: list[Entry]


class Demo:
    """One run, driven by the loop of the witness's link."""

    def __init__(self, options: Options, config: Config, processes: Processes, view: LiveView, broker_url: str) -> None:
        self._options = options
        self._config = config
        self._processes = processes
        self._view = view
        self._loop = Loop()
        self._link = Link(parse_broker_url(broker_url, session_expiry_s=0), service_identity("demo"))
        self.observer = Observer(self._link)
        self._readers = {fleet: JournalReader(options.run_dir / f"{fleet}.csv") for fleet in _FLEETS}
        self.journals = _Journals([], [])
        self._samples = SqliteSampleStore(config.cloud.samples_path)
        self._registry = Registry(config.cloud.registry_path)
        self._started = self._loop.clock()
        self._settling_since: float | None = None
        self._last_messages = 0
        self._notes: list[str] = []
        self.stage = Stage.TRAINING

    @property
    def elapsed_s(self) -> float:
        return self._loop.clock() - self._started

    def run(self) -> None:
        """Start everything and wait until the story is over, or its time is.

        Raises:
            ProcessDiedError: a process died, and it was not said to keep going.
            KeyboardInterrupt: somebody had enough.
        """
        run = self._options.run_dir
        cloud = str(run / "cloud.toml")
        self._link.attach(self._loop)
        self._loop.run(until=lambda: self._link.connected or self.elapsed_s > _SETTLE_S)
        if not self._link.connected:
            raise ConfigError(f"no MQTT 5 broker answers at {self._config.cloud.broker.url}")
        for service in ("publisher", "ingest", "trainer"):
            self._processes.start(service, "cloud", service, "--config", cloud)
        self._processes.start("gateway", "edge_gateway", "--config", str(run / "gateway.toml"))
        self._processes.start("labeller", "simulator", "labeller", "--config", str(run / "labeller.toml"))
        for fleet in _FLEETS:
            self._processes.start(fleet, "simulator", "fleet", "--config", str(run / f"{fleet}.toml"), finite=True)
        self._loop.call_every(_TICK_S, self._tick)
        self._loop.run(until=lambda: self.stage is Stage.OVER)
        self._read_the_rest()

    def _read_the_rest(self) -> None:
        """A run that was cut off still has books to close: let the fleets write down what they did, and hear it out."""
        self._processes.end(*_FLEETS)
        heard_until = self._loop.clock() + _TICK_S
        self._loop.call_at(heard_until, lambda _now: None)
        self._loop.run(until=lambda: self._loop.clock() >= heard_until)
        self._read_journals()

    def _read_journals(self) -> None:
        self.journals.sensors += self._readers["sensors"].new()
        self.journals.cameras += self._readers["cameras"].new()

    def close(self) -> None:
        self._link.close()
        self._loop.close()
        self._samples.close()
        self._registry.close()

    # -- watching ----------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        for name in self._processes.watch():
            self._notes.append(f"{self.elapsed_s:5.1f} s  {name} died and was started again")
        self._read_journals()
        self._advance(now)
        self._view.update(self._snapshot())

    def _advance(self, now: float) -> None:
        before = self.stage
        self.stage = self._next_stage(now)
        if self.stage is not before:
            self._notes.append(f"{self.elapsed_s:5.1f} s  {self.stage.value}")

    def _next_stage(self, now: float) -> Stage:
        fleets = [self._processes.children[fleet] for fleet in _FLEETS]
        if self.elapsed_s > self._options.sizes.max_s:
            return Stage.OVER
        if not any(fleet.is_running for fleet in fleets):
            self._settling_since = self._settling_since or now
            patience_over = now - self._settling_since > _SETTLE_S
            return Stage.OVER if self._all_stored() or patience_over else Stage.SETTLING
        phases = {entry.phase for entry in self.journals.cameras[-50:]}
        if "after_update" in phases:
            return Stage.UPDATED
        if "after_drift" in phases:
            return Stage.DRIFTED
        return Stage.RUNNING if self.journals.cameras else Stage.TRAINING

    def _all_stored(self) -> bool:
        promised = {row for seen in self.observer.models.values() for row in seen.promised}
        waiting = self.observer.states.get(self._config.gateway.node)
        drained = waiting is not None and waiting.counters.get("samples.waiting", 0) == 0
        return drained and promised <= {row for row, _ in self.stored()}

    def stored(self) -> list[tuple[Row, str]]:
        return [(Row(device, seq), reference) for device, _, seq, reference in self._samples.references()]

    def _snapshot(self) -> Snapshot:
        total = sum(self.observer.messages.values())
        rate, self._last_messages = (total - self._last_messages) / _TICK_S, total
        sensors = reads(self.journals.sensors)
        asked = sum(entry.reason.startswith("asked.") for entry in sensors)
        nodes: dict[str, dict[int, int]] = {}
        for state in self.observer.states.values():
            for model in state.models:
                of_model = nodes.setdefault(model.model, {})
                of_model[model.release] = of_model.get(model.release, 0) + 1
        devices = {
            name: online for name, online in self.observer.online.items() if name.startswith(("sensor-", "cam-"))
        }
        return Snapshot(
            elapsed_s=self.elapsed_s,
            stage=self.stage.value,
            devices_online=sum(devices.values()),
            devices_total=2 * self._options.sizes.devices,
            messages=dict(self.observer.messages),
            messages_per_s=rate,
            uplink_share=self._samples.count(SENSORS) / len(sensors) if sensors else None,
            asked_share=asked / len(sensors) if sensors else None,
            accuracy=accuracy_by_release(self.journals.cameras),
            nodes_by_release=nodes,
            labels=self._samples.count_labelled(CAMERAS),
            builds=[f"{build.model} {build.release}" for build in self.builds()],
            restarts={child.name: child.restarts for child in self._processes.children.values() if child.restarts},
            notes=self._notes[-6:],
        )

    # -- judging -----------------------------------------------------------------------------------------------------

    def builds(self) -> list[ReleaseReport]:
        return [build for model in (SENSORS, CAMERAS) for build in self._registry.releases(model)]

    def thresholds(self) -> dict[str, float]:
        """Above which score a device asks, by model, as the newest release has it."""
        return {build.model: build.thresholds["device"] for build in self.builds()}

    def account(self) -> Account:
        """Close the books."""
        devices = {name: state for name, state in self.observer.states.items() if state.role == "device"}
        books = make_books(
            [*self.journals.sensors, *self.journals.cameras],
            self.observer.models.values(),
            devices,
            self.stored(),
            set_aside=self._samples.count_quarantined(),
            expected=set(self._expected_rows()),
        )
        return reconcile(books)

    def _expected_rows(self) -> Iterator[tuple[str, str]]:
        """The rows of the finite source, dealt to the devices again from the data set itself."""
        settings, data = self._config.sensors, load_shuttle()
        for index in range(settings.devices):
            stream = SensorStream(data, Share(index, settings.devices), max_rows=settings.readings)
            while (reading := stream.next()) is not None:
                yield f"{settings.prefix}-{index:02d}", reading.reference

    def evidence(self, seconds: float, broker: tuple[str, str]) -> Evidence:
        stored = {row for row, _ in self.stored()}
        return Evidence(
            seed=self._options.seed,
            quick=self._options.quick,
            seconds=seconds,
            account=self.account(),
            sensors=uplink(self.journals.sensors, stored, self.observer.seen(SENSORS)),
            sensor_entries=self.journals.sensors,
            camera_entries=self.journals.cameras,
            builds=self.builds(),
            runtimes={"device": device_runtime(), "gateway": gateway_runtime()},
            broker_name=broker[0],
            broker_version=broker[1],
            messages=dict(self.observer.messages),
            labels=self._samples.count_labelled(CAMERAS),
            restarts={child.name: child.restarts for child in self._processes.children.values() if child.restarts},
        )


def run_demo(options: Options, console: Console) -> int:
    """Run the demo; return 0 when the loop closed, 1 when it did not.

    Raises:
        ConfigError: no broker, or a folder in the way.
        ProcessDiedError: a process died.
    """
    started = time.monotonic()
    # Whoever ends the demo politely gets what Ctrl-C gets: no process is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started with nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    _clear(options)
    with _broker(options) as (url, name, version), LiveView(console) as view:
        config = make_config(options, url)
        config.write(options.run_dir)
        with Processes(options.run_dir, keep_going=options.keep_going) as processes:
            processes.run("cloud", "init", "--config", str(options.run_dir / "cloud.toml"))
            demo = Demo(options, config, processes, view, url)
            try:
                demo.run()
                evidence = demo.evidence(time.monotonic() - started, (name, version))
                thresholds = demo.thresholds()
            finally:
                demo.close()
    report = make_report(evidence)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_html(options.out / "report.html", report, evidence, thresholds)
    print_summary(console, report)
    console.print(f"Report: {options.out / 'report.html'} and {options.out / 'report.json'}")
    return 0 if report["closed"] else 1


def _clear(options: Options) -> None:
    """Make room for this run; only what an earlier run made is removed."""
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"{options.out} is not a folder")
    shutil.rmtree(options.run_dir, ignore_errors=True)
    for name in ("report.json", "report.html"):
        (options.out / name).unlink(missing_ok=True)
    options.run_dir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _broker(options: Options) -> Iterator[tuple[str, str, str]]:
    """The broker's URL, name and version: one of ours, or the user's."""
    if options.broker_url is not None:
        yield options.broker_url, options.broker_url, "unknown"
        return
    with start_broker(options.run_dir / "broker", options.broker_kind) as broker:
        yield broker.url, broker.name, broker.version
