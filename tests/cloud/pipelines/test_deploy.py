"""The step that signs: a real release of the sensors' model, from its evaluation to the publisher's queue."""

import datetime as dt
from types import MappingProxyType

import pytest

from cloud import services
from cloud.keys import FileKeyStore
from cloud.pipelines.deploy import Depot, deploy_to_edge, newest_release, read_deployment
from cloud.pipelines.file import DeployToEdge, Kind
from cloud.release_orders import checked_files
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT
from cloud.settings import CloudSettings, ModelSettings
from shoal.errors import ConfigError
from shoal.release.chunks import digest
from shoal.release.trust import model_role, spec_path
from shoal.v1.release_pb2 import RolloutPlan

NOW = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
STEP = DeployToEdge(inputs="release", targets=["sensor-*", "gw-*"])


class Rig:
    def __init__(self, directory):
        self.settings = CloudSettings(data_dir=str(directory), models=[ModelSettings(name="shuttle")])
        services.init(self.settings)
        self.store = ReleaseStore(self.settings.releases_dir)
        self.depot = Depot(self.store, FileKeyStore(self.settings.keys_dir, None), 256 << 20)

    def deploy(self, files, step=STEP, now=NOW):
        return deploy_to_edge(step, {Kind.RELEASE: files}, self.depot, now)

    def roles(self):
        return [order.role for order in self.store.orders()]

    def plan(self):
        (*_, order) = [order for order in self.store.orders() if order.role == ROLLOUT]
        (plan,) = [RolloutPlan.FromString(path.read_bytes()) for path in order.directory.iterdir() if path.suffix == ""]
        return plan


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path / "cloud")


@pytest.fixture
def files(shuttle):
    """What `evaluate_model` leaves: no number, no paths."""
    spec = type(shuttle.spec).FromString(shuttle.spec.SerializeToString())
    spec.ClearField("release")
    for artefact in spec.artefacts:
        artefact.ClearField("path")
    return MappingProxyType(dict(shuttle.files) | {"spec.pb": spec.SerializeToString(deterministic=True)})


def test_release_and_plan_wait_for_the_publisher(rig, files, shuttle):
    """Two orders, the release first, each signed so that the publisher takes it."""
    made = rig.deploy(files)
    release, _ = rig.store.orders()
    assert rig.roles() == [model_role("shuttle"), ROLLOUT]
    published = newest_release(rig.store, "shuttle")
    assert set(checked_files(release, rig.store.load(), rig.store, NOW)) == {
        *map(digest, published.files.values()),
        digest(published.spec.SerializeToString(deterministic=True)),
    }
    assert (published.spec.release, published.spec.parent) == (1, 0)
    assert list(published.files.values()) == list(shuttle.files.values())
    assert published.spec.metrics_ppm == shuttle.spec.metrics_ppm
    assert made.figures == {"created_at_us": int(NOW.timestamp() * 1e6), "parent": 0}


def test_plan_brings_the_release_to_everybody_it_is_for(rig, files):
    """The targets are the file's, the share is all of them, in one stage."""
    made = rig.deploy(files)
    assert rig.plan() == RolloutPlan(
        rollout_id="shuttle-1",
        model="shuttle",
        release=1,
        spec_path=spec_path("shuttle", 1),
        targets=["sensor-*", "gw-*"],
        share_permille=1000,
    )
    deployment = read_deployment(made.files)
    assert (deployment.release, deployment.rollout_id, deployment.targets) == (1, "shuttle-1", ["sensor-*", "gw-*"])


def test_same_release_is_not_made_twice(rig, files):
    """Neither after a kill between release and plan nor later; its output says the same, whenever it was signed."""
    first = rig.deploy(files)
    assert rig.deploy(files, now=NOW + dt.timedelta(days=1)) == first
    assert len(rig.roles()) == 2
    rig.store.finish(rig.store.orders()[1])
    rig.deploy(files)
    assert rig.roles() == [model_role("shuttle"), ROLLOUT]


def test_other_targets_are_a_new_plan_of_the_same_release(rig, files):
    """Who gets it is no reason for another number."""
    rig.deploy(files)
    rig.deploy(files, DeployToEdge(inputs="release", targets="*"))
    assert rig.roles() == [model_role("shuttle"), ROLLOUT, ROLLOUT]
    assert (rig.plan().release, rig.plan().targets) == (1, ["*"])


@pytest.mark.parametrize("what", ["artefact", "threshold"])
def test_whatever_differs_is_a_new_release(rig, files, shuttle, what):
    """An artefact, or only from which score on a device asks."""
    rig.deploy(files)
    changed = dict(files)
    if what == "artefact":
        changed["device.tflite"] += b"\0"
    else:
        spec = type(shuttle.spec).FromString(files["spec.pb"])
        spec.artefacts[0].threshold += 0.25
        changed["spec.pb"] = spec.SerializeToString()
    assert read_deployment(rig.deploy(changed).files).release == 2


def test_release_with_a_file_missing_is_no_parent(rig, files):
    """It could not be scored."""
    rig.deploy(files)
    published = newest_release(rig.store, "shuttle")
    path = rig.store.orders()[0].directory / published.spec.artefacts[0].sha256.hex()
    path.unlink()
    assert newest_release(rig.store, "shuttle") is None
    assert newest_release(rig.store, "engine") is None


def test_model_without_a_key_is_an_error_of_the_operator(rig, files, shuttle):
    """The message says which models there are."""
    spec = type(shuttle.spec).FromString(files["spec.pb"])
    spec.model = "engine"
    with pytest.raises(ConfigError, match="'engine' has no role"):
        rig.deploy(dict(files) | {"spec.pb": spec.SerializeToString()})
