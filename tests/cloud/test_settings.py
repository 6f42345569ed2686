"""The cloud's file, what `init` makes of it, and its services as processes."""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest
import tomli_w

from cloud import __main__ as command
from cloud import services
from cloud.keys import FileKeyStore
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, parse_role
from cloud.sample_store import StoredSample
from cloud.settings import CloudSettings, ModelSettings, RetentionSettings
from cloud.sqlite_store import SqliteSampleStore
from shoal.config import load_config
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.release.trust import model_role
from shoal.routes import Route
from shoal.v1.sample_pb2 import Sample, SampleBatch, SampleGroup
from shoal.v1.sensor_pb2 import Scalars, SensorData

PATIENCE_S = 30.0
SERVICES = ("ingest", "trainer", "publisher")
BUDGET_BYTES = 1 << 20


@pytest.fixture
def write(tmp_path):
    """Write a configuration file; what a test does not name is the least that is needed."""

    def write(**changes):
        path = tmp_path / "cloud.toml"
        least = {"data_dir": str(tmp_path / "data"), "models": [{"name": "digits"}]}
        path.write_text(tomli_w.dumps({key: value for key, value in (least | changes).items() if value is not None}))
        return path

    return write


def test_file_needs_little_and_the_rest_has_defaults(write, tmp_path):
    """Two keys are enough; everything on disk is below one directory."""
    settings = load_config(write(), CloudSettings)
    assert settings == CloudSettings(str(tmp_path / "data"), [ModelSettings("digits")])
    assert settings.retained_budget_bytes == 256 << 20
    assert settings.model("digits") == ModelSettings("digits", "")
    assert settings.model("shuttle") is None
    paths = (
        *(settings.samples_path, settings.releases_dir, settings.keys_dir, settings.builds_dir),
        *(settings.objects_dir, settings.registry_path),
    )
    assert [path.relative_to(settings.directory).name for path in paths] == [
        "samples.sqlite",
        "releases",
        "keys",
        "builds",
        "objects",
        "registry.sqlite",
    ]


def test_every_setting_is_documented():
    """In the table of docs/cloud.md, or in the example where it is of a table of its own."""
    page = (Path(__file__).parents[2] / "docs" / "cloud.md").read_text()
    plain = set(CloudSettings.__struct_fields__) - {"models", "broker", "retention"}
    nested = {f"retention.{name}" for name in RetentionSettings.__struct_fields__}
    assert [name for name in sorted(plain | nested) if f"| `{name}` |" not in page] == []
    assert [name for name in ModelSettings.__struct_fields__ if f"{name} = " not in page] == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data_dir": None}, "data_dir"),
        ({"models": None}, "models"),
        ({"colour": 1}, "colour"),
        ({"train_threads": "two"}, r"\$\.train_threads"),
        ({"train_threads": 0}, r"\$\.train_threads"),
        ({"parallel_builds": 0}, r"\$\.parallel_builds"),
        ({"retained_budget_bytes": 0}, r"\$\.retained_budget_bytes"),
        ({"retention": {"max_bytes": -1}}, r"\$\.retention.max_bytes"),
        ({"retention": {"keep_days": -1.0}}, r"\$\.retention.keep_days"),
        ({"retention": {"colour": 1}}, "colour"),
        ({"state_interval_s": 0.0}, r"\$\.state_interval_s"),
        ({"state_interval_s": 601.0}, r"\$\.state_interval_s"),
        ({"models": [{}]}, "name"),
        ({"models": [{"name": "digits", "pipeline": 1}]}, r"pipeline"),
        ({"models": [{"name": "digits", "colour": 1}]}, "colour"),
        ({"broker": {"password": "x"}}, "password"),
    ],
)
def test_wrong_setting_is_named(write, changes, named):
    """The operator reads which file and which key, before anything is started."""
    path = write(**changes)
    with pytest.raises(ConfigError, match=f"^{path}: .*{named}"):
        load_config(path, CloudSettings)


@pytest.mark.parametrize("service", [*SERVICES, "init"])
def test_wrong_file_is_one_line_and_exit_status_2(write, service, monkeypatch, capsys):
    """So for every service."""
    monkeypatch.setattr("sys.argv", ["cloud", service, "--config", str(write(colour=1))])
    assert command.main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "colour" in err


@pytest.mark.parametrize("service", SERVICES)
def test_service_before_init_says_what_is_missing(write, service, monkeypatch, capsys):
    """Nothing is made on the way, so that `init` can follow."""
    path = write()
    monkeypatch.setattr("sys.argv", ["cloud", service, "--config", str(path)])
    assert command.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not load_config(path, CloudSettings).directory.exists()


def test_init_makes_keys_stores_and_the_root_that_nodes_trust(write):
    """Keys for each role, readable by their owner; an empty repository that publishes nothing yet."""
    settings = load_config(write(models=[{"name": "digits"}, {"name": "shuttle"}]), CloudSettings)
    root = services.init(settings)
    store = ReleaseStore(settings.releases_dir)
    assert root.read_bytes() == store.root() == store.load().roots[0]
    assert store.load().targets() == {}
    keys = FileKeyStore(settings.keys_dir)
    for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role("digits"), model_role("shuttle")):
        assert keys.signers(role)
    assert {path.stat().st_mode & 0o077 for path in settings.keys_dir.iterdir()} == {0}
    assert parse_role(store.load().roles[model_role("shuttle")]).version == 1
    with closing(SqliteSampleStore(settings.samples_path)) as samples:
        assert samples.count() == 0


def test_init_is_done_once(write):
    """A second one changes nothing: the nodes out there trust the first root."""
    settings = load_config(write(), CloudSettings)
    root = services.init(settings).read_bytes()
    with pytest.raises(ConfigError, match="already"):
        services.init(settings)
    assert (settings.directory / "root.json").read_bytes() == root == ReleaseStore(settings.releases_dir).root()


def test_init_without_a_place_says_so(write, tmp_path):
    """A file in the way is the operator's to move."""
    (tmp_path / "data").write_text("")
    with pytest.raises(ConfigError, match=f"^data_dir {tmp_path}/data: "):
        services.init(load_config(write(), CloudSettings))


class Watcher:
    """A gateway that hears what services say of themselves."""

    def __init__(self, url):
        self.site = f"site-{uuid.uuid4().hex[:12]}"
        self.loop = Loop()
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(self.site, "gw", "gateway"))
        self.online = {}
        self.states = {}
        self.acks = []
        self.link.subscribe(Route.CLOUD_PRESENCE, self._on_presence)
        self.link.subscribe(Route.CLOUD_STATE, self._on_state)
        self.link.subscribe(Route.ACK, lambda delivery: self.acks.append(delivery.message), site=self.site, node="gw")
        self.link.attach(self.loop)

    def _on_presence(self, delivery):
        self.online[delivery.address.service] = delivery.message.online

    def _on_state(self, delivery):
        if delivery.message is not None:
            self.states[delivery.address.service] = delivery.message

    def until(self, is_so):
        deadline = time.monotonic() + PATIENCE_S
        late = self.loop.call_at(deadline, lambda _: None)
        self.loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
        late.cancel()
        assert is_so(), (self.online, self.states)

    def close(self):
        self.link.close()
        self.loop.close()


@pytest.fixture
def started(write, mosquitto):
    """All three services as processes, on stores that `init` made, with no model to train and an old sample."""
    retention = {"keep_days": 1.0, "max_age_days": 30.0}
    path = write(models=[], broker={"url": mosquitto.url}, retained_budget_bytes=BUDGET_BYTES, retention=retention)
    settings = load_config(path, CloudSettings)
    services.init(settings)
    with closing(SqliteSampleStore(settings.samples_path)) as samples:
        samples.add([StoredSample("old", bytes(16), 0, "digits", "gw", 1, "", 0, 0, b"r", *[None] * 6)])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "cloud", name, "--config", str(path)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in SERVICES
    }
    yield settings, processes
    for process in processes.values():
        process.kill()
        process.communicate()


def test_services_serve_and_end_when_they_are_told_to(started, mosquitto):
    """Each says that it is there, ingest stores and acknowledges, SIGTERM is exit status 0 and an offline presence."""
    settings, processes = started
    with closing(Watcher(mosquitto.url)) as watcher:
        # A state follows the subscriptions, a presence does not.
        watcher.until(lambda: all(watcher.online.get(name) and name in watcher.states for name in SERVICES))
        reading = SensorData(seq=1, scalars=Scalars(values=[1.0]))
        group = SampleGroup(device="cam", epoch=bytes(16), model="digits", samples=[Sample(reading=reading)])
        batch = SampleBatch(gateway="gw", groups=[group])
        assert watcher.link.publish(Route.SAMPLE, batch, site=watcher.site, node="gw")
        watcher.until(lambda: watcher.acks)
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        watcher.until(lambda: not any(watcher.online[name] for name in SERVICES))
        assert {name: state.role for name, state in watcher.states.items() if name in SERVICES} == {
            name: name for name in SERVICES
        }
        counters = watcher.states["publisher"].counters
        assert 0 < counters["retained_bytes"] < counters["retained_budget_bytes"] == BUDGET_BYTES
    for process in processes.values():
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
    with closing(SqliteSampleStore(settings.samples_path)) as samples:
        assert sorted(samples.references()) == [("cam", bytes(16), 1, ""), ("old", bytes(16), 0, "")]
        # Retention ran beside it.
        assert samples._db.execute("SELECT device FROM samples WHERE reading IS NULL").fetchall() == [("old",)]
