"""Keys change under a running fleet: from the order over the publisher to update clients that never met the cloud."""

import datetime as dt
import random
from collections import Counter, deque
from unittest.mock import Mock

import numpy as np
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Delegations

from cloud import release_store, rotation
from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import (
    ROLLOUT,
    delegated_role,
    delegations_of,
    first_generation,
    parse_role,
    parse_root,
    root_of,
    sign,
    sign_role,
    target_file,
)
from shoal.codec import encode
from shoal.errors import ConfigError, TrustError
from shoal.inbox import Inbox
from shoal.release.chunks import digest, split
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import Outcome, Verdict
from shoal.release.trust import TrustStore, model_role
from shoal.routes import Route, topic, topic_filter
from shoal.tensors import to_tensor
from shoal.v1.release_pb2 import (
    Artefact,
    BundleEntry,
    GoldenVectors,
    ModelFormat,
    ReleaseSpec,
    RolloutPlan,
    Tier,
    TrustBundle,
)
from tests.shoal.release.conftest import InlineDisk

NOW = dt.datetime(2026, 11, 20, 12, tzinfo=dt.UTC)
MODEL = "digits"
ROLES = ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role(MODEL))


class Wire:
    """A broker in memory: retained messages, delivered in order by `run`."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.links: list[WireLink] = []
        self.work: deque = deque()

    def run(self) -> None:
        while self.work:
            self.work.popleft()()


class WireLink:
    """The part of a link that releases use."""

    connected = True

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.subscribed: set[str] = set()
        self.inbox = Inbox(Counter())
        wire.links.append(self)

    def publish(self, route, message, *, on_done=None, **segments):
        payload = message if isinstance(message, bytes) else encode(message)
        self.wire.work.append(lambda: self._arrive(topic(route, **segments), payload, on_done))
        return True

    def subscribe(self, route, handler, *, ack_late=False, **segments):
        self.inbox.register(route, handler, ack_late=ack_late)
        name = topic_filter(route, **segments)
        self.subscribed.add(name)
        if name in self.wire.retained:
            self.deliver(name, self.wire.retained[name])

    def unsubscribe(self, route, **segments):
        self.subscribed.discard(topic_filter(route, **segments))

    def deliver(self, name, payload):
        self.wire.work.append(
            lambda: name in self.subscribed and self.inbox.receive(name, payload, retained=True, ack=lambda: None)
        )

    def _arrive(self, name, payload, on_done):
        self.wire.retained[name] = payload
        if not payload:
            del self.wire.retained[name]
        for link in self.wire.links:
            link.deliver(name, payload)
        on_done(None)


class PassingTest:
    """Every artefact passes; a node's self-test is tested elsewhere."""

    def start(self, _path, _artefact, _now):
        return Mock(poll=lambda _now: Verdict(Outcome.PASSED))


class Node:
    """A node that was provisioned with one root and knows nothing else."""

    def __init__(self, directory, wire, root, name="cam-1") -> None:
        self.active: list[bytes] = []
        self.counters: Counter[str] = Counter()
        self.wire = wire
        self.now = 0.0
        self.client = UpdateClient(
            WireLink(wire),
            TrustStore(directory / "trust", root, clock=NOW.timestamp),
            directory / "models",
            [NodeModel(MODEL, Tier.TIER_DEVICE, "toy 1.0", probation_s=0.5)],
            node=name,
            self_test=PassingTest(),
            activate=lambda _model, _spec, path: self.active.append(path.read_bytes()),
            rng=random.Random(5),
            counters=self.counters,
            disk=InlineDisk(),
        )
        self.client.start()

    def run(self) -> bytes:
        """Let time pass; return what runs."""
        for _ in range(20):
            self.now += 0.5
            self.client.tick(self.now)
            self.wire.run()
        return self.active[-1]


class Cloud:
    """Keys, store and publisher."""

    def __init__(self, directory, wire) -> None:
        self.wire = wire
        self.keys = FileKeyStore(directory / "keys")
        self.key_files = directory / "keys"
        self.keys.create("root", 3)
        for role in ROLES[1:]:
            self.keys.create(role)
        self.store = ReleaseStore(directory / "store")
        self.store.create(first_generation(self.keys, [MODEL], NOW))
        self.now = 0.0
        self.boot()

    def boot(self, keys=None) -> None:
        self.publisher = Publisher(
            WireLink(self.wire), self.store, keys or self.keys, counters=Counter(), wall_clock=lambda: NOW
        )
        self.publisher.start()
        self.publisher.on_connect()

    def die(self) -> None:
        """Whatever was on its way is lost with the connection."""
        self.wire.work.clear()
        self.publisher.close()

    def settle(self) -> None:
        for _ in range(10):
            self.now += 10.0
            self.publisher.tick(self.now)
            self.wire.run()
        assert self.publisher.settled

    def ship(self, data: bytes, model: str = MODEL) -> None:
        vector = to_tensor(np.ones((1, 2), dtype=np.float32))
        artefact = Artefact(
            tier=Tier.TIER_DEVICE,
            format=ModelFormat.MODEL_FORMAT_TFLITE,
            golden=GoldenVectors(inputs=vector, outputs=vector),
        )
        spec = submit_release(self.store, ReleaseSpec(model=model, artefacts=[artefact]), [data], self.keys, NOW)
        plan = RolloutPlan(rollout_id="r", model=model, release=spec.release, targets=["*"], share_permille=1000)
        submit_plan(self.store, plan, self.keys, NOW)

    def rotate(self, role: str) -> rotation.KeyChange:
        return rotation.rotate(self.store, role, self.keys, NOW)

    @property
    def refusals(self) -> list[str]:
        return [path.read_text() for path in sorted((self.store.directory / "refused").glob("*/reason"))]

    def keyids(self, role: str) -> set[str]:
        """The keys that what is published names for a role."""
        generation = self.store.load()
        if role in ROLES[:4]:
            return set(root_of(generation).roles[role].keyids)
        return set(delegations_of(parse_role(generation.roles["targets"]))[role].keyids)


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def cloud(tmp_path, wire):
    made = Cloud(tmp_path / "cloud", wire)
    yield made
    made.publisher.close()


@pytest.fixture
def make_node(tmp_path, wire, cloud):
    nodes = []

    def make(name="cam-1", root=None) -> Node:
        nodes.append(Node(tmp_path / name, wire, root or cloud.store.root(), name))
        return nodes[-1]

    yield make
    for node in nodes:
        node.client.close()


@pytest.mark.parametrize("role", ROLES)
def test_rotated_role_is_followed_by_old_and_new_nodes(cloud, make_node, role):
    """A node that runs, and one that comes later with the first root, both take a release made with the new keys."""
    cloud.ship(b"one")
    cloud.settle()
    node = make_node()
    assert node.run() == b"one"
    before = cloud.keyids(role)
    change = cloud.rotate(role)
    cloud.settle()
    assert cloud.keyids(role) == set(change.keyids)
    assert not before & set(change.keyids)
    cloud.ship(b"two")
    cloud.settle()
    assert not cloud.refusals
    assert node.run() == b"two"
    assert make_node("late").run() == b"two"


def test_node_that_slept_walks_every_root(cloud, make_node):
    """All roles change twice while the publisher is down; one chain of roots leads to the newest."""
    cloud.ship(b"one")
    cloud.settle()
    node = make_node()
    assert node.run() == b"one"
    for role in (*ROLES, *ROLES):
        cloud.rotate(role)
    cloud.ship(b"two")
    cloud.settle()
    assert not cloud.refusals
    assert root_of(cloud.store.load()).version == 9
    assert node.run() == b"two"
    newest = cloud.store.load().roots[-1]
    assert make_node("new", newest).run() == b"two"


def test_root_is_rotated_with_two_of_three_keys(cloud, make_node):
    """The third may be lost or far away; afterwards root has three again, of which two must sign."""
    (cloud.key_files / "root.2.pem").unlink()
    change = cloud.rotate("root")
    cloud.ship(b"one")
    cloud.settle()
    root = root_of(cloud.store.load())
    assert (root.version, root.roles["root"].threshold, len(change.keyids)) == (2, 2, 3)
    assert make_node().run() == b"one"


@pytest.mark.parametrize("role", ROLES)
def test_rotation_without_enough_keys_makes_none(cloud, role):
    """The operator reads what is missing, and nothing has changed."""
    for number in (1, 2):
        (cloud.key_files / f"root.{number}.pem").unlink()
    (cloud.key_files / "targets.1.pem").unlink()
    before = sorted(cloud.key_files.iterdir())
    with pytest.raises(ConfigError, match=r"root is signed by 2 of 3|no key of role targets"):
        cloud.rotate(role)
    assert sorted(cloud.key_files.iterdir()) == before
    assert not cloud.store.orders()


def test_unknown_role_is_named_with_those_that_there_are(cloud):
    """A typing error costs one line."""
    with pytest.raises(ConfigError, match="model-digits"):
        cloud.rotate("model-digitz")


def new_keys(root, count=3):
    """Give root new keys; return their signers."""
    made = [CryptoSigner.generate_ed25519() for _ in range(count)]
    for keyid in list(root.roles["root"].keyids):
        root.revoke_key(keyid, "root")
    for signer in made:
        root.add_key(signer.public_key, "root")
    return made


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one old key", "root 1: root was signed by 1/2"),
        ("new keys only", "root 1: root was signed by 0/2"),
        ("old keys only", "its own: root was signed by 0/2"),
        ("one new key", "its own: root was signed by 1/2"),
        ("version 3", "expected 2"),
        ("version 1", "expected 2"),
        ("expired", "expired"),
        ("file names without versions", "without consistent snapshots"),
    ],
)
def test_bad_root_is_refused(cloud, case, message):
    """Two of the old three and two of the new three must sign the next version; nothing less is published."""
    old = cloud.keys.signers("root")
    version = int(case.removeprefix("version ")) if case.startswith("version") else 2
    root = parse_root(cloud.store.load().roots[-1]).signed
    root.version = version
    made = new_keys(root)
    if case == "expired":
        root.expires = NOW - dt.timedelta(seconds=1)
    root.consistent_snapshot = case != "file names without versions"
    signers = {
        "one old key": [*old[:1], *made],
        "new keys only": made,
        "old keys only": old,
        "one new key": [*old, *made[:1]],
    }.get(case, [*old, *made])
    before = cloud.store.load()
    cloud.store.submit("root", sign(root, signers), {})
    cloud.settle()
    [reason] = cloud.refusals
    assert message in reason
    assert cloud.store.load() == before


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one old key", "root was signed by 1/2"),
        ("no old key", "root was signed by 0/2"),
        ("not itself", "root was signed by 0/2"),
        ("version 3", "Expected root version 2 instead got version 3"),
        ("version 1", "Expected root version 2 instead got version 1"),
        ("too long", "exceeding"),
        ("timestamp", "Expected 'root', got 'timestamp'"),
    ],
)
def test_node_refuses_a_bad_root(cloud, make_node, caplog, case, message):
    """Even where somebody publishes past the publisher: what runs goes on, and the fault is counted and told."""
    cloud.ship(b"one")
    cloud.settle()
    node = make_node()
    assert node.run() == b"one"
    old = cloud.keys.signers("root")
    root = parse_root(cloud.store.root()).signed
    root.version = int(case.removeprefix("version ")) if case.startswith("version") else 2
    made = new_keys(root)
    signers = {"one old key": [*old[:1], *made], "no old key": made, "not itself": old}.get(case, [*old[:2], *made[:2]])
    forged = sign(root, signers) + b" " * (65_536 if case == "too long" else 0)
    if case == "timestamp":
        forged = cloud.store.load().timestamp
    show_root(cloud.wire, 2, forged)
    assert node.run() == b"one"
    assert node.counters["trust_errors"] == 1
    assert message in caplog.text
    with pytest.raises(IndexError):
        make_node("late").run()


def test_node_follows_a_root_that_two_of_three_signed(cloud, make_node, wire):
    """The rest of what is published being signed as before, it is the same view from another root."""
    cloud.ship(b"one")
    cloud.settle()
    node = make_node()
    assert node.run() == b"one"
    root = parse_root(cloud.store.root()).signed
    root.version = 2
    made = new_keys(root)
    show_root(wire, 2, sign(root, [*cloud.keys.signers("root")[1:], *made[:2]]))
    refreshes = node.counters["trust_refreshes"]
    assert node.run() == b"one"
    assert node.counters["trust_refreshes"] == refreshes + 1
    assert node.counters["trust_errors"] == 0
    assert make_node("late").run() == b"one"


def test_node_waits_for_a_root_that_is_withheld(cloud, make_node, wire):
    """The index names it, its blob is not there: a node does not go on from the root before it."""
    cloud.ship(b"one")
    cloud.settle()
    cloud.rotate("root")
    cloud.settle()
    blob = topic(Route.BLOB, sha256=digest(cloud.store.load().roots[-1]).hex())
    withheld = wire.retained.pop(blob)
    node = make_node()
    with pytest.raises(IndexError):
        node.run()
    assert node.counters["trust_errors"] == 0
    wire.retained[blob] = withheld
    assert node.run() == b"one"


def show_root(wire, version: int, data: bytes) -> None:
    """Name a root in the bundle, past the publisher."""
    bundle = TrustBundle.FromString(wire.retained[topic(Route.TRUST_BUNDLE)])
    chunks = split(data)
    entry = BundleEntry(path=f"{version}.root.json", sha256=digest(data), length_bytes=len(data))
    entry.chunks.extend(map(digest, chunks))
    bundle.entries.append(entry)
    link = WireLink(wire)
    for chunk in chunks:
        link.publish(Route.BLOB, chunk, on_done=lambda _: None, sha256=digest(chunk).hex())
    link.publish(Route.TRUST_BUNDLE, bundle, on_done=lambda _: None)


def test_old_key_signs_nothing_after_its_rotation(cloud):
    """A trainer that was not given the new key is told so; what it signs all the same is refused."""
    trainer_keys = FileKeyStore(cloud.key_files.with_name("trainer"))
    (old,) = cloud.keys.signers(model_role(MODEL))
    cloud.rotate(model_role(MODEL))
    cloud.settle()
    trainer_keys.create(model_role(MODEL))  # any key but the one that is named now
    cloud.keys = trainer_keys
    with pytest.raises(ConfigError, match="role model-digits is signed by 1 of 1 keys, and 0 of these are here"):
        cloud.ship(b"two")
    cloud.store.submit(model_role(MODEL), sign_role([old], 9, {}, NOW), {})
    cloud.settle()
    [reason] = cloud.refusals
    assert "signed by 0/1" in reason


def test_publisher_without_the_new_key_refuses_and_goes_on(cloud, tmp_path, make_node):
    """Otherwise it would publish what no node can verify."""
    admin = FileKeyStore(tmp_path / "admin")
    (tmp_path / "admin").mkdir(mode=0o700)
    for path in cloud.key_files.iterdir():
        (tmp_path / "admin" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "admin" / path.name).chmod(0o600)
    rotation.rotate(cloud.store, "timestamp", admin, NOW)
    cloud.settle()
    assert "role timestamp is signed by 1 of 1 keys, and 0 of these are here" in cloud.refusals[0]
    cloud.ship(b"one")
    cloud.settle()
    assert make_node().run() == b"one"


def test_publisher_does_not_start_without_its_keys(cloud):
    """The operator learns it at once and not at the first renewal."""
    cloud.publisher.close()
    with pytest.raises(ConfigError, match="snapshot"):
        cloud.boot(FileKeyStore(cloud.key_files.with_name("nothing")))
    cloud.boot()


def test_kill_before_the_commit_loses_no_rotation(cloud, monkeypatch, make_node):
    """The new root may lie on disk already: until the timestamp is replaced it is not published."""
    cloud.ship(b"one")
    cloud.settle()
    before = cloud.store.load()
    cloud.rotate("timestamp")
    real_write = release_store.write_atomic

    def die(path, data, mode=0o644):
        if path.name == "timestamp.json":
            raise KeyboardInterrupt
        real_write(path, data, mode)

    monkeypatch.setattr(release_store, "write_atomic", die)
    with pytest.raises(KeyboardInterrupt):
        cloud.publisher.tick(1000.0)
    monkeypatch.undo()
    assert (cloud.store.directory / "metadata" / "2.root.json").exists()
    assert cloud.store.load() == before
    cloud.die()
    cloud.boot()
    cloud.settle()
    assert root_of(cloud.store.load()).version == 2
    assert make_node().run() == b"one"


def test_kill_between_commit_and_finish_rotates_once(cloud, monkeypatch):
    """An order that is committed and still in the queue is recognised."""
    cloud.rotate("root")
    monkeypatch.setattr(cloud.store, "finish", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cloud.publisher.tick(1000.0)
    monkeypatch.undo()
    cloud.die()
    cloud.boot()
    cloud.settle()
    assert root_of(cloud.store.load()).version == 2
    assert not cloud.refusals


def test_model_added_later_can_be_released(cloud):
    """Its role, key and first release need no new root."""
    change = rotation.add_model(cloud.store, "valve", cloud.keys, NOW)
    cloud.ship(b"valve", "valve")
    cloud.settle()
    assert not cloud.refusals
    assert (change.delegator, change.version) == ("targets", 2)
    assert "releases/valve/1.spec" in cloud.store.load().targets()
    assert root_of(cloud.store.load()).version == 1


@pytest.mark.parametrize(("name", "message"), [(MODEL, "already"), ("../x", "not an id")])
def test_model_that_cannot_be_added_is_refused(cloud, name, message):
    """Before any key is made."""
    before = sorted(cloud.key_files.iterdir())
    with pytest.raises(ConfigError, match=message):
        rotation.add_model(cloud.store, name, cloud.keys, NOW)
    assert sorted(cloud.key_files.iterdir()) == before


def forge_targets(cloud, change):
    targets = parse_role(cloud.store.load().roles["targets"])
    targets.version += 1
    change(targets)
    return sign(targets, cloud.keys.signers("targets"))


def drop_role(targets):
    del targets.delegations.roles[model_role(MODEL)]


def widen_role(targets):
    targets.delegations.roles[model_role(MODEL)].paths = ["*"]


def deliver(targets):
    targets.targets["releases/digits/1.spec"] = target_file("releases/digits/1.spec", b"x")


def delegate_to_nobody(targets):
    targets.delegations.roles["model-ghost"] = delegated_role("model-ghost")


def keep_version(targets):
    targets.version -= 1
    targets.expires += dt.timedelta(days=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_role, "model-digits: not delegated to"),
        (widen_role, r"expected ['releases/digits/*', 'models/digits/*']"),
        (deliver, "delivers something itself"),
        (delegate_to_nobody, "model-ghost: delegated to, but without metadata"),
        (keep_version, "version 1, 1 is published"),
    ],
)
def test_order_that_changes_more_than_keys_is_refused(cloud, change, message):
    """The key of targets alone can take no model away and give no role more than its own paths."""
    cloud.store.submit("targets", forge_targets(cloud, change), {})
    cloud.settle()
    [reason] = cloud.refusals
    assert message in reason


def expire(role):
    role.expires = NOW - dt.timedelta(seconds=1)


def delegate_further(role):
    role.delegations = Delegations(keys={}, roles={})


def stray(role):
    role.targets["plans/digits.plan"] = target_file("plans/digits.plan", b"x")


@pytest.mark.parametrize(
    ("change", "message"),
    [(expire, "expired"), (delegate_further, "delegates further"), (stray, "may not deliver plans/digits.plan")],
)
def test_role_signed_along_with_a_key_is_checked_like_any(cloud, change, message):
    """Its own key signs it, and still: nothing expired, no further delegation, no foreign path."""
    role = model_role(MODEL)
    again = parse_role(cloud.store.load().roles[role])
    again.version += 1
    change(again)
    resigned = sign(again, cloud.keys.signers(role))
    cloud.store.submit("targets", forge_targets(cloud, lambda _: None), {}, {role: resigned})
    cloud.settle()
    assert f"role {role}" in cloud.refusals[0]
    assert message in cloud.refusals[0]


def test_rotation_cannot_change_what_a_role_delivers(cloud):
    """A release goes through the checks of releases, never along with a key."""
    role = model_role(MODEL)
    resigned = sign_role(cloud.keys.signers(role), 2, {"models/digits/1-device.tflite": target_file("x", b"x")}, NOW)
    cloud.store.submit("targets", forge_targets(cloud, lambda _: None), {}, {role: resigned})
    cloud.settle()
    assert "what it delivers did" in cloud.refusals[0]


@pytest.mark.parametrize("role", ["targets", ROLLOUT, model_role(MODEL)])
def test_rotation_without_the_role_signed_again_is_refused(cloud, role):
    """Nodes would find a role whose signature nobody vouches for any more."""
    order = cloud.rotate(role)
    [queued] = cloud.store.orders()
    (queued.directory / f"{order.role}.resigned.json").unlink()
    cloud.settle()
    assert f"role {role}: {role} was signed by 0/1" in cloud.refusals[0]


@pytest.mark.parametrize("role", ["root", "targets"])
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xff"])
def test_rubbish_in_the_queue_is_refused(cloud, role, data):
    """Whatever lies there, the publisher goes on."""
    cloud.store.submit(role, data, {})
    cloud.ship(b"one")
    cloud.settle()
    assert len(cloud.refusals) == 1
    assert "releases/digits/1.spec" in cloud.store.load().targets()


def test_metadata_of_another_type_is_no_root(cloud):
    """Genuine, signed by the right key, and of the wrong type."""
    cloud.store.submit("root", cloud.store.load().snapshot, {})
    cloud.settle()
    assert "type snapshot" in cloud.refusals[0]
    with pytest.raises(TrustError, match="type targets"):
        parse_root(cloud.store.load().roles["targets"])


def test_keys_are_retired_once_nothing_names_them(cloud):
    """Before the publisher took the order the old ones still sign; afterwards they are moved, not deleted."""
    cloud.rotate("timestamp")
    assert rotation.retire(cloud.store, cloud.keys) == []
    cloud.settle()
    [moved] = rotation.retire(cloud.store, cloud.keys)
    assert moved == str(cloud.key_files / "retired" / "timestamp.1.pem")
    assert (cloud.key_files / "retired" / "timestamp.1.pem").stat().st_mode & 0o777 == 0o600
    cloud.ship(b"one")
    cloud.settle()
    assert not cloud.refusals
