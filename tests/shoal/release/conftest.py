"""An in-memory broker and cloud: real publisher, real TUF, real clients, no sockets."""

import datetime as dt
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, first_generation
from shoal.codec import encode
from shoal.errors import LinkError, ShoalError
from shoal.inbox import Inbox
from shoal.link_config import node_identity
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.probation import Baseline, Watch
from shoal.release.selftest import Outcome, Verdict, run_golden
from shoal.release.trust import TrustStore, model_role
from shoal.routes import ROUTES, Route, topic, topic_filter
from shoal.tensors import to_tensor
from shoal.v1.release_pb2 import Artefact, GoldenVectors, ModelFormat, ReleaseSpec, RolloutPlan, Tier, TrustBundle

NOW = dt.datetime(2026, 11, 20, 12, tzinfo=dt.UTC)
MODEL = "digits"


class MemoryBroker:
    """Retained messages by topic, delivered in order when `run` is called."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.links: list[MemoryLink] = []
        self.published: list[tuple[str, bytes]] = []
        self.work: deque[Callable[[], None]] = deque()

    def link(self, window: int = 20) -> "MemoryLink":
        link = MemoryLink(self, window)
        self.links.append(link)
        return link

    def accept(self, name: str, payload: bytes) -> None:
        self.published.append((name, payload))
        self.retained[name] = payload
        if not payload:
            del self.retained[name]
        for link in self.links:
            link.deliver(name, payload, retained=False)

    def run(self) -> None:
        while self.work:
            self.work.popleft()()

    def blob(self, sha256: bytes) -> str:
        return topic(Route.BLOB, sha256=sha256.hex())

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle.FromString(self.retained[topic(Route.TRUST_BUNDLE)])


class MemoryLink:
    """The part of a link that releases use."""

    def __init__(self, broker: MemoryBroker, window: int) -> None:
        self.connected = True
        self.broker = broker
        self.window = window
        self.subscribed: set[str] = set()
        self.most_subscribed = 0
        self.counters: Counter[str] = Counter()
        self.inbox = Inbox(self.counters)
        self.refuse_publishes = False
        self._pending = 0

    def subscribe(self, route, handler, *, group=None, ack_late=False, **segments) -> None:
        self.inbox.register(route, handler, ack_late=ack_late)
        name = topic_filter(route, group=group, **segments)
        assert "+" not in name
        self.subscribed.add(name)
        self.most_subscribed = max(self.most_subscribed, len(self.subscribed))
        if name in self.broker.retained:
            self.deliver(name, self.broker.retained[name], retained=True)

    def unsubscribe(self, route, *, group=None, **segments) -> None:
        self.subscribed.discard(topic_filter(route, group=group, **segments))

    def deliver(self, name: str, payload: bytes, *, retained: bool) -> None:
        def arrive() -> None:
            if name in self.subscribed and self.connected:
                self.inbox.receive(name, payload, retained=retained, ack=lambda: None)

        self.broker.work.append(arrive)

    def publish(self, route, message, *, on_done=None, **segments) -> bool:
        if not self.connected or self._pending >= self.window:
            return False
        assert ROUTES[route].retain
        payload = message if isinstance(message, bytes) else encode(message)
        self._pending += 1
        self.broker.work.append(partial(self._arrive, topic(route, **segments), payload, on_done))
        return True

    def _arrive(self, name: str, payload: bytes, on_done) -> None:
        self._pending -= 1
        if not self.connected:
            on_done(LinkError("gone"))
        elif self.refuse_publishes:
            on_done(LinkError("not authorized"))
        else:
            self.broker.accept(name, payload)
            on_done(None)


class NodeLink(MemoryLink):
    """The part of a link that a whole device or gateway uses; what it publishes is kept, and taken at once."""

    def __init__(self, broker: MemoryBroker, node: str, role: str) -> None:
        super().__init__(broker, window=20)
        self.identity = node_identity("plant", node, role)
        self.sent: list = []
        self.is_idle = True
        broker.links.append(self)

    def on_connect(self, hook) -> None:
        pass

    def on_bad(self, route, hook) -> None:
        self.inbox.on_bad(route, hook)

    def on_arrival(self, route, hook) -> None:
        self.inbox.on_arrival(route, hook)

    def handle(self, delivery) -> None:
        self.inbox.handle(delivery)

    def flush(self) -> None:
        """What is published has arrived already."""

    def room(self) -> int:
        return self.window

    def publish(self, route, message, *, on_done=None, **_addressing) -> bool:
        encode(message)
        self.sent.append((route, message))
        if on_done is not None:
            on_done(None)
        return True

    def last(self, route):
        """The newest message on a route."""
        return next(message for sent, message in reversed(self.sent) if sent is route)


class InlineSelfTest:
    """Runs golden vectors in this process, in the runtime that `load` loads."""

    def __init__(self, load) -> None:
        self.load = load

    def start(self, path: Path, artefact: Artefact, _now: float) -> "SettledTrial":
        run_golden(self.load(path), artefact)
        return SettledTrial(Verdict(Outcome.PASSED))


class SettledTrial:
    def __init__(self, verdict: Verdict | None) -> None:
        self.verdict = verdict

    def poll(self, _now: float) -> Verdict | None:
        return self.verdict

    def cancel(self) -> None:
        pass


class ScriptedSelfTest:
    """Fails `poison`, never ends on `hang`, passes the rest; keeps the files that it saw."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def start(self, path: Path, _artefact: Artefact, _now: float) -> SettledTrial:
        data = path.read_bytes()
        self.seen.append(data)
        if b"hang" in data:
            return SettledTrial(None)
        outcome = Outcome.FAILED if b"poison" in data else Outcome.PASSED
        return SettledTrial(Verdict(outcome, "" if outcome is Outcome.PASSED else "golden vector 0: off by 3"))


class Cloud:
    """Keys, store and publisher of one cloud, on one memory broker."""

    def __init__(self, directory: Path, broker: MemoryBroker, models: tuple[str, ...] = (MODEL,)) -> None:
        self.broker = broker
        self.now = NOW
        self.keys = FileKeyStore(directory / "keys")
        for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, *map(model_role, models)):
            self.keys.create(role)
        self.store = ReleaseStore(directory / "store")
        self.store.create(first_generation(self.keys, models, self.now))
        self.ticks = 0.0
        self.boot()

    def boot(self, window: int = 20) -> None:
        """Start the publisher (again), on a new connection."""
        self.link = self.broker.link(window)
        self.publisher = Publisher(self.link, self.store, self.keys, counters=Counter(), wall_clock=lambda: self.now)
        self.publisher.start()
        self.publisher.on_connect()

    def release(self, data: bytes, model: str = MODEL, parent: int = 0, tier: Tier = Tier.TIER_DEVICE) -> ReleaseSpec:
        return submit_release(self.store, spec_for(model, parent, tier), [data], self.keys, self.now)

    def plan(self, release: int, model: str = MODEL, targets: tuple[str, ...] = ("*",), share: int = 1000) -> None:
        plan = RolloutPlan(rollout_id=f"r{release}", model=model, release=release, share_permille=share)
        plan.targets.extend(targets)
        submit_plan(self.store, plan, self.keys, self.now)

    def wall_s(self) -> float:
        return self.now.timestamp()

    def settle(self) -> None:
        for _ in range(20):
            self.ticks += 10.0
            self.publisher.tick(self.ticks)
            self.broker.run()
        assert self.publisher.settled

    def ship(self, data: bytes, parent: int = 0, spec: ReleaseSpec | None = None) -> ReleaseSpec:
        """Release, plan for all, publish."""
        spec = spec or spec_for(MODEL, parent, Tier.TIER_DEVICE)
        spec = submit_release(self.store, spec, [data], self.keys, self.now)
        self.plan(spec.release)
        self.settle()
        return spec


def spec_for(model: str, parent: int, tier: Tier) -> ReleaseSpec:
    vector = to_tensor(np.ones((2, 3), dtype=np.float32))
    golden = GoldenVectors(inputs=vector, outputs=vector, tolerance=0.1)
    artefact = Artefact(tier=tier, format=ModelFormat.MODEL_FORMAT_TFLITE, golden=golden, threshold=0.5)
    return ReleaseSpec(model=model, parent=parent, artefacts=[artefact], metrics_ppm={"accuracy": 990_000})


class InlineDisk(Executor):
    """Does the disk's work at once, so that time stays simulated."""

    def submit(self, fn, /, *args, **kwargs):
        done = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except (OSError, ShoalError) as exc:
            done.set_exception(exc)
        return done


class Node:
    """A node with its update client; `active` is what it was told to run, `watch` what it sees of that, if at all."""

    def __init__(self, directory: Path, broker: MemoryBroker, root: bytes, *, name: str, clock) -> None:
        self.directory = directory
        self.broker = broker
        self.root = root
        self.name = name
        self.clock = clock
        self.active: list[tuple[int, bytes]] = []
        self.refuse: set[bytes] = set()
        self.baseline: Baseline | None = None
        self.watch: Watch | None = None
        self.self_test = ScriptedSelfTest()
        self.disk: Executor = InlineDisk()
        self.now = 0.0
        self.boot()

    def boot(self, *, connected: bool = True) -> None:
        self.link = self.broker.link()
        self.link.connected = connected
        self.counters: Counter[str] = Counter()
        self.client = UpdateClient(
            self.link,
            TrustStore(self.directory / "trust", self.root, clock=self.clock),
            self.directory / "models",
            [NodeModel(MODEL, Tier.TIER_DEVICE, "toy 1.0")],
            node=self.name,
            self_test=self.self_test,
            activate=self.activate,
            deactivate=self.deactivate,
            find_watch=lambda _: self.watch,
            rng=random.Random(5),
            counters=self.counters,
            disk=self.disk,
        )
        self.client.start()

    def activate(self, _model: str, spec: ReleaseSpec, path: Path) -> None:
        data = path.read_bytes()
        if data in self.refuse:
            raise OSError("no such operator")
        self.active.append((spec.release, data))
        self.watch = None if self.baseline is None else Watch(self.baseline)

    def deactivate(self, _model: str) -> None:
        self.active.append((0, b""))
        self.watch = None

    def run(self, seconds: float = 5.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.client.tick(self.now)
            self.broker.run()

    @property
    def state(self):
        return self.client.state()[0]


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def cloud(tmp_path: Path, broker: MemoryBroker) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud", broker)
    yield made
    made.publisher.close()


@pytest.fixture
def make_node(tmp_path: Path, broker: MemoryBroker, cloud: Cloud) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(name: str = "cam-1") -> Node:
        node = Node(tmp_path / name, broker, cloud.store.root(), name=name, clock=cloud.wall_s)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.client.close()
