"""A released model labels what came from the field, and how good it is was measured before."""

import datetime as dt
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner

from cloud import services
from cloud.keys import FileKeyStore
from cloud.release_orders import submit_release
from cloud.release_store import ReleaseStore
from cloud.sample_store import StoredLabel, StoredSample
from cloud.settings import CloudSettings, ModelSettings
from cloud.sqlite_store import SqliteSampleStore
from cloud.teacher_release import held_out, load_teacher
from fleet_console.cli import app
from shoal.errors import ConfigError, ModelError
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER
from shoal.v1.sensor_pb2 import SensorData
from tests.cloud.toolchain import task_of

ROOT = Path(__file__).parents[2]
EPOCH = bytes(range(16))
PRECISION = 0.97


def release(settings, built):
    """Queue a release."""
    spec = built.spec
    keys = FileKeyStore(settings.keys_dir)
    files = [built.files[item.path] for item in spec.artefacts]
    submit_release(ReleaseStore(settings.releases_dir), spec, files, keys, dt.datetime.now(dt.UTC))


def fill(store, images, first=0):
    store.add(
        StoredSample(
            "cam-00",
            EPOCH,
            first + seq,
            "digits",
            "gw",
            1,
            "",
            0,
            seq,
            SensorData(tensor=to_tensor(image)).SerializeToString(),
            *[None] * 6,
        )
        for seq, image in enumerate(images)
    )


@pytest.fixture
def settings(tmp_path):
    settings = CloudSettings(str(tmp_path / "cloud"), [ModelSettings("digits"), ModelSettings("shuttle")])
    services.init(settings)
    return settings


@pytest.fixture
def store(settings):
    with closing(SqliteSampleStore(settings.samples_path)) as store:
        yield store


@pytest.fixture
def labelled_store(store, labelled):
    """With what people said of 300 drifted images."""
    fill(store, labelled.x)
    words = [
        StoredLabel("cam-00", EPOCH, seq, int(value), LABEL_SOURCE_PERSON, "ann", 9)
        for seq, value in enumerate(labelled.y)
    ]
    store.add_labels(words)
    return store


@pytest.fixture
def shoal(settings, tmp_path):
    """Run `shoal label auto`; an error that the person would read is raised."""
    config = tmp_path / "cloud.toml"
    models = [{"name": "digits", "pipeline": str(ROOT / "examples/pipelines/vision.yaml")}, {"name": "shuttle"}]
    config.write_text(tomli_w.dumps({"data_dir": settings.data_dir, "models": models}))

    def run(*arguments):
        result = CliRunner().invoke(app, ["label", "auto", "--config", str(config), *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return run


def test_released_model_labels_the_field_as_well_as_it_says(shoal, settings, labelled_store, retrained, unseen):
    """On drifted images that it never saw, with the labels of people as its measure: precise, and it says of whom."""
    release(settings, retrained)
    fill(labelled_store, unseen.x, first=10_000)
    told = json.loads(shoal("--model", "digits", "--precision", str(PRECISION), "--json"))
    assert told["sureness"]["precision_bound"] >= PRECISION
    said = list(labelled_store.labels.find(source=LABEL_SOURCE_TEACHER))
    assert len(said) == told["labelled"] > len(unseen) / 3
    assert {word.author for word in said} == {told["teacher"]} == {"digits 1"}
    right = np.mean([word.label == unseen.y[word.seq - 10_000] for word in said])
    assert right >= PRECISION - 0.02
    assert told["labelled"] + told["unsure"] == len(unseen)
    assert "0 samples labelled" in shoal("--model", "digits", "--precision", str(PRECISION))


def test_held_out_rows_are_of_no_teacher(store, labelled):
    """Its own words would find it always right."""
    task = task_of("digits")
    alone = len(held_out(task, store))
    fill(store, labelled.x[:60])
    words = [StoredLabel("cam-00", EPOCH, seq, 3, LABEL_SOURCE_TEACHER, "t", 9) for seq in range(60)]
    store.add_labels(words)
    assert len(held_out(task, store)) == alone
    store.add_labels(StoredLabel("cam-00", EPOCH, seq, 3, LABEL_SOURCE_PERSON, "ann", 9) for seq in range(60))
    assert len(held_out(task, store)) > alone


def test_another_model_may_be_the_teacher(settings, digits, tmp_path):
    """A larger one that takes the same input, named by its file and digest."""
    release(settings, digits)
    item = next(item for item in digits.spec.artefacts if item.tier == pb.TIER_GATEWAY)
    file = tmp_path / "large.onnx"
    file.write_bytes(digits.files[item.path])
    teacher = load_teacher(settings, "digits", file)
    assert teacher.name.startswith("large ")
    own = load_teacher(settings, "digits")
    rows = np.random.default_rng(1).uniform(0, 16, (4, 8, 8, 1)).astype(np.float32)
    assert teacher.opinions(rows).certainty.tolist() == own.opinions(rows).certainty.tolist()
    with pytest.raises(ConfigError, match="expected one of"):
        load_teacher(settings, "digits", tmp_path / "cloud" / "root.json")
    with pytest.raises(ConfigError, match="No such file"):
        load_teacher(settings, "digits", tmp_path / "nothing.onnx")


def test_no_teacher_without_a_release_that_classifies(settings, shuttle):
    """A reconstruction error is no class."""
    with pytest.raises(ConfigError, match="digits has no release"):
        load_teacher(settings, "digits")
    release(settings, shuttle)
    with pytest.raises(ModelError, match="release 1 of shuttle does not classify"):
        load_teacher(settings, "shuttle")
