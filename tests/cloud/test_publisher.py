"""The publisher against a link that confirms, refuses, stalls and dies at any point."""

import datetime as dt
import random
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cloud import release_store
from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import checked_files, submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, first_generation, parse_role, sign_role, target_file, timestamp_of
from cloud.retained import RETAINED_BUDGET_BYTES, OverBudgetError, live_set
from shoal.codec import encode
from shoal.errors import ConfigError, LinkError, ModelError, TrustError
from shoal.release.chunks import CHUNK_BYTES, digest, split
from shoal.release.trust import model_role
from shoal.routes import Route, topic
from shoal.tensors import to_tensor
from shoal.v1.release_pb2 import Artefact, GoldenVectors, ModelFormat, ReleaseSpec, RolloutPlan, Tier, TrustBundle

NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)


class Broker:
    """Retained messages, and what was published in which order."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.order: list[str] = []


class Link:
    """Takes up to `window` messages; `confirm` lets the broker have the oldest."""

    def __init__(self, broker: Broker, window: int = 7) -> None:
        self.broker = broker
        self.window = window
        self.connected = True
        self.pending: list[tuple[str, bytes, object]] = []

    def publish(self, route, message, *, on_done=None, **segments):
        if not self.connected or len(self.pending) >= self.window:
            return False
        payload = message if isinstance(message, bytes) else encode(message)
        self.pending.append((topic(route, **segments), payload, on_done))
        return True

    def confirm(self, error: LinkError | None = None) -> None:
        name, payload, on_done = self.pending.pop(0)
        if error is None:
            self.broker.order.append(name)
            self.broker.retained[name] = payload
            if not payload:
                del self.broker.retained[name]
        on_done(error)


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def keys(tmp_path):
    keys = FileKeyStore(tmp_path / "keys")
    for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role("digits"), model_role("shuttle")):
        keys.create(role)
    return keys


@pytest.fixture
def store(tmp_path, keys):
    store = ReleaseStore(tmp_path / "store")
    store.create(first_generation(keys, ["digits", "shuttle"], NOW))
    return store


@pytest.fixture
def boot(store, keys, broker):
    made = []

    def start(window=7, now=NOW, budget_bytes=RETAINED_BUDGET_BYTES):
        if made:
            made.pop().close()
        link = Link(broker, window)
        publisher = Publisher(link, store, keys, counters=Counter(), budget_bytes=budget_bytes, wall_clock=lambda: now)
        publisher.start()
        publisher.on_connect()
        made.append(publisher)
        return publisher, link

    yield start
    for publisher in made:
        publisher.close()


def settle(publisher, link, limit=100_000):
    publisher.tick(1.0)
    for _ in range(limit):
        if not link.pending:
            publisher.tick(2.0)
            if not link.pending:
                break
        link.confirm()
    assert publisher.settled


def spec_of(model="digits", parent=0):
    vector = to_tensor(np.ones((1, 2), dtype=np.float32))
    golden = GoldenVectors(inputs=vector, outputs=vector)
    artefact = Artefact(tier=Tier.TIER_DEVICE, format=ModelFormat.MODEL_FORMAT_TFLITE, golden=golden)
    return ReleaseSpec(model=model, parent=parent, artefacts=[artefact])


def release(store, keys, seed, parent=0, *, model="digits", chunks=2.5):
    data = random.Random(seed).randbytes(int(chunks * CHUNK_BYTES))
    return data, submit_release(store, spec_of(model, parent), [data], keys, NOW)


def plan(store, keys, number, model="digits"):
    plan = RolloutPlan(rollout_id="r", model=model, release=number, targets=["*"], share_permille=1000)
    return submit_plan(store, plan, keys, NOW)


def blobs(data):
    return {topic(Route.BLOB, sha256=digest(chunk).hex()) for chunk in split(data)}


def complete(broker):
    """Whether every file that the published bundle names can be read from the broker."""
    bundle = TrustBundle.FromString(broker.retained[topic(Route.TRUST_BUNDLE)])
    names = [item.hex() for entry in bundle.entries for item in (entry.chunks or [entry.sha256])]
    return all(topic(Route.BLOB, sha256=name) in broker.retained for name in names)


def test_submitted_release_is_described_completely(store, keys):
    """Number, time, path, digest, length and chunks are filled in; the rest is the trainer's."""
    data, spec = release(store, keys, 1)
    [artefact] = spec.artefacts
    assert (spec.release, spec.created_at_us) == (1, int(NOW.timestamp() * 1e6))
    assert artefact.path == "models/digits/1-device.tflite"
    assert (artefact.sha256, artefact.length_bytes) == (digest(data), len(data))
    assert list(artefact.chunks) == [digest(chunk) for chunk in split(data)]


def test_blobs_then_bundle_then_timestamp_each_confirmed(store, keys, broker, boot):
    """At every moment the published timestamp finds all that it vouches for, whatever was there before."""
    publisher, link = boot(window=3)
    settle(publisher, link)
    release(store, keys, 1)
    plan(store, keys, 1)
    publisher.tick(10.0)
    bundle, timestamp = topic(Route.TRUST_BUNDLE), topic(Route.TRUST_TIMESTAMP)
    broker.order.clear()
    while link.pending:
        names = {name for name, _, _ in link.pending}
        assert not names & {bundle, timestamp} or len(names) == 1
        link.confirm()
        assert complete(broker)
    at = broker.order.index(bundle)
    assert broker.order[at + 1] == timestamp
    assert not {name for name in broker.order[at + 2 :] if name in broker.retained}  # nothing but clearing


def test_full_window_is_back_pressure(store, keys, boot):
    """Never more than the link takes, and nothing forgotten."""
    release(store, keys, 1, chunks=30)
    publisher, link = boot(window=2)
    publisher.tick(1.0)
    assert len(link.pending) == 2
    settle(publisher, link)


def test_kill_between_any_two_publishes_heals(store, keys, broker, boot):
    """Restarted after every possible number of confirmations, it ends with the whole set on the broker."""
    data, _ = release(store, keys, 1)
    plan(store, keys, 1)
    publisher, link = boot()
    publisher.tick(1.0)
    total = 0
    while link.pending:
        link.confirm()
        total += 1
    for survived in range(total):
        broker.retained.clear()
        publisher, link = boot()
        publisher.tick(1.0)
        for _ in range(survived):
            if link.pending:
                link.confirm()
        publisher, link = boot()
        settle(publisher, link)
        assert complete(broker)
        assert blobs(data) <= broker.retained.keys()


def test_kill_between_commit_and_finish_repeats_nothing(store, keys, boot, monkeypatch):
    """An order that is committed and still in the queue is recognised."""
    release(store, keys, 1)
    publisher, _ = boot()
    monkeypatch.setattr(store, "finish", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publisher.tick(1.0)
    monkeypatch.undo()
    version = parse_role(store.load().roles[model_role("digits")]).version
    publisher, link = boot()
    settle(publisher, link)
    assert parse_role(store.load().roles[model_role("digits")]).version == version
    assert not store.orders()
    assert publisher.counters["orders_refused"] == 0


def test_kill_before_the_commit_loses_no_order(store, keys, boot, monkeypatch):
    """The timestamp file is the commit: until it is replaced the old generation stands, and the order waits."""
    before = store.load()
    release(store, keys, 1)
    publisher, _ = boot()
    real_write = release_store.write_atomic

    def die(path, data, mode=0o644):
        if path.name == "timestamp.json":
            raise KeyboardInterrupt
        real_write(path, data, mode)

    monkeypatch.setattr(release_store, "write_atomic", die)
    with pytest.raises(KeyboardInterrupt):
        publisher.tick(1.0)
    monkeypatch.undo()
    assert store.load() == before
    publisher, link = boot(now=NOW + dt.timedelta(seconds=1))
    settle(publisher, link)
    after = store.load()
    timestamp_of(after).snapshot_meta.verify_length_and_hashes(after.snapshot)
    assert "releases/digits/1.spec" in store.load().targets()


def test_broker_that_lost_everything_is_healed_at_the_next_connection(store, keys, broker, boot):
    """The embedded broker keeps nothing on disk."""
    data, _ = release(store, keys, 1)
    publisher, link = boot()
    settle(publisher, link)
    full = dict(broker.retained)
    broker.retained.clear()
    publisher.on_connect()
    settle(publisher, link)
    assert broker.retained == full
    assert blobs(data) <= full.keys()


def test_lost_connection_forgets_what_was_on_its_way(store, keys, broker, boot):
    """Answers that belong to the old connection change nothing on the new one."""
    release(store, keys, 1)
    publisher, link = boot(window=100)
    publisher.tick(1.0)
    lost, link.pending = link.pending, []
    publisher.on_connect()
    for _, _, on_done in lost:
        on_done(None)
    assert topic(Route.TRUST_BUNDLE) not in {name for name, _, _ in link.pending}
    settle(publisher, link)
    assert complete(broker)


def test_blobs_in_flight_when_the_connection_ends_are_published_again(store, keys, broker, boot):
    """The link says so for each; nothing is sent before the next connection."""
    release(store, keys, 1)
    publisher, link = boot()
    publisher.tick(1.0)
    link.confirm()
    link.connected = False
    lost, link.pending = link.pending, []
    for _, _, on_done in lost:
        on_done(LinkError("gone"))
    publisher.tick(100.0)
    assert not link.pending
    link.connected = True
    publisher.on_connect()
    settle(publisher, link)
    assert complete(broker)


def test_refusal_pauses_and_tries_again(store, keys, boot, caplog):
    """Rights may be mended while we wait; nothing is skipped meanwhile, and no loop runs hot."""
    publisher, link = boot(window=1)
    publisher.tick(1.0)
    link.confirm(LinkError("not authorized"))
    assert not link.pending
    publisher.tick(2.0)
    assert not link.pending
    publisher.tick(7.0)
    assert link.pending
    assert publisher.counters["publish_errors"] == 1
    assert "not authorized" in caplog.text
    while link.pending:
        link.confirm()
    assert publisher.settled


def test_blobs_of_dead_releases_are_cleared_after_the_new_timestamp(store, keys, broker, boot):
    """Retained memory is bounded by what live plans and fallbacks name, even over restarts and lost ledgers of ours."""
    publisher, link = boot()
    made = {}
    for number in (1, 2, 3):
        made[number], _ = release(store, keys, number, parent=number - 1)
        plan(store, keys, number)
        settle(publisher, link)
    broker.order.clear()
    made[4], _ = release(store, keys, 4, parent=3)
    settle(publisher, link)
    assert not blobs(made[1]) & broker.retained.keys()
    for number in (2, 3, 4):
        assert blobs(made[number]) <= broker.retained.keys()
    assert broker.order.index(topic(Route.TRUST_TIMESTAMP)) < min(broker.order.index(name) for name in blobs(made[1]))
    live = {topic(Route.BLOB, sha256=item.hex()) for item in live_set(store.load(), store).blobs}
    assert {name for name in broker.retained if "/blob/" in name} == live
    publisher.tick(20.0)
    assert publisher._ledger.digests() == live_set(store.load(), store).blobs.keys()
    assert not {path.name for path in (store.directory / "files").iterdir()} & {digest(made[1]).hex()}


def test_clearing_survives_a_kill(store, keys, broker, boot):
    """What one process could not clear, the next one does, because the ledger knows it."""
    publisher, link = boot()
    first, _ = release(store, keys, 1)
    settle(publisher, link)
    release(store, keys, 2)
    publisher.tick(5.0)
    while not any(payload == b"" for _, payload, _ in link.pending):
        link.confirm()
    assert blobs(first) & broker.retained.keys()
    publisher, link = boot()
    settle(publisher, link)
    assert not blobs(first) & broker.retained.keys()


def test_blob_that_comes_back_to_life_is_published_again(store, keys, broker, boot):
    """The same artefact in a later release, while its old blob is being cleared."""
    publisher, link = boot()
    data, _ = release(store, keys, 1)
    settle(publisher, link)
    release(store, keys, 2)
    publisher.tick(5.0)
    while not any(payload == b"" for _, payload, _ in link.pending):
        link.confirm()
    submit_release(store, spec_of(), [data], keys, NOW)
    publisher.tick(6.0)
    settle(publisher, link)
    assert blobs(data) <= broker.retained.keys()
    assert {digest(chunk) for chunk in split(data)} <= publisher._ledger.digests()


def test_waiting_orders_build_on_each_other(store, keys, boot):
    """Submitted while the publisher is down: numbered, signed and taken one after the other."""
    assert [release(store, keys, seed)[1].release for seed in (1, 2)] == [1, 2]
    plan(store, keys, 2)
    release(store, keys, 3, model="shuttle")
    plan(store, keys, 1, model="shuttle")
    publisher, link = boot()
    settle(publisher, link)
    assert publisher.counters["orders_taken"] == 5
    assert {path for path in store.load().targets() if path.startswith("plans/")} == {
        "plans/digits.plan", "plans/shuttle.plan"
    }  # fmt: skip


def test_release_named_by_a_live_plan_stays_with_its_parent(store, keys, boot):
    """Pruning keeps what nodes run and what they go back to."""
    publisher, link = boot()
    for number in (1, 2, 3):
        release(store, keys, number, parent=number - 1)
    plan(store, keys, 3)
    for number in (4, 5):
        release(store, keys, number, parent=number - 1)
    settle(publisher, link)
    assert publisher.counters["orders_refused"] == 0
    specs = {path for path in store.load().targets() if path.startswith("releases/")}
    assert specs == {"releases/digits/3.spec", "releases/digits/5.spec"}


@pytest.mark.parametrize("number", [2, 9])
def test_plan_for_a_release_that_is_not_here_is_refused(store, keys, number):
    """At submission already, where somebody reads the answer."""
    release(store, keys, 1)
    with pytest.raises(ModelError, match=f"release {number}"):
        plan(store, keys, number)


def test_unknown_model_and_odd_artefacts_are_refused(store, keys):
    """Before anything is signed."""
    with pytest.raises(ConfigError, match="no role"):
        submit_release(store, spec_of("mnist"), [b"x"], keys, NOW)
    with pytest.raises(ModelError, match="1 artefacts described, 2 files"):
        submit_release(store, spec_of(), [b"x", b"y"], keys, NOW)
    twice = spec_of()
    twice.artefacts.append(twice.artefacts[0])
    with pytest.raises(ModelError, match="two artefacts"):
        submit_release(store, twice, [b"x", b"y"], keys, NOW)
    assert not store.orders()


def forge(store, keys, files, *, role="model-digits", signer="model-digits", drop=()):
    version = parse_role(store.load().roles[role]).version + 1
    infos = {path: target_file(path, data) for path, data in files.items()}
    metadata = sign_role(keys.signers(signer), version, infos, NOW)
    kept = {digest(data): data for path, data in files.items() if path not in drop}
    store.submit(role, metadata, kept)
    [order] = store.orders()
    return order


def test_publisher_checks_orders_itself(store, keys, boot):
    """A submitter with a valid key still cannot publish what would not work."""
    data, spec = release(store, keys, 1)
    [honest] = store.orders()
    store.finish(honest)
    good = {"releases/digits/1.spec": encode(spec), spec.artefacts[0].path: data}
    wrong_chunks = ReleaseSpec()
    wrong_chunks.CopyFrom(spec)
    wrong_chunks.artefacts[0].chunks[0] = b"\0" * 32
    cases = [
        ({"signer": "rollout"}, good, "signed by"),
        ({"drop": [spec.artefacts[0].path]}, good, "not here"),
        ({}, {"releases/digits/1.spec": encode(spec)}, "not the artefact"),
        ({}, {"releases/digits/2.spec": encode(spec), spec.artefacts[0].path: data}, "holds release 1"),
        ({}, {**good, "releases/digits/1.spec": encode(wrong_chunks)}, "another file"),
        ({"role": "model-shuttle", "signer": "model-shuttle"}, {"releases/shuttle/1.spec": encode(spec)}, "holds"),
        ({"role": ROLLOUT, "signer": ROLLOUT}, {"plans/digits.plan": b"\xff"}, "RolloutPlan"),
        ({"role": ROLLOUT, "signer": ROLLOUT}, {"plans/digits.plan": encode(RolloutPlan(model="digits"))}, "not here"),
    ]
    publisher, link = boot()
    before = store.load()
    for options, files, message in cases:
        order = forge(store, keys, files, **options)
        with pytest.raises(Exception, match=message):
            checked_files(order, before, store, NOW)
        publisher.tick(1.0)
        assert not store.orders()
        assert message in (store.directory / "refused" / order.name / "reason").read_text()
    assert store.load() == before
    assert publisher.counters["orders_refused"] == len(cases)
    forge(store, keys, good)
    settle(publisher, link)
    assert publisher.counters["orders_taken"] == 1


def test_order_whose_file_was_exchanged_is_refused(store, keys, boot):
    """A queue is a directory: what lies in it is read again, not believed."""
    release(store, keys, 1)
    signed = plan(store, keys, 1)
    order = store.orders()[-1]
    other = RolloutPlan()
    other.CopyFrom(signed)
    other.share_permille = 999
    (order.directory / digest(encode(signed)).hex()).write_bytes(encode(other))
    publisher, link = boot()
    settle(publisher, link)
    assert publisher.counters["orders_refused"] == 1


def test_order_that_takes_away_a_live_release_is_refused(store, keys, boot):
    """Nodes are fetching it."""
    publisher, link = boot()
    release(store, keys, 1)
    plan(store, keys, 1)
    settle(publisher, link)
    with pytest.raises(TrustError, match="live plan"):
        checked_files(forge(store, keys, {}), store.load(), store, NOW)


def test_timestamp_is_renewed_before_it_expires(store, keys, broker, boot):
    """A cloud that releases nothing for a year still keeps late nodes converging."""
    publisher, link = boot()
    settle(publisher, link)
    old = broker.retained[topic(Route.TRUST_TIMESTAMP)]
    publisher, link = boot(now=NOW + dt.timedelta(days=12))
    settle(publisher, link)
    assert broker.retained[topic(Route.TRUST_TIMESTAMP)] != old
    assert complete(broker)


def test_second_publisher_on_a_store_is_refused(store, keys, broker, boot):
    """Two would sign two different files under one version."""
    boot()
    with pytest.raises(ConfigError, match="another publisher"):
        Publisher(Link(broker), store, keys, counters=Counter()).start()
    boot()


def test_store_is_created_once(store, keys):
    """A second init would strand every node that trusts the first root."""
    with pytest.raises(ConfigError, match="already"):
        store.create(first_generation(keys, ["digits"], NOW))


def test_publisher_without_a_store_says_what_to_do(tmp_path, keys, broker):
    """One readable line."""
    publisher = Publisher(Link(broker), ReleaseStore(tmp_path), keys, counters=Counter())
    with pytest.raises(ConfigError, match="create it first"):
        publisher.start()


# -- the budget -----------------------------------------------------------------------------------------------------

# Plans may go beyond the budget, and metadata has a new copy before the old one is cleared.
METADATA_BYTES = CHUNK_BYTES
# One release of 2.5 chunks fits beside metadata, two do not.
BUDGET = 4 * CHUNK_BYTES


def held_bytes(broker):
    return sum(map(len, broker.retained.values()))


def test_what_is_retained_is_what_the_publisher_says(store, keys, broker, boot):
    """To the byte, over releases that share chunks, plans and clearing."""
    publisher, link = boot()
    for number, seed in enumerate((1, 1, 2), 1):
        release(store, keys, seed, parent=number - 1)
        plan(store, keys, number)
        settle(publisher, link)
        assert publisher.retained() == {
            "retained_bytes": held_bytes(broker), "retained_budget_bytes": RETAINED_BUDGET_BYTES
        }  # fmt: skip


def test_release_over_the_budget_is_refused_and_changes_nothing(store, keys, broker, boot):
    """Nothing is signed, written or sent for it; the reason has the three numbers; plans go on."""
    publisher, link = boot(budget_bytes=BUDGET)
    release(store, keys, 1)
    plan(store, keys, 1)
    settle(publisher, link)
    present, before, held = publisher.retained()["retained_bytes"], store.load(), dict(broker.retained)
    files = sorted((store.directory / "files").iterdir())
    release(store, keys, 2, parent=1)
    [order] = store.orders()
    publisher.tick(10.0)
    assert not link.pending
    assert (store.load(), broker.retained, sorted((store.directory / "files").iterdir())) == (before, held, files)
    assert publisher._ledger.digests() == live_set(before, store).blobs.keys()
    assert not store.orders()
    reason = (store.directory / "refused" / order.name / "reason").read_text()
    assert f"{present} are" in reason
    assert f"at most {BUDGET} " in reason
    assert (publisher.counters["orders_refused"], publisher.counters["orders_over_budget"]) == (1, 1)
    plan(store, keys, 1)
    settle(publisher, link)
    assert publisher.counters["orders_taken"] == 3


def test_order_that_is_refused_for_something_else_is_not_counted_as_too_large(store, keys, boot):
    """The two counters tell an operator what to mend."""
    publisher, _ = boot()
    forge(store, keys, {"releases/digits/1.spec": b"\xff"})
    publisher.tick(1.0)
    assert (publisher.counters["orders_refused"], publisher.counters["orders_over_budget"]) == (1, 0)


def test_release_over_the_budget_is_refused_at_submission(store, keys, boot):
    """Somebody reads it there; what waits counts, what the release takes away does not."""
    data = random.Random(1).randbytes(int(2.5 * CHUNK_BYTES))
    for _ in range(2):  # no plan names the first, so the second takes its place
        submit_release(store, spec_of(), [data], keys, NOW, budget_bytes=BUDGET)
    plan(store, keys, 2)
    waiting = [order.name for order in store.orders()]
    other = random.Random(2).randbytes(int(2.5 * CHUNK_BYTES))
    with pytest.raises(OverBudgetError, match=f"release 3 of 'digits': .* at most {BUDGET} "):
        submit_release(store, spec_of(parent=2), [other], keys, NOW, budget_bytes=BUDGET)
    assert [order.name for order in store.orders()] == waiting


def test_release_waits_until_what_fills_its_room_is_cleared(store, keys, broker, boot):
    """A release that no plan names gives its room to the next, but only once the broker has let go of it."""
    publisher, link = boot(budget_bytes=BUDGET * 2)
    first, _ = release(store, keys, 1)
    settle(publisher, link)
    second, _ = release(store, keys, 2)
    publisher.tick(5.0)
    third, _ = release(store, keys, 3)
    publisher.tick(6.0)
    assert [order.role for order in store.orders()] == ["model-digits"]
    while link.pending:
        link.confirm()
    assert blobs(second) <= broker.retained.keys()
    assert not blobs(first) & broker.retained.keys()
    settle(publisher, link)
    assert blobs(third) <= broker.retained.keys()
    assert publisher.counters["orders_over_budget"] == 0


def test_plans_and_new_timestamps_need_no_room(store, keys, broker, boot):
    """A budget that was lowered to nothing stops neither a rollback nor the renewal of what runs."""
    publisher, link = boot()
    for number in (1, 2):
        release(store, keys, number, parent=number - 1)
        plan(store, keys, number)
    settle(publisher, link)
    publisher, link = boot(now=NOW + dt.timedelta(days=12), budget_bytes=1)
    back = RolloutPlan(model="digits", release=1, targets=["*"], share_permille=1000, rollout_id="back" * 99)
    submit_plan(store, back, keys, NOW)
    old = broker.retained[topic(Route.TRUST_TIMESTAMP)]
    settle(publisher, link)
    assert publisher.counters["orders_taken"] == 1
    assert broker.retained[topic(Route.TRUST_TIMESTAMP)] != old
    assert complete(broker)


# An example writes to disk some hundred times: to shrink one takes minutes.
@settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 12)), min_size=1, max_size=8),
    budget_chunks=st.integers(3, 12),
)
def test_broker_never_holds_more_than_the_budget_and_one_release(keys, steps, budget_chunks):
    """However fast orders come and however slowly the broker takes them; at the end within the budget."""
    budget, most, broker = budget_chunks * CHUNK_BYTES, 5 * CHUNK_BYTES, Broker()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        store = ReleaseStore(Path(directory) / "store")
        store.create(first_generation(keys, ["digits", "shuttle"], NOW))
        link = Link(broker)
        publisher = Publisher(link, store, keys, counters=Counter(), budget_bytes=budget, wall_clock=lambda: NOW)
        publisher.start()
        stack.callback(publisher.close)
        publisher.on_connect()
        now = 0.0
        for seed, (chunks, has_plan, confirmed) in enumerate(steps):
            _, spec = release(store, keys, seed, chunks=chunks)
            if has_plan:
                plan(store, keys, spec.release)
            publisher.tick(now := now + 1.0)
            for _ in range(min(confirmed, len(link.pending))):
                link.confirm()
                assert held_bytes(broker) <= budget + most + METADATA_BYTES
        for _ in range(2 * len(steps) + 2):  # every order may wait for a clearing
            while link.pending:
                link.confirm()
                assert held_bytes(broker) <= budget + most + METADATA_BYTES
            publisher.tick(now := now + 1.0)
        assert publisher.settled
        assert publisher.retained()["retained_bytes"] == held_bytes(broker)
        assert held_bytes(broker) <= budget + METADATA_BYTES
