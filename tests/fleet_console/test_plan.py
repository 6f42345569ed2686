"""The demo's configuration: what is written is what its processes read."""

from pathlib import Path

import msgspec
import pytest

from cloud.pipelines.file import load_pipeline
from cloud.settings import CloudSettings
from cloud.tasks import BUILT_IN
from edge_gateway.service import GatewaySettings
from fleet_console.broker import BrokerKind
from fleet_console.demo.plan import CAMERAS, FULL, QUICK, SENSORS, Options, make_config
from shoal.config import load_config
from simulator.fleet import FleetSettings
from simulator.labeller import LabellerSettings
from simulator.streams import FleetKind

URL = "mqtt://127.0.0.1:18830"
KINDS = {
    "cloud": CloudSettings,
    "gateway": GatewaySettings,
    "sensors": FleetSettings,
    "cameras": FleetSettings,
    "labeller": LabellerSettings,
}


@pytest.fixture
def options(tmp_path):
    return Options(out=tmp_path, seed=8, quick=True)


@pytest.fixture
def config(options):
    options.run_dir.mkdir()
    config = make_config(options, URL)
    config.write(options.run_dir)
    return config


@pytest.mark.parametrize("name", KINDS)
def test_every_process_reads_what_was_meant(config, options, name):
    """Each file is accepted by its process's own settings and gives the same values back, bounds included."""
    assert load_config(options.run_dir / f"{name}.toml", KINDS[name]) == getattr(config, name)
    assert {path.stem for path in options.run_dir.glob("*.toml")} == set(KINDS)
    assert [load_pipeline(Path(model.pipeline)) for model in config.cloud.models] == list(config.pipelines)


def test_processes_share_the_broker_and_nothing_else(config, options):
    """One address for all, a directory for each; nodes are given the root that `init` will write."""
    settings = [getattr(config, name) for name in KINDS]
    assert {one.broker.url for one in settings} == {URL}
    directories = [config.cloud.data_dir, config.gateway.data_dir, config.sensors.data_dir, config.cameras.data_dir]
    assert len(set(directories)) == 4
    assert all(path.startswith(f"{options.run_dir}/") for path in directories)
    nodes = (config.gateway, config.sensors, config.cameras)
    assert {node.trusted_root for node in nodes} == {f"{config.cloud.directory}/root.json"}
    assert config.sensors.journal != config.cameras.journal


def test_story_can_come_to_its_end(config):
    """Both models are built here and served by the gateway; the cameras drift, get a release, and are labelled."""
    assert [model.name for model in config.cloud.models] == config.gateway.models == [SENSORS, CAMERAS]
    assert [pipeline.model for pipeline in config.pipelines] == [SENSORS, CAMERAS]
    assert {pipeline.task for pipeline in config.pipelines} <= set(BUILT_IN)
    assert (config.sensors.kind, config.cameras.kind) == (FleetKind.SENSORS.value, FleetKind.CAMERAS.value)
    assert (config.sensors.model, config.cameras.model) == (SENSORS, CAMERAS)
    assert (config.sensors.drifts, config.cameras.drifts) == (False, True)
    assert [pipeline.triggers.max_releases for pipeline in config.pipelines] == [1, 2]
    assert config.labeller.models == [CAMERAS]
    assert config.sensors.site == config.cameras.site == config.gateway.site
    assert config.sensors.prefix != config.cameras.prefix
    assert config.cameras.readings_after > 0


def test_seed_decides_for_everybody(config):
    """Training and readings follow the one number of the command line."""
    assert {config.sensors.seed, config.cameras.seed, *(pipeline.seed for pipeline in config.pipelines)} == {8}


@pytest.mark.parametrize(("quick", "sizes"), [(True, QUICK), (False, FULL)])
def test_sizes_reach_the_fleets(tmp_path, quick, sizes):
    """Quick is the same path with fewer readings."""
    config = make_config(Options(out=tmp_path, quick=quick), URL)
    assert config.sensors.devices == config.cameras.devices == sizes.devices
    assert (config.sensors.readings, config.sensors.rate_hz) == (sizes.sensor_readings, sizes.sensor_rate_hz)
    assert (config.cameras.readings, config.cameras.rate_hz) == (sizes.camera_readings_before, sizes.camera_rate_hz)
    assert config.cameras.readings_after == sizes.camera_readings_after
    assert config.pipelines[1].triggers.new_labels == sizes.min_new_labels
    assert config.labeller.delay_s == sizes.label_delay_s
    reading_s = sizes.sensor_readings / sizes.devices / sizes.sensor_rate_hz
    assert reading_s < (120 if quick else 300) < sizes.max_s


def test_quick_is_less(tmp_path):
    """Of everything that takes time."""
    assert QUICK.sensor_readings < FULL.sensor_readings
    assert QUICK.camera_readings_before < FULL.camera_readings_before
    assert QUICK.camera_readings_after < FULL.camera_readings_after


def test_what_is_not_set_is_not_written(config, options):
    """TOML has no null, and a broker without TLS has no certificates."""
    text = (options.run_dir / "cloud.toml").read_text()
    assert "tls" not in text
    assert msgspec.toml.decode(text)["broker"] == {"url": URL}


def test_options_have_defaults(tmp_path):
    """The command line's."""
    options = Options(out=tmp_path)
    assert (options.seed, options.quick, options.keep_going, options.broker_kind, options.broker_url) == (
        7,
        False,
        False,
        None,
        None,
    )
    assert Options(out=tmp_path, broker_kind=BrokerKind.IOTCORE).run_dir == tmp_path / "run"
