"""The offline check finds every kind of damage that a mirror can have, and names the file."""

import datetime as dt
import json
from collections import Counter

import numpy as np
import pytest

from cloud import rotation
from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, TOP_LEVEL, first_generation, parse_role, resign, sign_role, target_file
from cloud.verify import verify_store
from shoal.codec import encode
from shoal.release.chunks import digest
from shoal.release.trust import model_role
from shoal.tensors import to_tensor
from shoal.v1.release_pb2 import Artefact, GoldenVectors, ModelFormat, ReleaseSpec, RolloutPlan, Tier

NOW = dt.datetime(2026, 11, 20, 12, tzinfo=dt.UTC)
ROLE = model_role("digits")


@pytest.fixture
def keys(tmp_path):
    keys = FileKeyStore(tmp_path / "keys")
    keys.create("root", 3)
    for role in (*TOP_LEVEL[1:], ROLLOUT, ROLE):
        keys.create(role)
    return keys


@pytest.fixture
def store(tmp_path, keys):
    """One release, one plan, one changed root."""
    store = ReleaseStore(tmp_path / "store")
    store.create(first_generation(keys, ["digits"], NOW))
    vector = to_tensor(np.ones((1, 2), dtype=np.float32))
    golden = GoldenVectors(inputs=vector, outputs=vector)
    artefact = Artefact(tier=Tier.TIER_DEVICE, format=ModelFormat.MODEL_FORMAT_TFLITE, golden=golden)
    submit_release(store, ReleaseSpec(model="digits", artefacts=[artefact]), [b"model"], keys, NOW)
    plan = RolloutPlan(rollout_id="r", model="digits", release=1, targets=["*"], share_permille=1000)
    submit_plan(store, plan, keys, NOW)
    rotation.rotate(store, "timestamp", keys, NOW)
    link = type("Link", (), {"connected": False})()
    publisher = Publisher(link, store, keys, counters=Counter(), wall_clock=lambda: NOW)
    publisher.start()
    publisher.tick(1.0)
    publisher.close()
    return store


def faults(store, now=NOW, root=None):
    return verify_store(store.directory, now, root).faults


def test_whole_store_has_no_fault(store):
    """And says which versions and how many files it saw."""
    checked = verify_store(store.directory, NOW, store.root())
    assert checked.faults == ()
    assert checked.versions == {
        "root": 2, "timestamp": 4, "snapshot": 4, "targets": 1, "rollout": 2, ROLE: 2
    }  # fmt: skip
    assert checked.files == 3


@pytest.mark.parametrize(
    "name",
    ["1.root.json", "2.root.json", "timestamp.json", "4.snapshot.json", "1.targets.json", "2.rollout.json"],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "edited", "another"])
def test_damaged_metadata_is_found(store, name, damage):
    """Missing, cut short, edited under an old signature, or another file in its place."""
    path = store.directory / "metadata" / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "edited":
        document = json.loads(path.read_bytes())
        document["signed"]["expires"] = "2099-01-01T00:00:00Z"
        path.write_bytes(json.dumps(document).encode())
    else:
        path.write_bytes(store.load().roles[ROLE])
    assert faults(store)


def test_every_damaged_file_is_named(store):
    """One line each, however many."""
    paths = sorted((store.directory / "files").iterdir())
    paths[0].write_bytes(b"other")
    paths[1].unlink()
    found = faults(store)
    assert len(found) == 2
    assert any(f"{paths[0].name} is damaged" in fault for fault in found)
    assert any(f"{paths[1].name} is missing" in fault for fault in found)


@pytest.mark.parametrize("role", [ROLLOUT, ROLE])
def test_role_that_the_snapshot_does_not_mean_is_found(store, keys, role):
    """Mix and match: signed with the right key, of the right version, and still another file."""
    signed = parse_role(store.load().roles[role])
    other = sign_role(keys.signers(role), signed.version, signed.targets, NOW + dt.timedelta(days=1))
    (store.directory / "metadata" / f"{signed.version}.{role}.json").write_bytes(other)
    (fault,) = faults(store)
    assert fault.startswith(f"{signed.version}.{role}.json: ")


def test_expiry_is_found_by_role(store):
    """The timestamp first, the others with it."""
    assert faults(store, NOW + dt.timedelta(days=31)) == ("timestamp: expired at 2026-12-20T12:00:00+00:00",)
    assert len(faults(store, NOW + dt.timedelta(days=400))) == 6


def test_only_the_newest_root_may_not_expire(store):
    """Nodes walk over older ones whatever their age."""
    (line,) = [fault for fault in faults(store, NOW + dt.timedelta(days=400)) if fault.startswith("root")]
    assert "expired" in line


def test_store_of_somebody_else_is_found(store, keys):
    """Complete and consistent, but not what the nodes were provisioned with."""
    other = first_generation(keys, ["digits"], NOW + dt.timedelta(seconds=1))
    assert faults(store, root=other.roots[0]) == ("root 1 as given is none of this store's",)


def test_role_signed_with_a_wrong_key_is_found(store, keys):
    """Though snapshot and timestamp vouch for it."""
    generation = store.load()
    role = parse_role(generation.roles[ROLE])
    forged = sign_role(keys.signers(ROLLOUT), role.version + 1, role.targets, NOW)
    changed = type(generation)(
        generation.roots, {**generation.roles, ROLE: forged}, generation.snapshot, generation.timestamp
    )
    store.commit(resign(changed, keys, NOW), {})
    assert faults(store) == (f"role {ROLE}: {ROLE} was signed by 0/1 keys",)


def test_plan_without_its_release_is_found(store, keys):
    """Everything is signed and whole, and a node would still find nothing to run."""
    generation = store.load()
    plan = RolloutPlan(rollout_id="r", model="digits", release=9, spec_path="releases/digits/9.spec", targets=["*"])
    data = encode(plan)
    rollout = sign_role(keys.signers(ROLLOUT), 9, {"plans/digits.plan": target_file("plans/digits.plan", data)}, NOW)
    changed = type(generation)(
        generation.roots, {**generation.roles, ROLLOUT: rollout}, generation.snapshot, generation.timestamp
    )
    store.commit(resign(changed, keys, NOW), {digest(data): data})
    (fault,) = faults(store)
    assert "names release 9 of 'digits', which is not here" in fault


def test_empty_directory_is_one_fault(tmp_path):
    """And no traceback."""
    assert verify_store(tmp_path, NOW).faults == ("timestamp.json is missing",)
