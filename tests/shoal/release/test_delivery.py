"""From a submitted release to a running model, through the real publisher, trust, transfer and slots, in memory."""

import random
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from threading import Event

import pytest

from shoal.release import installer
from shoal.release.chunks import CHUNK_BYTES, digest, split
from shoal.release.plan import cohort
from shoal.release.selftest import Outcome, Verdict
from shoal.release.slot_store import SlotStore
from shoal.routes import Route, topic
from shoal.v1.node_pb2 import SlotPhase

pytestmark = pytest.mark.device


class SettledTrial:
    def __init__(self, verdict: Verdict | None) -> None:
        self.verdict = verdict

    def poll(self, _now: float) -> Verdict | None:
        return self.verdict

    def cancel(self) -> None:
        pass


def model_bytes(seed: int, chunks: float = 3.5) -> bytes:
    return random.Random(seed).randbytes(int(CHUNK_BYTES * chunks))


def test_release_reaches_a_node_and_is_confirmed(cloud, make_node):
    """The whole way: submit, publish, verify, fetch, test, activate, confirm."""
    data = model_bytes(1)
    cloud.ship(data)
    node = make_node()
    node.run()
    assert node.active == [(1, data)]
    assert (node.state.release, node.state.phase) == (1, SlotPhase.SLOT_PHASE_PROBATION)
    assert node.state.runtime == "toy 1.0"
    node.run(15)
    assert node.state.phase == SlotPhase.SLOT_PHASE_CONFIRMED
    assert node.state.sha256 == digest(data)


def test_second_release_replaces_the_first_at_once(cloud, make_node):
    """A node that listens follows each plan; blobs of what nothing names are cleared, the parent's stay."""
    node = make_node()
    blobs = {}
    for number in (1, 2, 3):
        data = model_bytes(number)
        blobs[number] = {cloud.broker.blob(digest(chunk)) for chunk in split(data)}
        cloud.ship(data, parent=number - 1)
        node.run(20)
        assert node.active[-1] == (number, data)
    assert blobs[3] <= cloud.broker.retained.keys()
    assert blobs[2] <= cloud.broker.retained.keys()
    assert cloud.broker.retained.keys() & blobs[1] == blobs[1]  # release 3's order could not know that 3 will be live
    cloud.ship(model_bytes(4), parent=3)
    assert not cloud.broker.retained.keys() & blobs[1]


def test_late_node_converges_with_every_cloud_process_gone(cloud, make_node):
    """Retained messages alone are enough."""
    data = model_bytes(1)
    cloud.ship(data)
    cloud.link.connected = False
    node = make_node("late")
    node.run()
    assert node.active == [(1, data)]


def test_restart_activates_from_disk_without_network(cloud, make_node):
    """What was confirmed runs again with no broker in sight."""
    data = model_bytes(1)
    cloud.ship(data)
    node = make_node()
    node.run(20)
    node.boot(connected=False)
    assert node.active == [(1, data), (1, data)]


def test_disk_that_fails_at_start_is_tried_again(cloud, make_node, monkeypatch):
    """A node whose store cannot be opened goes on, and catches up when the disk comes back."""
    data = model_bytes(1)
    cloud.ship(data)
    whole = SlotStore.open

    def broken(_self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(SlotStore, "open", broken)
    node = make_node()
    node.run()
    assert not node.active
    monkeypatch.setattr(SlotStore, "open", whole)
    node.run(200)
    assert node.active == [(1, data)]


def test_interrupted_transfer_resumes_with_just_the_missing_chunks(cloud, make_node):
    """After a cut and a restart only what was not here is fetched."""
    data = model_bytes(1, chunks=40)
    missing = cloud.broker.blob(digest(split(data)[30]))
    cloud.ship(data)
    withheld = cloud.broker.retained.pop(missing)
    node = make_node()
    node.run()
    assert not node.active
    node.client.close()
    node.boot()
    cloud.broker.retained[missing] = withheld
    node.run()
    assert node.active == [(1, data)]
    metadata = len(cloud.broker.bundle.entries)
    assert node.counters["blobs_fetched"] == metadata + 1


def test_damaged_staging_is_fetched_again(cloud, make_node):
    """A staging file that lost bytes in a power cut costs its damaged chunks, no more."""
    data = model_bytes(1, chunks=10)
    missing = cloud.broker.blob(digest(split(data)[9]))
    cloud.ship(data)
    withheld = cloud.broker.retained.pop(missing)
    node = make_node()
    node.run()
    node.client.close()
    [staged] = (node.directory / "models" / "digits" / "staging").iterdir()
    staged.write_bytes(staged.read_bytes()[: 4 * CHUNK_BYTES + 7])
    cloud.broker.retained[missing] = withheld
    node.boot()
    node.run()
    assert node.active == [(1, data)]
    assert node.counters["blobs_fetched"] == len(cloud.broker.bundle.entries) + 6


def test_failing_self_test_keeps_the_old_model_for_ever(cloud, make_node):
    """The digest is block-listed, the reason is told, and nothing is fetched or tried twice."""
    good = model_bytes(1)
    cloud.ship(good)
    node = make_node()
    node.run(20)
    cloud.ship(b"poison" + model_bytes(2), parent=1)
    node.run(20)
    assert node.active == [(1, good)]
    assert node.state.refused_release == 2
    assert "golden vector" in node.state.refused_reason
    tests = len(node.self_test.seen)
    node.boot()
    node.run(20)
    assert len(node.self_test.seen) == tests
    assert node.state.release == 1
    specs = sum(entry.path.startswith("releases/") for entry in cloud.broker.bundle.entries)
    assert node.counters["blobs_fetched"] == len(cloud.broker.bundle.entries) - specs


def test_refused_bytes_under_another_release_are_refused_untested(cloud, make_node):
    """A new number makes no better model."""
    poison = b"poison" + model_bytes(2)
    cloud.ship(model_bytes(1))
    node = make_node()
    node.run(20)
    for parent in (1, 2):
        cloud.ship(poison, parent=parent)
        node.run(20)
    assert node.self_test.seen.count(poison) == 1
    assert node.state.refused_release == 3
    assert "refused before" in node.state.refused_reason


def test_self_test_that_kills_the_agent_runs_out_of_tries(cloud, make_node):
    """The try is on disk before the test starts, and a restart does not bring it back."""
    hang = b"hang" + model_bytes(2)
    cloud.ship(model_bytes(1))
    node = make_node()
    node.run(20)
    cloud.ship(hang, parent=1)
    for _ in range(6):
        node.run(5)
        node.boot()
    node.run(5)
    assert node.self_test.seen.count(hang) == 3
    assert node.state.refused_release == 2
    assert node.state.release == 1


def test_newer_plan_waits_for_the_end_of_probation(cloud, make_node):
    """The way back is not overwritten; the newer release follows once the running one is confirmed."""
    node = make_node()
    for number in (1, 2):
        cloud.ship(model_bytes(number), parent=number - 1)
        node.run(20 if number == 1 else 3)
    cloud.ship(model_bytes(3), parent=2)
    node.run(4)
    assert node.active[-1] == (2, model_bytes(2))
    node.client.fail("digits", "worse")
    assert node.active[-1] == (1, model_bytes(1))
    node.run(20)
    assert node.active[-1] == (3, model_bytes(3))


def test_running_model_refused_while_its_twin_is_tested(cloud, make_node):
    """The same bytes under a second release are under test when the node finds them unfit."""
    data = model_bytes(1)
    cloud.ship(data)
    node = make_node()
    node.run(20)
    assert node.state.phase == SlotPhase.SLOT_PHASE_CONFIRMED
    trial = SettledTrial(None)
    node.self_test.start = lambda _path, _artefact, _now: trial
    cloud.ship(data, parent=1)
    node.run(5)
    node.client.fail("digits", "unfit")
    trial.verdict = Verdict(Outcome.PASSED)
    node.run(20)
    assert node.active == [(1, data), (0, b"")]
    assert node.state.refused_reason == "unfit"


def test_spec_index_that_leads_nowhere_is_replaced_by_a_better_one(cloud, make_node):
    """The bundle is not signed: chunk lists that make another file are dropped with the bundle that held them."""
    data = model_bytes(1)
    cloud.ship(data)
    name = topic(Route.TRUST_BUNDLE)
    good, bundle = cloud.broker.retained[name], cloud.broker.bundle
    for entry in bundle.entries:
        if entry.path.startswith("releases/"):
            entry.length_bytes += 1
    cloud.broker.retained[name] = bundle.SerializeToString()
    node = make_node()
    node.run()
    assert not node.active
    cloud.broker.accept(name, good)
    node.run()
    assert node.active == [(1, data)]


def test_failing_activation_goes_back(cloud, make_node):
    """A model that passes its vectors and cannot be served is refused, and the old one is activated again."""
    good, bad = model_bytes(1), model_bytes(2)
    cloud.ship(good)
    node = make_node()
    node.run(20)
    node.refuse.add(bad)
    cloud.ship(bad, parent=1)
    node.run(20)
    assert node.active == [(1, good), (1, good)]
    assert node.state.release == 1
    assert "no such operator" in node.state.refused_reason


def test_node_may_refuse_its_running_model(cloud, make_node):
    """Probation: the node says that the new model is unfit, and the last one returns."""
    good, bad = model_bytes(1), model_bytes(2)
    cloud.ship(good)
    node = make_node()
    node.run(20)
    cloud.ship(bad, parent=1)
    node.run(3)
    assert node.active[-1] == (2, bad)
    node.client.fail("digits", "scores are all alike")
    assert node.active[-1] == (1, good)
    node.run(20)
    assert node.active[-1] == (1, good)


def test_crash_loop_on_probation_ends(cloud, make_node):
    """A model that kills the agent at each start runs out of tries."""
    good, bad = model_bytes(1), model_bytes(2)
    cloud.ship(good)
    node = make_node()
    node.run(20)
    cloud.ship(bad, parent=1)
    node.run(3)
    for _ in range(2):
        node.boot(connected=False)
        assert node.active[-1] == (2, bad)
    node.boot(connected=False)
    assert node.active[-1] == (1, good)
    assert "probation" in node.state.refused_reason


def test_plan_back_to_the_parent_needs_no_transfer(cloud, make_node):
    """Rolling back is a switch of slots."""
    old, new = model_bytes(1), model_bytes(2)
    cloud.ship(old)
    node = make_node()
    node.run(20)
    cloud.ship(new, parent=1)
    node.run(20)
    before = node.counters["blobs_fetched"]
    cloud.plan(1)
    cloud.settle()
    node.run(20)
    assert node.active[-1] == (1, old)
    assert node.counters["blobs_fetched"] - before <= 5  # metadata and the plan


def test_share_and_pattern_decide_who_follows(cloud, make_node):
    """A staged plan reaches exactly its cohort."""
    names = [f"cam-{number}" for number in range(6)] + ["door-1"]
    nodes = {name: make_node(name) for name in names}
    data = model_bytes(1, 0.1)
    cloud.release(data)
    cloud.plan(1, targets=("cam-*",), share=400)
    cloud.settle()
    for node in nodes.values():
        node.run()
    expected = {name for name in names if name.startswith("cam") and cohort("r1", name) < 400}
    assert 0 < len(expected) < 6
    assert {name for name, node in nodes.items() if node.active} == expected


def test_damaged_model_file_is_never_run(cloud, make_node):
    """Bytes on disk are hashed before every start; the model is fetched again."""
    data = model_bytes(1)
    cloud.ship(data)
    node = make_node()
    node.run(20)
    path = node.directory / "models" / "digits" / "files" / digest(data).hex()
    path.write_bytes(data[:-1] + b"\0")
    node.boot()
    assert len(node.active) == 1
    node.run(20)
    assert node.active == [(1, data), (1, data)]


def test_windows_never_exceed_sixteen_topics(cloud, make_node):
    """More would lose retained messages on real brokers."""
    cloud.ship(model_bytes(1, chunks=60))
    node = make_node()
    node.run()
    assert node.active
    assert node.link.most_subscribed == 16 + 2  # and the two trust topics


def test_publisher_clearing_a_blob_mid_transfer_is_no_chunk(cloud, make_node):
    """An empty payload is the topic being cleared, not a bad chunk."""
    data = model_bytes(1)
    cloud.ship(data)
    name = cloud.broker.blob(digest(split(data)[0]))
    payload = cloud.broker.retained.pop(name)
    node = make_node()
    node.run(2)
    node.link.deliver(name, b"", retained=False)
    node.run(1)
    assert node.counters["blobs_bad"] == 0
    cloud.broker.retained[name] = payload
    node.run(20)
    assert node.active == [(1, data)]


class SlowDisk(Executor):
    """A card that takes its time: work is done, in a thread, once `go` is set."""

    def __init__(self) -> None:
        self.go = Event()
        self.jobs: list[Future] = []
        self._thread = ThreadPoolExecutor(1)

    def submit(self, fn, /, *args, **kwargs):
        def work():
            assert self.go.wait(30)
            return fn(*args, **kwargs)

        self.jobs.append(self._thread.submit(work))
        return self.jobs[-1]

    def finish(self) -> None:
        self.go.set()
        for job in self.jobs:
            job.exception(30)
        self._thread.shutdown()


@pytest.fixture
def slow_disk():
    disk = SlowDisk()
    yield disk
    disk.finish()


def test_loop_goes_on_while_the_disk_takes_its_time(cloud, make_node, slow_disk):
    """A node answers with what it has until the new artefact is durable, however long that takes."""
    node = make_node()
    cloud.ship(model_bytes(1))
    node.run()
    node.disk = slow_disk
    node.client.close()
    node.boot()
    cloud.ship(model_bytes(2), parent=1)
    node.run(60)
    assert [release for release, _ in node.active] == [1, 1]
    slow_disk.finish()
    node.run(5)
    assert node.active[-1] == (2, model_bytes(2))


def test_model_refused_while_the_disk_works_does_not_take_the_new_one_along(cloud, make_node, slow_disk):
    """Saving a state sweeps what no state names, but not what is just being admitted."""
    node = make_node()
    cloud.ship(model_bytes(1))
    node.run(15)
    node.disk = slow_disk
    node.client.close()
    node.boot()
    cloud.ship(model_bytes(2), parent=1)
    node.run(5)
    assert len(slow_disk.jobs) == 1
    slow_disk.finish()
    node.client.fail("digits", "it answers nonsense")
    node.run(15)
    assert node.active[-1] == (2, model_bytes(2))
    assert node.counters["blobs_fetched"] < 20  # its chunks came once


def test_plan_withdrawn_while_the_disk_works_waits_for_it(cloud, make_node, slow_disk, monkeypatch):
    """A newer plan closes files only when the thread that uses them is done."""

    def wait_for(jobs):
        slow_disk.go.set()
        return wait(jobs)

    monkeypatch.setattr(installer, "wait", wait_for)
    node = make_node()
    node.disk = slow_disk
    node.client.close()
    node.boot()
    cloud.ship(model_bytes(1))
    node.run(5)
    assert [job.done() for job in slow_disk.jobs] == [False]
    cloud.ship(model_bytes(2), parent=1)
    for _ in range(20):
        node.run(0.5)
        if slow_disk.go.is_set():
            for job in slow_disk.jobs:
                job.result(30)
    assert node.active == [(2, model_bytes(2))]
