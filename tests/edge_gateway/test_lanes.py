"""Models, workers and what waits: the gateway's lanes without a network."""

import threading
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from edge_gateway import lanes as lanes_module
from edge_gateway.cache import CacheConfig
from edge_gateway.inference import Scored, ServedModel
from edge_gateway.lanes import LaneConfig, Lanes, warm_up
from edge_gateway.requests import OpenRequest
from shoal.errors import ModelError
from shoal.routes import Address, Route
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import release_pb2
from shoal.v1.sensor_pb2 import Scalars, SensorData

PATIENCE_S = 10.0


class Runtime:
    """Answers its input; a closed gate holds calls, as a slow model would."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.calls = []
        self.threads = set()

    def run_all(self, inputs):
        self.threads.add(threading.current_thread())
        self.calls.append(len(inputs))
        assert self.gate.wait(PATIENCE_S)
        return [inputs]


def served(runtime, release=1, width=2):
    spec = release_pb2.ReleaseSpec(
        model="m",
        release=release,
        input=release_pb2.InputSchema(shape=[width], mean=[0.0], std=[1.0]),
        score=release_pb2.SCORE_KIND_UNCERTAINTY,
    )
    return ServedModel(spec, release_pb2.Artefact(threshold=0.4, sha256=bytes([release]) * 32), runtime)


class Bench:
    """Lanes of one model, and everything that came out of them."""

    def __init__(self, **settings):
        self.counters = Counter()
        self.woken = threading.Event()
        self.now = 0.0
        config = LaneConfig(**{"workers": 2, "cache": CacheConfig(max_bytes=0), **settings})
        self.lanes = Lanes(["m"], config, self.counters, wake=self.woken.set)
        self.done = []

    def serve(self, runtime, *, slow=False, **options):
        self.lanes.serve("m", served(runtime, **options))
        self.lanes._lanes["m"].is_slow = slow
        runtime.calls.clear()
        runtime.threads.clear()

    def ask(self, device, *seqs, width=2, **fields):
        rows = [
            pb.InferenceRow(reading=SensorData(seq=seq, scalars=Scalars(values=[float(seq), *[0.0] * (width - 1)])))
            for seq in seqs
        ]
        request = pb.InferenceRequest(device=device, epoch=b"e" * 16, model="m", rows=rows, **fields)
        opened = OpenRequest(request, Address(Route.INFER, site="s", node=device), self.now, self.done.append)
        self.lanes.admit(opened, request, request.ByteSize())
        return opened

    def run(self):
        """Take what is ready, as the gateway does."""
        taken = []
        for row, model, outcome in chain.from_iterable(self.lanes.run(self.now)):
            if isinstance(outcome, Scored):
                row.request.answer(row.place, pb.Answer(release=model.release, score=outcome.score), promised=False)
            else:
                row.request.refuse(row.place, pb.STATUS_INTERNAL, str(outcome))
            taken.append((row.request.device, row.seq, model.release))
        return taken

    def collect(self, count):
        """What comes back from workers, until so many rows have."""
        taken = self.run()
        while len(taken) < count:
            assert self.woken.wait(PATIENCE_S)
            self.woken.clear()
            taken += self.run()
        return taken


@pytest.fixture
def bench():
    made = []

    def make(**settings):
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for one in made:
        one.lanes.close()


def test_fast_model_runs_where_it_is_asked(bench):
    """Handing over would cost more."""
    gateway, runtime = bench(), Runtime()
    gateway.serve(runtime)
    gateway.ask("a", 1, 2)
    assert [seq for _, seq, _ in gateway.run()] == [1, 2]
    assert runtime.threads == {threading.current_thread()}
    assert len(gateway.done) == 1


def test_slow_model_leaves_the_loop_free(bench):
    """Batches run on as many threads as are allowed; what comes meanwhile gathers, and all of it is answered once."""
    gateway, runtime = bench(max_batch_size=2), Runtime()
    gateway.serve(runtime, slow=True)
    runtime.gate.clear()
    for seq in range(9):
        gateway.ask(f"d{seq}", seq)
    assert gateway.run() == []
    while len(runtime.calls) < 2:
        threading.Event().wait(0.001)
    assert gateway.run() == []
    assert runtime.calls == [2, 2]
    assert gateway.lanes.due_at() is None  # a worker wakes the loop
    runtime.gate.set()
    assert sorted(seq for _, seq, _ in gateway.collect(9)) == list(range(9))
    assert threading.current_thread() not in runtime.threads
    assert sorted(runtime.calls) == [1, 2, 2, 2, 2]


def test_swap_waits_for_nobody_and_disturbs_nobody(bench):
    """What runs finishes on its release, what waits runs on the next."""
    gateway, old, new = bench(max_batch_size=1, workers=1), Runtime(), Runtime()
    gateway.serve(old, slow=True)
    old.gate.clear()
    gateway.ask("a", 1)
    gateway.ask("b", 2)
    gateway.run()
    gateway.serve(new, release=2)
    old.gate.set()
    assert sorted(gateway.collect(2)) == [("a", 1, 1), ("b", 2, 2)]


def test_rows_of_another_shape_are_asked_again_after_a_swap(bench):
    """They were unpacked for the old release."""
    gateway = bench()
    gateway.serve(Runtime())
    narrow = gateway.ask("a", 1)
    gateway.serve(Runtime(), release=2, width=3)
    gateway.ask("b", 2, width=3)
    assert gateway.run() == [("b", 2, 2)]
    assert narrow.reply.rows[0].status == pb.STATUS_INTERNAL


def test_error_in_a_worker_that_is_ours_is_not_swallowed(bench):
    """It would be rows that nobody ever answers."""
    gateway, runtime = bench(), Runtime()
    gateway.serve(runtime, slow=True)
    runtime.run_all = lambda _inputs: 1 / 0
    gateway.ask("a", 1)
    with pytest.raises(ZeroDivisionError):
        gateway.collect(1)


def test_flood_of_one_device_is_refused_and_delays_nobody(bench):
    """Its rows beyond its share get a reply at once; another's run in the next batch."""
    gateway, runtime = bench(max_batch_size=4, max_waiting_per_device=10), Runtime()
    gateway.serve(runtime)
    flood = [gateway.ask("flooder", seq) for seq in range(100)]
    gateway.ask("quiet", 1)
    refused = [opened for opened in flood if opened.reply.rows[0].status == pb.STATUS_RESOURCE_EXHAUSTED]
    assert len(refused) == 90
    first_batch = gateway.run()[:4]
    assert ("quiet", 1, 1) in first_batch


def test_late_answer_only_rows_never_reach_the_model(bench):
    """Nobody waits for them; others of the batch run."""
    gateway, runtime = bench(), Runtime()
    gateway.serve(runtime)
    late = gateway.ask("a", 1, answer_only=True, answer_within_ms=10)
    gateway.ask("b", 2, answer_within_ms=10)
    gateway.now = 1.0
    assert [seq for _, seq, _ in gateway.run()] == [2]
    assert late.reply.rows[0].status == pb.STATUS_DEADLINE_EXCEEDED
    assert runtime.calls == [1]


def test_equal_inputs_run_once(bench):
    """The cache answers the others, also of other devices."""
    gateway, runtime = bench(cache=CacheConfig()), Runtime()
    gateway.serve(runtime)
    gateway.ask("a", 1)
    gateway.run()
    gateway.ask("b", 1)
    assert gateway.run() == [("b", 1, 1)]
    assert runtime.calls == [1]
    assert gateway.counters["cache.hits"] == 1


def test_known_input_neither_waits_nor_takes_a_place(bench):
    """It is answered before its company has come."""
    gateway, runtime = bench(cache=CacheConfig(), max_batch_size=2, max_delay_s=5.0), Runtime()
    gateway.serve(runtime)
    gateway.ask("a", 1, 2)
    gateway.run()
    gateway.ask("b", 1)
    gateway.ask("c", 3)
    assert gateway.run() == [("b", 1, 1)]
    assert runtime.calls == [2]


def test_rows_that_wait_for_company_are_not_forgotten_beside_a_busy_worker(bench):
    """A free worker takes them when they have waited long enough; the loop must be told when that is."""
    gateway, runtime = bench(max_batch_size=2, max_delay_s=5.0), Runtime()
    gateway.serve(runtime, slow=True)
    runtime.gate.clear()
    gateway.ask("a", 1, 2)
    gateway.run()
    gateway.now = 1.0
    gateway.ask("b", 3)
    gateway.run()
    assert gateway.lanes.due_at() == 6.0
    runtime.gate.set()


def test_time_and_size_are_measured(bench):
    """What the metrics show is what happened."""
    gateway = bench(max_delay_s=5.0)
    gateway.serve(Runtime())
    gateway.ask("a", 1, 2, 3)
    assert gateway.run() == []
    assert gateway.lanes.due_at() == 5.0
    gateway.now = 5.0
    gateway.run()
    seen = gateway.lanes.histograms
    assert (seen.batch_rows.count, seen.batch_rows.sum) == (1, 3)
    assert seen.queue_s.sum == 5.0
    assert seen.inference_s.count == 1
    assert gateway.counters["batches.waited"] == 1


def test_warm_up_runs_every_size_that_time_allows(monkeypatch):
    """The smallest and the largest always; the first real call of a size would pay for its arrays."""
    runtime = Runtime()
    warm_up(served(runtime), 5)
    assert set(runtime.calls) == {1, 2, 3, 4, 5}
    monkeypatch.setattr(lanes_module, "_WARM_UP_S", -1.0)
    runtime.calls.clear()
    assert warm_up(served(runtime), 5) < PATIENCE_S
    assert runtime.calls == [1, 5]


def test_model_that_fails_on_zeros_is_not_swapped_in(bench):
    """The one that serves goes on."""
    gateway, broken = bench(), Runtime()
    gateway.serve(Runtime())

    def fail(_inputs):
        raise ModelError("broken")

    broken.run_all = fail
    with pytest.raises(ModelError, match="broken"):
        gateway.lanes.serve("m", served(broken, release=2))
    gateway.ask("a", 1)
    assert gateway.run() == [("a", 1, 1)]


def test_speed_decides_where_a_model_runs(monkeypatch):
    """Measured when it is swapped in."""
    lanes = Lanes(["m"], LaneConfig(workers=1), Counter(), wake=lambda: None)
    for slow_s, expected in ((-1.0, True), (PATIENCE_S, False)):
        monkeypatch.setattr(lanes_module, "SLOW_S", slow_s)
        lanes.serve("m", served(Runtime()))
        assert lanes._lanes["m"].is_slow is expected
    lanes.close()


def test_zeros_are_of_the_models_shape():
    """A release whose schema is not its model's fails here, not under traffic."""
    shapes = []

    class Seeing(Runtime):
        def run_all(self, inputs):
            shapes.append(inputs.shape)
            return [np.zeros((len(inputs), 1), np.float32)]

    warm_up(served(Seeing(), width=7), 1)
    assert set(shapes) == {(1, 7)}
