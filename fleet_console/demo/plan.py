"""What the demo runs: its sizes, and the configuration files of its processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import tomli_w
import yaml

from cloud.pipelines.file import DeployToEdge, EvaluateModel, Pipeline, QuantizeModel, TrainModel, Triggers
from cloud.settings import CloudSettings, ModelSettings
from edge_gateway.service import GatewaySettings
from fleet_console.broker import BrokerKind
from shoal.config import BrokerSettings
from simulator.fleet import FleetSettings
from simulator.labeller import LabellerSettings

SITE = "plant-a"
GATEWAY = "gw-01"
SENSORS = "shuttle"
CAMERAS = "digits"
_AUDIT_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything.

    Attributes:
        sensor_readings: of the whole sensor fleet.
        camera_readings_before, camera_readings_after: of each camera.
        min_new_labels: what starts the retraining.
        max_s: a loop that has not closed by then is reported as such.
    """

    devices: int
    sensor_rate_hz: float
    sensor_readings: int
    camera_rate_hz: float
    camera_readings_before: int
    camera_readings_after: int
    min_new_labels: int
    label_delay_s: float
    max_s: float


FULL = Sizes(
    devices=12,
    sensor_rate_hz=20.0,
    sensor_readings=24_000,
    camera_rate_hz=4.0,
    camera_readings_before=100,
    camera_readings_after=120,
    min_new_labels=600,
    label_delay_s=3.0,
    max_s=480.0,
)
QUICK = Sizes(
    devices=12,
    sensor_rate_hz=20.0,
    sensor_readings=7_200,
    camera_rate_hz=5.0,
    camera_readings_before=50,
    camera_readings_after=60,
    min_new_labels=500,
    label_delay_s=2.0,
    max_s=240.0,
)


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `shoal demo`.

    Attributes:
        out: where the report goes; the run's files are in its folder `run`.
        broker_url: an MQTT 5 broker that runs already; None starts one.
        keep_going: start a process again that died, instead of giving up.
    """

    out: Path
    seed: int = 7
    quick: bool = False
    keep_going: bool = False
    broker_kind: BrokerKind | None = None
    broker_url: str | None = None

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else FULL

    @property
    def run_dir(self) -> Path:
        return self.out / "run"


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of each process, by the name of its file."""

    cloud: CloudSettings
    pipelines: Sequence[Pipeline]
    gateway: GatewaySettings
    sensors: FleetSettings
    cameras: FleetSettings
    labeller: LabellerSettings

    def write(self, directory: Path) -> None:
        for name in ("cloud", "gateway", "sensors", "cameras", "labeller"):
            text = tomli_w.dumps(_without_none(msgspec.to_builtins(getattr(self, name))))
            (directory / f"{name}.toml").write_text(text, encoding="utf-8")
        for pipeline in self.pipelines:
            text = yaml.safe_dump(msgspec.to_builtins(pipeline), sort_keys=False)
            (directory / f"{pipeline.model}.yaml").write_text(text, encoding="utf-8")


def make_config(options: Options, broker_url: str) -> Config:
    """Every process gets the broker's address and a directory of its own; nodes get the trusted root besides."""
    run, sizes = options.run_dir, options.sizes
    broker = BrokerSettings(url=broker_url)
    root = str(run / "cloud" / "root.json")
    cloud = CloudSettings(
        data_dir=str(run / "cloud"),
        models=[ModelSettings(name=model, pipeline=str(run / f"{model}.yaml")) for model in (SENSORS, CAMERAS)],
        broker=broker,
        state_interval_s=5.0,
    )
    pipelines = (
        _pipeline(SENSORS, "sensor", options.seed, Triggers(max_releases=1)),
        _pipeline(CAMERAS, "vision", options.seed, Triggers(new_labels=sizes.min_new_labels, max_releases=2)),
    )
    gateway = GatewaySettings(
        metrics_address="",  # two demos at once would want the same port
        site=SITE,
        node=GATEWAY,
        models=[SENSORS, CAMERAS],
        data_dir=str(run / "gateway"),
        trusted_root=root,
        broker=broker,
        state_interval_s=3.0,
        sample_linger_s=1.0,
        retry_after_s=5.0,
        probation_s=3.0,
    )
    sensors = FleetSettings(
        kind="sensors",
        site=SITE,
        prefix="sensor",
        model=SENSORS,
        devices=sizes.devices,
        rate_hz=sizes.sensor_rate_hz,
        readings=sizes.sensor_readings,
        data_dir=str(run / "sensors"),
        journal=str(run / "sensors.csv"),
        trusted_root=root,
        broker=broker,
        seed=options.seed,
        audit_share=_AUDIT_SHARE / 8,
        retry_after_s=5.0,
        probation_s=3.0,
    )
    cameras = FleetSettings(
        kind="cameras",
        site=SITE,
        prefix="cam",
        model=CAMERAS,
        devices=sizes.devices,
        rate_hz=sizes.camera_rate_hz,
        readings=sizes.camera_readings_before,
        readings_after=sizes.camera_readings_after,
        drifts=True,
        data_dir=str(run / "cameras"),
        journal=str(run / "cameras.csv"),
        trusted_root=root,
        broker=broker,
        seed=options.seed,
        audit_share=_AUDIT_SHARE,
        max_share=0.6,
        retry_after_s=5.0,
        probation_s=3.0,
    )
    labeller = LabellerSettings(models=[CAMERAS], broker=broker, delay_s=sizes.label_delay_s)
    return Config(cloud, pipelines, gateway, sensors, cameras, labeller)


def _pipeline(model: str, task: str, seed: int, triggers: Triggers) -> Pipeline:
    return Pipeline(
        model=model,
        task=task,
        parameters={"data": model},
        seed=seed,
        triggers=triggers,
        steps=[
            TrainModel(inputs="samples", outputs="trained"),
            QuantizeModel(inputs=["trained", "samples"], outputs="quantized"),
            EvaluateModel(inputs=["quantized", "samples", "field"], outputs="release"),
            DeployToEdge(inputs="release"),
        ],
    )


def _without_none(table: Mapping[str, object]) -> dict[str, object]:
    """TOML has no null: what is not set is left out."""
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }
