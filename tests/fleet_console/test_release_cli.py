"""`shoal release` and `shoal models`, as an operator types them, the latter against a real broker."""

import json
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from typer.testing import CliRunner

from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_store import ReleaseStore
from cloud.retained import live_set
from fleet_console.broker import free_port, start_broker
from fleet_console.cli import app
from fleet_console.models import Room, read_listing
from shoal.codec import encode
from shoal.errors import ConfigError, ModelError, TrustError
from shoal.release.chunks import digest
from shoal.routes import Route, topic
from shoal.v1.node_pb2 import ModelState, NodeState, SlotPhase
from shoal.v1.release_pb2 import ReleaseSpec, TrustBundle


def dense(path, width=5):
    """An ONNX file: a dense layer of 4 to `width`."""
    weights = np.random.default_rng(width).normal(size=(4, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def run(*arguments):
    """Run `shoal`; an error that the operator would read is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cloud.toml"
    path.write_text(f'data_dir = "{tmp_path}/data"\n[[models]]\nname = "valve"\n')
    run("keys", "init", "--no-encryption", "--config", path)
    return path


@pytest.fixture
def store(config):
    return ReleaseStore(config.parent / "data" / "releases")


@pytest.fixture
def root(config):
    return config.parent / "data" / "root.json"


def take_orders(store):
    """Let a publisher without a broker take what is queued."""
    link = type("Link", (), {"connected": False})()
    keys = FileKeyStore(store.directory.parent / "keys")
    publisher = Publisher(link, store, keys, counters=Counter())
    publisher.start()
    publisher.tick(1.0)
    publisher.close()
    assert not list((store.directory / "refused").iterdir())


@pytest.fixture
def released(config, store, tmp_path):
    """One release of `valve`, taken by the publisher."""
    run("release", "publish", "--model", "valve", dense(tmp_path / "m.onnx"), "--config", config)
    take_orders(store)
    return store


def test_publish_queues_a_release_and_its_plan(config, store, tmp_path):
    """The line says what nodes will be told; the plan goes to the nodes that were named."""
    options = ["--targets", "edge_*", "--targets", "lab-1", "--threshold", "0.25", "--config", config]
    result = run("release", "publish", "--model", "valve", dense(tmp_path / "m.onnx"), *options)
    assert result.exit_code == 0
    assert "Queued release 1 of valve: " in result.stdout
    assert "input [4], score uncertainty above 0.25, 8 golden vectors" in result.stdout
    assert [order.role for order in store.orders()] == ["model-valve", "rollout"]
    take_orders(store)
    listing = read_listing(Retained(store), None)
    assert listing.models[0].targets == ("edge_*", "lab-1")


def test_publish_with_golden_vectors_keeps_them(config, store, tmp_path):
    """Three were given, three are released."""
    np.savez(tmp_path / "g.npz", inputs=np.ones((3, 4), dtype=np.float32))
    result = run(
        "release", "publish", "--model", "valve", dense(tmp_path / "m.onnx"), "--golden", tmp_path / "g.npz",
        "--config", config,
    )  # fmt: skip
    assert "3 golden vectors" in result.stdout


def test_refused_file_queues_nothing(config, store, tmp_path):
    """The reason is the error; nobody's queue holds half a release."""
    with pytest.raises(ModelError, match="one value, which gives no score"):
        run("release", "publish", "--model", "valve", dense(tmp_path / "m.onnx", 1), "--config", config)
    assert not store.orders()


def test_verify_of_a_whole_store_is_silent_success(released, root):
    """Exit status 0 and one line; the same as JSON."""
    result = run("release", "verify", released.directory, "--root", root)
    assert result.exit_code == 0
    assert result.stdout.startswith("3 files, all whole and signed: root 1, ")
    found = json.loads(run("release", "verify", released.directory, "--json").stdout)
    assert (found["ok"], found["faults"], found["files"], found["versions"]["rollout"]) == (True, [], 3, 2)


def test_verify_of_a_damaged_store_fails_with_a_line_a_fault(released):
    """Exit status 1, for scripts."""
    paths = sorted((released.directory / "files").iterdir())
    for path in paths[:2]:
        path.write_bytes(b"other")
    result = run("release", "verify", released.directory)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    as_json = run("release", "verify", released.directory, "--json")
    assert as_json.exit_code == 1
    assert len(json.loads(as_json.stdout)["faults"]) == 2


class Retained:
    """A broker that holds what the publisher would have published, and nodes' states."""

    def __init__(self, store, states=None) -> None:
        live = live_set(store.load(), store)
        self.messages = {topic(Route.BLOB, sha256=item.hex()): source.load() for item, source in live.blobs.items()}
        self.messages[topic(Route.TRUST_BUNDLE)] = encode(live.bundle)
        self.messages[topic(Route.TRUST_TIMESTAMP)] = live.timestamp
        for node, state in (states or {}).items():
            self.messages[topic(Route.STATE, site="lab", node=node)] = state

    def read_matching(self, _filters):
        return {name: data for name, data in self.messages.items() if "/blob/" not in name}

    def read_exactly(self, topics):
        return {name: self.messages[name] for name in topics if name in self.messages}


def state_of(model, release, sha256, phase=SlotPhase.SLOT_PHASE_CONFIRMED):
    return encode(NodeState(models=[ModelState(model=model, release=release, sha256=sha256, phase=phase)]))


def artefact_digest(store):
    (path,) = [info for name, info in store.load().targets().items() if name.startswith("models/")]
    return bytes.fromhex(path.hashes["sha256"])


def test_listing_says_who_runs_what(released):
    """By digest, not by the number alone; what no release explains is shown apart."""
    sha256 = artefact_digest(released)
    states = {
        "gw-1": state_of("valve", 1, sha256),
        "gw-2": state_of("valve", 1, b"\0" * 32),
        "gw-3": state_of("valve", 0, b""),
        "gw-4": b"\xff",
    }
    listing = read_listing(Retained(released, states), released.root())
    (row,) = listing.models
    assert (row.model, row.release, row.tier, row.format, row.sha256) == ("valve", 1, "gateway", "onnx", sha256.hex())
    assert [(found.node, found.site, found.phase) for found in row.nodes] == [("gw-1", "lab", "confirmed")]
    assert [(model, release, found.node) for model, release, found in listing.others] == [("valve", 1, "gw-2")]


def test_listing_names_the_keys_that_signed(released, config):
    """After a rotation the new one, and not the old."""
    (before,) = read_listing(Retained(released), None).models
    run("keys", "rotate", "model-valve", "--config", config)
    take_orders(released)
    (after,) = read_listing(Retained(released), None).models
    keys = FileKeyStore(released.directory.parent / "keys").signers("model-valve")
    assert {*before.signed_by, *after.signed_by} == {signer.public_key.keyid for signer in keys}
    assert before.signed_by != after.signed_by


@pytest.mark.parametrize(
    ("state", "room"),
    [
        (NodeState(counters={"retained_bytes": 7, "retained_budget_bytes": 9}).SerializeToString(), Room(7, 9)),
        (NodeState(counters={"connects": 1}).SerializeToString(), None),
        (b"\xff", None),
        (None, None),
    ],
)
def test_listing_says_how_much_room_is_left(released, state, room):
    """As the publisher says it; a publisher that says nothing, or nonsense, hides no release."""
    reader = Retained(released)
    if state is not None:
        reader.messages[topic(Route.CLOUD_STATE, service="publisher")] = state
    listing = read_listing(reader, None)
    assert listing.room == room
    assert len(listing.models) == 1


def test_release_without_room_is_refused_where_it_is_published(released, config, tmp_path):
    """The operator reads the three numbers; nothing is queued."""
    config.write_text(f"retained_budget_bytes = 1000\n{config.read_text()}")
    with pytest.raises(ModelError, match=r"release 2 of 'valve': \d+ bytes would be retained, \d+ are, .* 1000 "):
        run("release", "publish", "--model", "valve", dense(tmp_path / "n.onnx", 6), "--config", config)
    assert not released.orders()


def test_listing_does_not_believe_another_root(released, tmp_path):
    """With the nodes' root the broker's own chain counts for nothing."""
    path = tmp_path / "other.toml"
    path.write_text(f'data_dir = "{tmp_path}/other"\nmodels = []\n')
    run("keys", "init", "--no-encryption", "--config", path)
    with pytest.raises(TrustError):
        read_listing(Retained(released), (tmp_path / "other" / "root.json").read_bytes())


def test_listing_does_not_believe_an_edited_spec(released):
    """The index is not signed: what it says of a spec must be what signed metadata says."""
    reader = Retained(released)
    bundle = TrustBundle.FromString(reader.messages[topic(Route.TRUST_BUNDLE)])
    spec, plan = (next(item for item in bundle.entries if item.path.endswith(end)) for end in (".spec", ".plan"))
    spec.sha256, spec.length_bytes = plan.sha256, plan.length_bytes
    reader.messages[topic(Route.TRUST_BUNDLE)] = encode(bundle)
    with pytest.raises(TrustError, match="not what the signed metadata says"):
        read_listing(reader, None)


def test_listing_of_what_is_not_there_yet_says_so(released):
    """An empty broker, and one that a publisher is filling."""
    reader = Retained(released)
    with pytest.raises(ConfigError, match="no releases"):
        read_listing(type("Empty", (), {"read_matching": lambda _self, _filters: {}})(), None)
    (plan,) = [name for name, data in reader.messages.items() if b"valve-1" in data and "/blob/" in name]
    del reader.messages[plan]
    with pytest.raises(ConfigError, match="is not on the broker"):
        read_listing(reader, None)


@contextmanager
def filled(directory, retained):
    """Run a real broker with everything retained."""
    with start_broker(directory) as running:
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        client.connect("127.0.0.1", running.port)
        client.loop_start()
        for name, data in retained.messages.items():
            client.publish(name, data, qos=1, retain=True).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()
        yield running


@pytest.fixture
def filled_broker(tmp_path, released):
    """With a release and one node's state."""
    states = {"gw-1": state_of("valve", 1, artefact_digest(released))}
    retained = Retained(released, states)
    room = NodeState(counters={"retained_bytes": 1234, "retained_budget_bytes": 5678})
    retained.messages[topic(Route.CLOUD_STATE, service="publisher")] = encode(room)
    with filled(tmp_path / "broker", retained) as running:
        yield running


def test_models_lists_a_running_broker(filled_broker, root):
    """For machines and for people: the same release, who signed it, who runs it."""
    found = json.loads(run("models", "--json", "--root", root, "--broker", filled_broker.url).stdout)
    (row,) = found["models"]
    assert (row["model"], row["release"], row["share_permille"], row["targets"]) == ("valve", 1, 1000, ["*"])
    assert [node["node"] for node in row["nodes"]] == ["gw-1"]
    assert found["root_given"] is True
    text = run("models", "--broker", filled_broker.url).stdout
    assert row["sha256"][:12] in text
    assert row["signed_by"][0][:12] in text
    assert "gw-1 (confirmed)" in text
    assert "Retained: 1234 of at most 5678 bytes" in text
    assert "give --root" in text


def read_plainly(running, name):
    """What Mosquitto's own client prints of a retained message."""
    command = ["mosquitto_sub", "-V", "5", "-p", str(running.port), "-t", name, "-C", "1", "-N", "-W", "10"]
    return subprocess.run(command, capture_output=True, timeout=20, check=True).stdout


@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="left out: needs mosquitto_sub")
def test_plain_tools_see_the_releases_that_models_lists(config, released, root, tmp_path, monkeypatch):
    """Two releases of one model, one of another: numbers, sizes, digests and versions agree, and so do the bytes."""
    monkeypatch.setenv("SHOAL_KEY_PASSWORD", "of the new key")
    run("keys", "add-model", "pump", "--config", config)
    for model, width in (("valve", 6), ("pump", 7)):
        run("release", "publish", "--model", model, dense(tmp_path / "m.onnx", width), "--config", config)
    take_orders(released)
    with filled(tmp_path / "broker", Retained(released)) as running:
        listed = json.loads(run("models", "--json", "--root", root, "--broker", running.url).stdout)
        bundle = TrustBundle.FromString(read_plainly(running, topic(Route.TRUST_BUNDLE)))
        timestamp = json.loads(read_plainly(running, topic(Route.TRUST_TIMESTAMP)))["signed"]
        seen = []
        for entry in bundle.entries:
            if not entry.path.endswith(".spec"):
                continue
            spec = ReleaseSpec.FromString(read_plainly(running, topic(Route.BLOB, sha256=entry.sha256.hex())))
            for artefact in spec.artefacts:
                chunks = [topic(Route.BLOB, sha256=chunk.hex()) for chunk in artefact.chunks or [artefact.sha256]]
                data = b"".join(read_plainly(running, chunk) for chunk in chunks)
                seen.append((spec.model, spec.release, len(data), digest(data).hex()))
    rows = [(row["model"], row["release"], row["bytes"], row["sha256"]) for row in listed["models"]]
    assert sorted(seen) == sorted(rows)
    assert [row[:2] for row in sorted(rows)] == [("pump", 1), ("valve", 1), ("valve", 2)]
    versions = listed["versions"]
    assert timestamp["version"] == versions["timestamp"]
    assert timestamp["meta"]["snapshot.json"]["version"] == versions["snapshot"]
    names = {entry.path for entry in bundle.entries}
    files = {f"{version}.{role}.json" for role, version in versions.items() if role != "timestamp"}
    assert files <= names


def test_models_without_a_broker_is_one_line():
    """What to start is said."""
    with pytest.raises(ConfigError, match="shoal broker"):
        run("models", "--broker", f"mqtt://127.0.0.1:{free_port()}")
