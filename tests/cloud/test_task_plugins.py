"""Tasks by name, by entry point and by file; and what the two that ship make of their parameters."""

import importlib.metadata
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloud.models.detectors import CrossPredictor, autoencoder
from cloud.models.layers import fold_for_export
from cloud.pipelines.file import load_pipeline
from cloud.tasks import BUILT_IN, GROUP, load_task
from cloud.tasks.base import LabelledSamples
from cloud.tasks.sensor import windows_of
from device_agent.windows import Windows
from shoal.errors import ConfigError
from shoal.v1 import release_pb2 as pb
from tests.cloud.toolchain import build_release

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "pipelines" / "valve.yaml"
TIERS = (pb.TIER_DEVICE, pb.TIER_GATEWAY)


def test_what_ships_is_offered_as_entry_points_too():
    """The table in the code and the package's metadata name the same classes."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    assert declared == dict(BUILT_IN)


def test_installed_package_may_offer_a_task(monkeypatch, brief_task):
    """Its entry point is found by name; one that cannot be loaded is an error that says which."""
    points = [
        importlib.metadata.EntryPoint("press", "tests.cloud.conftest:BriefDigitsTask", GROUP),
        importlib.metadata.EntryPoint("lost", "no_such_module:Task", GROUP),
    ]
    monkeypatch.setattr("cloud.tasks.entry_points", lambda group: points if group == GROUP else [])
    assert load_task("press", "m", {}, Path()).model == "m"
    with pytest.raises(ConfigError, match="task 'lost' of no_such_module:Task"):
        load_task("lost", "m", {}, Path())
    with pytest.raises(ConfigError, match="no task 'gone': there is lost, press, sensor, vision"):
        load_task("gone", "m", {}, Path())


@pytest.fixture
def valve():
    pipeline = load_pipeline(EXAMPLE)
    return load_task(pipeline.task, pipeline.model, pipeline.parameters, EXAMPLE.parent)


def test_task_of_one_file_becomes_a_release(valve, tmp_path):
    """The example of docs/tasks.md, trained, quantized, held against its limits."""
    built = build_release(valve, tmp_path)
    assert built.spec.model == "valve"
    assert min(report["metric_int8"] for report in built.reports.values()) > 0.95


def test_document_shows_the_example_itself():
    """And it is short."""
    text = (ROOT / "examples" / "tasks" / "valve.py").read_text()
    assert f"```python\n{text}```" in (ROOT / "docs" / "tasks.md").read_text()
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize(
    ("name", "said"), [("gone.py:Valve", "gone.py is not there"), ("valve.py:Vent", "has no Vent")]
)
def test_file_without_the_task_is_an_error(name, said):
    """It says which file and which class."""
    with pytest.raises(ConfigError, match=said):
        load_task(name, "m", {}, ROOT / "examples" / "tasks")


@pytest.mark.parametrize(
    ("task", "parameters", "said"),
    [
        ("vision", {"date": "digits"}, "unknown field `date`"),
        ("vision", {"device": {"network": "vgg", "asks": 0.1}}, r"'vgg' - at `\$.device.network`"),
        ("vision", {"gateway": {"network": "cnn"}}, r"missing required field `asks` - at `\$.gateway`"),
        ("vision", {"data": "none.npz"}, "none.npz: .*No such file"),
        ("sensor", {"window": 0}, r"\$.window"),
        ("sensor", {"device": {"recall": 2}}, r"\$.device.recall"),
    ],
)
def test_wrong_parameter_is_named(task, parameters, said, tmp_path):
    """Whoever wrote the file reads which one."""
    with pytest.raises(ConfigError, match=said):
        load_task(task, "m", parameters, tmp_path)


def test_pictures_of_ones_own(tmp_path):
    """Sizes, classes and networks follow the file; a fifth judges; sides may differ."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (200, 12, 16, 3)).astype(np.float32)
    np.savez(tmp_path / "pictures.npz", x=x, y=rng.integers(4, size=200))
    tier = {"network": "resnet8", "asks": 0.3, "steps": 7}
    task = load_task("vision", "m", {"data": "pictures.npz", "device": tier}, tmp_path)
    assert (task.shape, task.classes, task.plans[pb.TIER_DEVICE].steps) == ((12, 16, 3), 4, 7)
    assert task.threshold_rule.device == 0.3
    data = task.prepare(None)
    assert len(data.train) + len(data.holdout) == 200
    assert 20 < len(data.holdout) < 60
    rows = torch.from_numpy(x[:5])
    moved = task.augment(rows, torch.Generator().manual_seed(1))
    assert moved.shape == rows.shape
    assert not torch.equal(moved, rows)
    for each in TIERS:
        assert task.build_model(each).eval()(rows).shape == (5, 4)


@pytest.mark.parametrize("detector", ["autoencoder", "cross_predictor"])
@pytest.mark.parametrize(("window", "shape"), [(1, (3,)), (4, (4, 3))])
def test_sensors_of_ones_own(tmp_path, detector, window, shape):
    """Windows and channels follow the file, the release says them, and the last quarter judges."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 3)).astype(np.float32), (np.arange(400) % 10 == 0).astype(int)
    np.savez(tmp_path / "pump.npz", x=x, y=y)
    tier = {"detector": detector, "recall": 0.5}
    task = load_task("sensor", "m", {"data": "pump.npz", "window": window, "device": tier}, tmp_path)
    data = task.prepare(None)
    assert task.shape == shape
    assert len(data.holdout) == 100 - window + 1
    assert not data.train.y.any()
    schema = data.schema()
    assert (list(schema.shape), schema.window, schema.stride) == ([*shape], *((0, 0) if window == 1 else (4, 1)))
    for each in TIERS:
        assert task.build_model(each)(torch.zeros(2, *shape)).shape == (2, *shape)


def test_sensors_without_an_anomaly_to_judge_by_are_refused(tmp_path):
    """A detector that is never seen to detect cannot be released."""
    np.savez(tmp_path / "calm.npz", x=np.ones((100, 2), np.float32), y=np.zeros(100, int))
    with pytest.raises(ConfigError, match="no anomaly among the last 25"):
        load_task("sensor", "m", {"data": "calm.npz"}, tmp_path)


@given(rows=st.integers(0, 30), window=st.integers(1, 6), stride=st.integers(1, 6))
def test_training_cuts_the_windows_that_devices_cut(rows, window, stride):
    """The same values in the same order; a window has the label of its last reading."""
    values = np.arange(rows, dtype=np.float32)[:, None]
    cut = windows_of(LabelledSamples(values, np.arange(rows)), window, stride)
    agent = Windows(window, stride)
    live = [made.ravel().tolist() for value in values if (made := agent.add(value)) is not None]
    assert [each.ravel().tolist() for each in cut.x] == live
    assert cut.y.tolist() == [int(made[-1]) for made in live]


@pytest.mark.parametrize("shape", [(3,), (4, 2)])
def test_cross_predictor_never_sees_what_it_tells(shape):
    """Change one value and only the others' outputs move; folded for export it answers the same."""
    torch.manual_seed(0)
    module = CrossPredictor(shape, hidden=5).eval()
    rows = torch.randn(1, *shape)
    count = rows.numel()
    for index in range(count):
        changed = rows.flatten().clone()
        changed[index] += 10
        moved = (module(changed.reshape(1, *shape)) - module(rows)).flatten() != 0
        assert not moved[index]
        assert moved.sum() == count - 1
    folded = fold_for_export(module)
    assert torch.allclose(folded(rows), module(rows), atol=1e-6)
    assert not any(isinstance(part, CrossPredictor) for part in folded.modules())


def test_autoencoder_takes_windows():
    """It gives back what it takes, whatever the shape."""
    assert autoencoder((4, 3), (8, 2))(torch.zeros(5, 4, 3)).shape == (5, 4, 3)
