"""One real build of the sensors' model, from `init` to the publisher's queue."""

import datetime as dt
import logging
import time
from contextlib import closing
from dataclasses import dataclass, fields

import msgspec
import pytest
import tomli_w

from cloud import build as build_module
from cloud import services
from cloud.build import BuildReport, build, load_reports, main, newest_release, report_path
from cloud.pipeline import TierReport
from cloud.release_orders import checked_files
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT
from cloud.sample_store import SampleStore, StoredLabel, StoredSample
from cloud.settings import CloudSettings, ModelSettings
from cloud.tasks.datasets import SHUTTLE_STREAM, shuttle_rows
from shoal.release.chunks import digest
from shoal.release.trust import model_role, plan_path, spec_path
from shoal.v1.release_pb2 import TIER_DEVICE, TIER_GATEWAY, ReleaseSpec, RolloutPlan
from shoal.v1.sensor_pb2 import Scalars, SensorData

MODEL = ModelSettings(name="shuttle", targets=["sensor-*", "gw-*"])
LABELLED = 40
MISFITS = 3
EPOCH = bytes(16)


@dataclass
class Built:
    settings: CloudSettings
    report: BuildReport
    began: float
    ended: float

    @property
    def store(self):
        return ReleaseStore(self.settings.releases_dir)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A build from labelled samples of the field, three of them of an older schema."""
    settings = CloudSettings(data_dir=str(tmp_path_factory.mktemp("cloud")), models=[MODEL])
    services.init(settings)
    stream = shuttle_rows().take(SHUTTLE_STREAM).take(slice(LABELLED))
    readings = [*stream.x.tolist(), *[[0.0]] * MISFITS]
    labels = [*stream.y.tolist(), *[0] * MISFITS]
    with closing(SampleStore(settings.samples_path)) as samples:
        for seq, (values, label) in enumerate(zip(readings, labels, strict=True)):
            reading = SensorData(scalars=Scalars(values=values)).SerializeToString()
            nothing = (None,) * 6
            samples.add([StoredSample("dev", EPOCH, seq, "shuttle", "gw", 1, "", 0, seq, reading, *nothing)])
            samples.add_labels([StoredLabel("dev", EPOCH, seq, label, 1, "", 0)])
    began = time.time()
    report = build(settings, MODEL)
    return Built(settings, report, began, time.time())


def orders(built):
    return {order.role: order for order in built.store.orders()}


def released_spec(built):
    published = newest_release(built.store, "shuttle", 1)
    return published.spec, published.files


def test_release_and_plan_wait_for_the_publisher(built):
    """Two orders, the release first, each signed so that the publisher takes it."""
    store = built.store
    release, plan = store.orders()
    assert (release.role, plan.role) == (model_role("shuttle"), ROLLOUT)
    files = checked_files(release, store.load(), store, dt.datetime.now(dt.UTC))
    spec, artefacts = released_spec(built)
    assert set(files) == {digest(data) for data in artefacts.values()} | {
        digest(spec.SerializeToString(deterministic=True))
    }


def test_plan_brings_the_release_to_everybody_it_is_for(built):
    """The targets are the settings', the share is all of them, in one stage."""
    order = orders(built)[ROLLOUT]
    (plan,) = [RolloutPlan.FromString(path.read_bytes()) for path in order.directory.iterdir() if path.suffix == ""]
    assert plan == RolloutPlan(
        rollout_id="shuttle-1",
        model="shuttle",
        release=1,
        spec_path=spec_path("shuttle", 1),
        targets=["sensor-*", "gw-*"],
        share_permille=1000,
    )
    assert plan_path("shuttle").encode() in order.metadata


def test_report_says_everything_that_was_measured(built):
    """Every field is filled, for both tiers and precisions, and agrees with what was signed."""
    report = built.report
    spec, artefacts = released_spec(built)
    assert (report.model, report.release, report.parent) == ("shuttle", 1, 0)
    assert built.began * 1e6 - 1 <= report.created_at_us <= built.ended * 1e6 + 1
    assert set(report.tiers) == {"device", "gateway"}
    for name, tier in (("device", TIER_DEVICE), ("gateway", TIER_GATEWAY)):
        measured = report.tiers[name]
        (artefact,) = [item for item in spec.artefacts if item.tier == tier]
        assert set(measured) == {field.name for field in fields(TierReport)}
        assert {key for key, value in measured.items() if value is None} == {"metric_parent"}
        assert measured[f"bytes_{measured['ships']}"] == artefact.length_bytes == len(artefacts[artefact.path])
        assert (measured["ships"] == "int8") == artefact.int8
        assert report.thresholds[name] == pytest.approx(artefact.threshold)
        assert artefact.threshold > 0
    assert report.metrics_ppm == dict(spec.metrics_ppm)
    assert report.metrics_ppm["device_average_precision"] > 850_000


def test_report_counts_labels_as_the_trainer_does(built):
    """Those of samples that fit no more count too: otherwise they would look new for ever, and start build on build."""
    with closing(SampleStore(built.settings.samples_path)) as samples:
        assert built.report.labelled == samples.count_labelled("shuttle") == LABELLED + MISFITS
        assert len(samples.labelled("shuttle", (9,), 2)) == LABELLED


def test_report_is_on_disk(built):
    """What `build` returned is what every other process reads, and no checkpoint is left."""
    assert load_reports(built.settings.builds_dir, "shuttle") == [built.report]
    assert load_reports(built.settings.builds_dir, "digits") == []
    assert [path for path in built.settings.builds_dir.rglob("*") if path.is_file()] == [
        report_path(built.settings.builds_dir, "shuttle", 1)
    ]


def test_reports_are_sorted_by_number(tmp_path, built):
    """The tenth release comes after the ninth."""
    for release in (10, 9, 1):
        path = report_path(tmp_path, "shuttle", release)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(built.report, release=release)))
    assert [report.release for report in load_reports(tmp_path, "shuttle")] == [1, 9, 10]


def test_release_is_read_back_as_the_parent_of_the_next(built):
    """While it still waits too; one that is not there is none, and neither is one with a file missing."""
    spec, files = released_spec(built)
    assert (spec.model, spec.release, spec.parent) == ("shuttle", 1, 0)
    assert set(files) == {artefact.path for artefact in spec.artefacts}
    assert newest_release(built.store, "shuttle", 2) is None
    path = orders(built)[model_role("shuttle")].directory / spec.artefacts[0].sha256.hex()
    data = path.read_bytes()
    path.unlink()
    try:
        assert newest_release(built.store, "shuttle", 1) is None
    finally:
        path.write_bytes(data)
    assert isinstance(newest_release(built.store, "shuttle", 1).spec, ReleaseSpec)


@pytest.fixture
def run_main(tmp_path, monkeypatch, caplog):
    """Run the command on fresh stores."""
    settings = CloudSettings(data_dir=str(tmp_path / "cloud"), models=[ModelSettings(name="digits")])
    config = tmp_path / "cloud.toml"
    config.write_text(tomli_w.dumps({"data_dir": settings.data_dir, "models": [{"name": "digits"}]}))
    services.init(settings)

    def run(model):
        monkeypatch.setattr("sys.argv", ["cloud.build", "--config", str(config), "--model", model])
        monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
        with caplog.at_level(logging.ERROR, "cloud.build"):
            status = main()
        return status, settings, caplog.messages

    return run


def test_release_that_the_gate_refuses_leaves_nothing_behind(run_main, brief_task, monkeypatch):
    """Exit status 2, the reason in the log, no order, no report: the fleet keeps what it has."""
    monkeypatch.setattr(build_module, "load_task", lambda _: brief_task)
    status, settings, messages = run_main("digits")
    assert status == 2
    assert "build refused model=digits reason=release 1 of digits, device: " in messages[-1]
    assert ReleaseStore(settings.releases_dir).orders() == []
    assert load_reports(settings.builds_dir, "digits") == []


def test_model_that_is_not_in_the_file_is_refused(run_main):
    """The operator reads which one and where."""
    status, settings, messages = run_main("engine")
    assert status == 2
    assert messages[-1].endswith("cloud.toml has no model 'engine'")
    assert not settings.builds_dir.exists()
