"""TUF over retained messages: what a hostile or unlucky broker, disk or clock can do, and what becomes of it."""

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from cloud.keys import FileKeyStore
from cloud.repository import (
    ROLLOUT,
    Generation,
    first_generation,
    parse_role,
    parse_root,
    resign,
    sign,
    sign_role,
    snapshot_of,
    target_file,
    timestamp_of,
)
from shoal.codec import encode
from shoal.errors import TrustError
from shoal.release.chunks import digest
from shoal.release.durable import DamagedError
from shoal.release.trust import ExpiredError, TrustedView, TrustStore, Wait, metadata_entries, model_role
from shoal.v1.release_pb2 import BundleEntry, RolloutPlan, TrustBundle

pytestmark = pytest.mark.device

NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
DAY_S = 86_400
MODELS = ("digits", "shuttle")
SPEC = b"a release spec"
PLAN = RolloutPlan(
    rollout_id="r", model="digits", release=1, spec_path="releases/digits/1.spec", targets=["*"], share_permille=1000
)


class World:
    """A cloud that signs, and what the broker holds of it."""

    def __init__(self, directory: Path) -> None:
        self.keys = FileKeyStore(directory)
        for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, *map(model_role, MODELS)):
            self.keys.create(role)
        self.generation = first_generation(self.keys, MODELS, NOW)
        self.root = self.generation.roots[0]
        self.extra: dict[bytes, bytes] = {}
        self.update(model_role("digits"), {"releases/digits/1.spec": SPEC})
        self.update(ROLLOUT, {"plans/digits.plan": encode(PLAN)})

    def update(self, role: str, targets: dict[str, bytes], now: dt.datetime = NOW, signer: str | None = None) -> None:
        version = parse_role(self.generation.roles[role]).version + 1
        infos = {path: target_file(path, data) for path, data in targets.items()}
        data = sign_role(self.keys.signers(signer or role), version, infos, now)
        self.take(role, data, now)
        self.extra |= {digest(data): data for data in targets.values()}

    def take(self, role: str, data: bytes, now: dt.datetime = NOW) -> None:
        self.generation = resign(replace(self.generation, roles={**self.generation.roles, role: data}), self.keys, now)

    def serve(self, generation: Generation | None = None) -> tuple[TrustBundle, bytes, dict[bytes, bytes]]:
        generation = generation or self.generation
        files = generation.files()
        bundle = TrustBundle(
            entries=[BundleEntry(path=n, sha256=digest(d), length_bytes=len(d)) for n, d in files.items()]
        )
        return bundle, generation.timestamp, {digest(d): d for d in files.values()} | self.extra


class Clock:
    def __init__(self) -> None:
        self.at = NOW.timestamp()

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "keys")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trust(tmp_path: Path, world: World, clock: Clock) -> TrustStore:
    return TrustStore(tmp_path / "trust", world.root, clock=clock)


def refresh(trust: TrustStore, served, models=("digits",)) -> TrustedView:
    view = trust.refresh(*served, frozenset(models))
    assert isinstance(view, TrustedView)
    return view


def swap(served, name: str, data: bytes):
    """Let the bundle say that `name` is `data`."""
    bundle, timestamp, blobs = served
    changed = TrustBundle()
    changed.CopyFrom(bundle)
    for entry in changed.entries:
        if entry.path == name:
            entry.sha256, entry.length_bytes = digest(data), len(data)
    return changed, timestamp, {**blobs, digest(data): data}


def test_good_metadata_gives_the_plan_and_its_targets(trust, world):
    """The base on which every refusal below stands."""
    view = refresh(trust, world.serve(), MODELS)
    assert view.plans["digits"].plan == PLAN
    assert view.plans["digits"].spec.sha256 == digest(SPEC)
    assert view.target("releases/digits/1.spec") == view.plans["digits"].spec
    assert view.target("models/digits/9") is None
    assert "shuttle" not in view.plans
    assert not view.refused
    assert not view.clock_suspect


def test_refresh_goes_on_from_what_is_on_disk(trust, world):
    """Steady state: only what changed has to be served."""
    refresh(trust, world.serve())
    world.update(ROLLOUT, {"plans/digits.plan": encode(PLAN)})
    bundle, timestamp, blobs = world.serve()
    unchanged = digest(world.generation.roles["targets"])
    assert refresh(trust, (bundle, timestamp, {k: v for k, v in blobs.items() if k != unchanged})).plans


@pytest.mark.parametrize("name", ["2.rollout.json", "3.snapshot.json", "1.targets.json", "2.model-digits.json"])
def test_tampered_metadata_is_refused(trust, world, name):
    """One changed byte in any file: the digest in the file above it no longer fits."""
    good = world.generation.files()[name]
    evil = good.replace(b'"version":', b'"version": ', 1)
    try:
        view = refresh(trust, swap(world.serve(), name, evil))
    except TrustError:
        return
    assert not view.plans
    assert "digits" in view.refused


def test_tampered_timestamp_is_refused(trust, world):
    """Nothing vouches for the timestamp but its signature."""
    bundle, timestamp, blobs = world.serve()
    evil = timestamp.replace(b'"x-shoal-signed-at":1', b'"x-shoal-signed-at":2')
    assert evil != timestamp
    with pytest.raises(TrustError, match="timestamp"):
        trust.refresh(bundle, evil, blobs, frozenset(MODELS))


def test_plan_bytes_other_than_signed_never_serve(trust, world):
    """The plan is found by the digest that is signed, not by the name in the index."""
    evil = encode(RolloutPlan(model="digits", release=9, spec_path="releases/digits/9.spec"))
    bundle, timestamp, blobs = world.serve()
    blobs = {k: v for k, v in blobs.items() if k != digest(encode(PLAN))} | {digest(evil): evil}
    assert trust.refresh(bundle, timestamp, blobs, frozenset({"digits"})) == Wait("plans/digits.plan")


def test_rollback_of_the_whole_set_is_refused(trust, world):
    """An old, genuine generation served again."""
    old = world.serve()
    world.update(ROLLOUT, {})
    refresh(trust, world.serve())
    with pytest.raises(TrustError):
        trust.refresh(*old, frozenset({"digits"}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.unlink(),
    ],
    ids=["emptied", "truncated", "removed"],
)
def test_power_loss_that_tears_tufs_files_allows_no_rollback(trust, world, tmp_path, damage):
    """python-tuf never syncs its files; our floor must hold without them."""
    old = world.serve()
    world.update(ROLLOUT, {})
    refresh(trust, world.serve())
    for path in (tmp_path / "trust" / "tuf").rglob("*.json"):
        if path.is_symlink() or path.is_file():
            damage(path)
    with pytest.raises(TrustError, match="went back"):
        trust.refresh(*old, frozenset({"digits"}))
    refresh(trust, world.serve())


@pytest.mark.parametrize("role", ["rollout", "model-digits", "snapshot", "timestamp"])
def test_floor_stands_for_every_role(trust, world, tmp_path, role):
    """A set whose top is new and in which one role is old, signed by whoever stole the online keys."""
    refresh(trust, world.serve())
    body = json.loads((tmp_path / "trust" / "floor.a").read_bytes().split(b"\n", 2)[2])
    body["versions"][role] += 1
    trust._floor_file.save(json.dumps(body).encode())
    with pytest.raises(TrustError, match=f"{role} went back"):
        trust.refresh(*world.serve(), frozenset({"digits"}))


def test_torn_floor_copy_leaves_the_other(trust, world, tmp_path):
    """One of two copies may be lost; both may not, or rollback would be silent."""
    old = world.serve()
    refresh(trust, old)
    world.update(ROLLOUT, {})
    refresh(trust, world.serve())
    world.update(ROLLOUT, {})
    refresh(trust, world.serve())
    (tmp_path / "trust" / "floor.a").write_bytes(b"")
    for path in (tmp_path / "trust" / "tuf").rglob("*.json"):
        path.unlink()
    with pytest.raises(TrustError, match="went back"):
        trust.refresh(*old, frozenset({"digits"}))
    (tmp_path / "trust" / "floor.b").write_bytes(b"")
    with pytest.raises(DamagedError):
        trust.refresh(*world.serve(), frozenset({"digits"}))


def test_mix_and_match_is_refused(trust, world):
    """A new timestamp with an old role file under the new name."""
    old_rollout = world.generation.roles[ROLLOUT]
    world.update(ROLLOUT, {})
    view = refresh(trust, swap(world.serve(), "3.rollout.json", old_rollout))
    assert not view.plans
    assert "digits" in view.refused


def test_twin_under_the_same_version_is_refused(trust, world):
    """A role's owner signs two documents with one version: only the one that the snapshot vouches for counts."""
    role = model_role("digits")
    version = parse_role(world.generation.roles[role]).version
    twin = sign_role(world.keys.signers(role), version, {"releases/digits/1.spec": target_file("x", b"other")}, NOW)
    view = refresh(trust, swap(world.serve(), f"{version}.{role}.json", twin))
    assert not view.plans
    assert "digits" in view.refused


def test_wrong_key_is_refused(trust, world):
    """The trainer's key signs a plan: the delegation does not know it for that role."""
    world.update(ROLLOUT, {"plans/digits.plan": encode(PLAN)}, signer=model_role("digits"))
    view = refresh(trust, world.serve())
    assert not view.plans
    assert "signed by" in view.refused["digits"]


def test_stolen_online_keys_make_no_release(trust, world):
    """Snapshot and timestamp keys vouch for versions, not for content: a foreign key's release stays refused."""
    role = model_role("digits")
    foreign = [CryptoSigner.generate_ed25519()]
    data = sign_role(foreign, 9, {"releases/digits/1.spec": target_file("x", b"evil")}, NOW)
    world.take(role, data)
    assert "signed by" in refresh(trust, world.serve()).refused["digits"]


def test_one_models_trouble_does_not_hold_up_another(trust, world):
    """A refused role is its own model's affair."""
    plan = RolloutPlan(rollout_id="s", model="shuttle", release=1, spec_path="releases/shuttle/1.spec")
    world.update(model_role("shuttle"), {"releases/shuttle/1.spec": b"s"}, signer=model_role("digits"))
    world.update(ROLLOUT, {"plans/digits.plan": encode(PLAN), "plans/shuttle.plan": encode(plan)})
    view = refresh(trust, world.serve(), MODELS)
    assert set(view.plans) == {"digits"}
    assert set(view.refused) == {"shuttle"}


@pytest.mark.parametrize(
    "plan",
    [
        RolloutPlan(model="shuttle", release=1, spec_path="releases/digits/1.spec"),
        RolloutPlan(model="digits", release=1, spec_path="releases/shuttle/1.spec"),
        RolloutPlan(model="digits", release=1, spec_path="releases/digits/../digits/1.spec"),
        RolloutPlan(model="digits", release=7, spec_path="releases/digits/7.spec"),
    ],
    ids=["other model", "other model's spec", "traversal", "unknown release"],
)
def test_signed_plan_that_makes_no_sense_is_refused(trust, world, plan):
    """The rollout role may point, but only at this model's own signed releases."""
    world.update(ROLLOUT, {"plans/digits.plan": encode(plan)})
    view = refresh(trust, world.serve())
    assert not view.plans
    assert "digits" in view.refused


def test_bundle_behind_its_timestamp_means_wait(trust, world):
    """The publisher sends three messages; a node may see any prefix of them."""
    old_bundle, old_timestamp, blobs = world.serve()
    refresh(trust, (old_bundle, old_timestamp, blobs))
    world.update(ROLLOUT, {})
    bundle, timestamp, blobs = world.serve()
    assert trust.refresh(old_bundle, timestamp, blobs, frozenset({"digits"})) == Wait("4.snapshot.json")
    refresh(trust, (bundle, timestamp, blobs))


def test_new_bundle_with_old_timestamp_serves_the_old_view_or_waits(trust, world):
    """Bundle first, then timestamp: in between nothing breaks."""
    _, old_timestamp, _ = world.serve()
    world.update(ROLLOUT, {})
    bundle, _, blobs = world.serve()
    assert trust.refresh(bundle, old_timestamp, blobs, frozenset({"digits"})) == Wait("3.snapshot.json")


def test_missing_blob_means_wait_and_names_it(trust, world):
    """Nothing is wrong yet when something has not arrived."""
    bundle, timestamp, blobs = world.serve()
    del blobs[digest(world.generation.roles[ROLLOUT])]
    assert trust.refresh(bundle, timestamp, blobs, frozenset({"digits"})) == Wait("2.rollout.json")


def test_root_that_is_named_and_missing_is_waited_for(trust, world):
    """The one before it is no longer the newest, and is not gone on from."""
    root = parse_root(world.root).signed
    root.version = 2
    newer = sign(root, world.keys.signers("root"))
    world.generation = resign(replace(world.generation, roots=(world.root, newer)), world.keys, NOW)
    bundle, timestamp, blobs = world.serve()
    withheld = blobs.pop(digest(newer))
    assert trust.refresh(bundle, timestamp, blobs, frozenset({"digits"})) == Wait("2.root.json")
    assert refresh(trust, (bundle, timestamp, {**blobs, digest(newer): withheld})).versions["root"] == 2


def test_other_root_of_trust_is_refused(tmp_path, world, clock):
    """Everything genuine, but of another cloud."""
    other = World(tmp_path / "other")
    trust = TrustStore(tmp_path / "trust", other.root, clock=clock)
    with pytest.raises(TrustError):
        trust.refresh(*world.serve(), frozenset({"digits"}))


def test_endless_timestamp_is_refused(trust, world):
    """Limits are ours, not the library's."""
    bundle, timestamp, blobs = world.serve()
    with pytest.raises(TrustError, match="exceeding"):
        trust.refresh(bundle, timestamp + b" " * 20_000, blobs, frozenset({"digits"}))


@pytest.mark.parametrize("timestamp", [b"", b"{}", b"[" * 10_000, b"\xff" * 100, b'{"signed": 1, "signatures": []}'])
def test_rubbish_timestamp_is_refused(trust, world, timestamp):
    """Whatever bytes come, the answer is a TrustError."""
    bundle, _, blobs = world.serve()
    with pytest.raises(TrustError):
        trust.refresh(bundle, timestamp, blobs, frozenset({"digits"}))


# -- the clock ---------------------------------------------------------------------------------------------------


def test_expired_metadata_is_refused_and_reported(trust, world, clock):
    """A freeze: the broker goes on serving what was true a month ago."""
    refresh(trust, world.serve())
    clock.at += 31 * DAY_S
    with pytest.raises(ExpiredError):
        trust.refresh(*world.serve(), frozenset({"digits"}))


def test_clock_at_1970_uses_the_floor_and_says_so(tmp_path, world, clock):
    """A node without a battery still converges, and admits that it cannot judge expiry fully."""
    clock.at = 0.0
    trust = TrustStore(tmp_path / "trust", world.root, clock=clock)
    view = refresh(trust, world.serve())
    assert view.clock_suspect
    assert view.plans


def test_floor_refuses_what_expired_before_it(tmp_path, world, clock):
    """A clock set back does not bring expired metadata back to life: what was verified says what time it is."""
    trust = TrustStore(tmp_path / "trust", world.root, clock=clock)
    old = world.serve()
    later = NOW + dt.timedelta(days=40)
    clock.at = later.timestamp()
    world.update(ROLLOUT, {}, now=later)
    refresh(trust, world.serve())
    clock.at = NOW.timestamp()
    for path in (tmp_path / "trust" / "tuf").rglob("*.json"):
        path.unlink()
    with pytest.raises(ExpiredError):
        trust.refresh(*old, frozenset({"digits"}))


def test_signing_time_raises_the_floor_of_a_suspect_clock(tmp_path, world, clock):
    """A node at 1970 learns the time from what it verifies."""
    clock.at = 0.0
    trust = TrustStore(tmp_path / "trust", world.root, clock=clock)
    refresh(trust, world.serve())
    assert trust._load_floor().clock_at == int(NOW.timestamp())


def test_clock_at_2100_refuses_updates_but_poisons_nothing(trust, world, clock):
    """A wild clock costs updates only while it is wild."""
    clock.at = dt.datetime(2100, 1, 1, tzinfo=dt.UTC).timestamp()
    with pytest.raises(ExpiredError):
        trust.refresh(*world.serve(), frozenset({"digits"}))
    clock.at = NOW.timestamp()
    assert not refresh(trust, world.serve()).clock_suspect


def test_rollback_is_refused_under_a_suspect_clock_too(trust, world, clock):
    """Versions need no clock."""
    old = world.serve()
    world.update(ROLLOUT, {})
    refresh(trust, world.serve())
    clock.at = 0.0
    with pytest.raises(TrustError):
        trust.refresh(*old, frozenset({"digits"}))


def test_other_models_roles_are_not_fetched(world):
    """A node's traffic does not grow with the number of models it does not run."""
    bundle, _, _ = world.serve()
    bundle.entries.append(BundleEntry(path="plans/digits.plan"))
    bundle.entries.append(BundleEntry(path="plans/shuttle.plan"))
    bundle.entries.append(BundleEntry(path="releases/digits/1.spec"))
    names = {entry.path for entry in metadata_entries(bundle, frozenset({"digits"}))}
    assert names == {
        "1.root.json",
        "1.targets.json",
        "2.rollout.json",
        "2.model-digits.json",
        "3.snapshot.json",
        "plans/digits.plan",
    }


def test_versions_in_the_view_are_those_published(trust, world):
    """What `shoal doctor` will show."""
    versions = refresh(trust, world.serve()).versions
    assert versions["timestamp"] == timestamp_of(world.generation).version
    assert versions["snapshot"] == snapshot_of(world.generation).version
    assert versions["model-digits"] == 2
    assert replace(world.generation) == world.generation
