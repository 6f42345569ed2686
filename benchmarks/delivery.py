"""How long a release takes to reach a fleet, and what it costs the broker.

    python benchmarks/delivery.py --devices 500 --model-bytes 1000000

Over Mosquitto on loopback: one publisher, and all devices in one process on one loop, each with its own session, trust,
staging and slots on disk. Four kinds of run, one after the other on the same retained set:

  bare      paho clients that subscribe to the same topics and read them: no verification, no disk
  release   update clients: TUF, chunks by exact topic in windows of 16, digests, fsync, self-test, activation
  stalled   the same, but every tenth device stops reading once it has asked
  cut       the same, but each device's connection is cut once, at a random chunk

`time_ratio` is fetch, verification and fsync of `release` over `bare`, each the best of five, in turn. TUF refresh and self-test are left out of it and reported apart, a node each: in this process they queue for
one core, on a fleet every node has its own. The self-test runs in this process; a device starts a child for it. Of what
is left, `fsync_ms` a node is the wait for one disk that all nodes share here; it is part of `time_ratio`.

As much memory as the runs will write files into is touched once before them: on a virtual machine the first touch of a
page takes several times as long as writing to it later, and whichever run came to it first would pay.
"""

import argparse
import json
import mmap
import os
import platform
import random
import selectors
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from cloud.keys import FileKeyStore
from cloud.publisher import Publisher, live_set
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, first_generation
from fleet_console.broker import BrokerKind, find_mosquitto, start_broker
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.release.chunks import split
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import Outcome, Verdict, run_golden
from shoal.release.trust import TrustStore, model_role
from shoal.routes import Route, topic
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb

MODEL = "bench"
PATIENCE_S = 300.0
SEED = 7
# As often as a gateway does.
TICK_S = 0.05
ROUNDS = 5
# Those of `release`, one of `stalled` and one of `cut`.
RUNS = ROUNDS + 2
PAGE_BYTES = 4096


class Multiplier:
    """The model: random bytes whose sum multiplies the input, so that every byte matters to the golden vectors."""

    def __init__(self, data):
        self._factor = np.frombuffer(data, dtype=np.uint8).sum(dtype=np.int64) % 97

    def run(self, inputs):
        return (inputs * self._factor).astype(np.float32)


class TimedSelfTest:
    """Runs golden vectors here and keeps the time they take."""

    def __init__(self, spent):
        self._spent = spent

    def start(self, path, artefact, _now):
        started = time.perf_counter()
        run_golden(Multiplier(path.read_bytes()), artefact)
        self._spent["selftest"] += time.perf_counter() - started
        return Passed()


class Passed:
    def poll(self, _now):
        return Verdict(Outcome.PASSED)

    def cancel(self):
        pass


class TimedTrust(TrustStore):
    """The real store, with a stop-watch."""

    spent: Counter

    def refresh(self, *arguments):
        started, synced = time.perf_counter(), self.spent["fsync"]
        try:
            return super().refresh(*arguments)
        finally:
            self.spent["refresh"] += time.perf_counter() - started
            self.spent["refreshes"] += 1
            self.spent["refresh_fsync"] += self.spent["fsync"] - synced


@contextmanager
def timed_fsync(spent):
    """Count every fsync of this process and the seconds in it."""
    real = os.fsync

    def fsync(handle):
        started = time.perf_counter()
        try:
            real(handle)
        finally:
            spent["fsync"] += time.perf_counter() - started
            spent["fsyncs"] += 1

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real


class Cloud:
    """Keys, store and a publisher on a loop of its own thread."""

    def __init__(self, folder, url):
        self.keys = FileKeyStore(folder / "keys")
        for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role(MODEL)):
            self.keys.create(role)
        self.store = ReleaseStore(folder / "store")
        self.store.create(first_generation(self.keys, [MODEL], datetime.now(UTC)))
        self._url = url

    def ship(self, release, data):
        """Publish one release to everybody and wait until the broker has confirmed all of it."""
        inputs = np.arange(4, dtype=np.float32).reshape(4, 1)
        golden = pb.GoldenVectors(
            inputs=to_tensor(inputs), outputs=to_tensor(Multiplier(data).run(inputs)), tolerance=0
        )
        artefact = pb.Artefact(tier=pb.TIER_DEVICE, format=pb.MODEL_FORMAT_TFLITE, golden=golden)
        schema = pb.InputSchema(shape=[1], mean=[0.0], std=[1.0])
        spec = pb.ReleaseSpec(model=MODEL, parent=release - 1, input=schema, score=1, artefacts=[artefact])
        now = datetime.now(UTC)
        submit_release(self.store, spec, [data], self.keys, now)
        plan = pb.RolloutPlan(
            rollout_id=f"r{release}", model=MODEL, release=release, targets=["*"], share_permille=1000
        )
        submit_plan(self.store, plan, self.keys, now)
        self._publish()

    def topics(self):
        """Every topic that a node reads on its way to the release; all that is published is for all of them."""
        blobs = [topic(Route.BLOB, sha256=item.hex()) for item in live_set(self.store.load(), self.store).blobs]
        return [topic(Route.TRUST_BUNDLE), topic(Route.TRUST_TIMESTAMP), *blobs]

    def _publish(self):
        loop = Loop()
        link = Link(parse_broker_url(self._url, session_expiry_s=0), service_identity("publisher"))
        publisher = Publisher(link, self.store, self.keys, counters=Counter())
        publisher.start()
        link.on_connect(publisher.on_connect)
        link.attach(loop)
        loop.call_every(0.05, publisher.tick)
        deadline = loop.clock() + PATIENCE_S
        loop.run(until=lambda: (link.connected and publisher.settled) or loop.clock() > deadline)
        publisher.close()
        link.close()
        loop.close()


class Fleet:
    """Update clients on one loop. `mode` is release, stalled or cut."""

    def __init__(self, folder, url, root, devices, mode, chunks):
        self.spent = Counter()
        self.counters = Counter()
        self.active = Counter()
        self.mode = mode
        self._loop = Loop()
        self._disk = ThreadPoolExecutor(1)
        self._rng = random.Random(SEED)
        self._stalled = set()
        self._cut_at = {}
        self.members = [self._member(folder, url, root, index, chunks) for index in range(devices)]
        self.expected = devices - len(self._stalled)

    def _member(self, folder, url, root, index, chunks):
        node = f"dev-{index:04d}"
        link = Link(parse_broker_url(url, session_expiry_s=0), node_identity("bench", node, "device"))
        trust = TimedTrust(folder / node / "trust", root)
        trust.spent = self.spent
        client = UpdateClient(
            link,
            trust,
            folder / node / "models",
            [NodeModel(MODEL, pb.TIER_DEVICE, "bench")],
            node=node,
            self_test=TimedSelfTest(self.spent),
            activate=lambda _model, spec, _path: self.active.update([spec.release]),
            rng=random.Random(index),
            counters=self.counters,
            refresh_jitter_s=0.0,
            disk=self._disk,
        )
        client.start()
        if self.mode == "stalled" and index % 10 == 9:
            self._stalled.add(index)
        if self.mode == "cut":
            self._cut_at[index] = self._rng.randrange(1, chunks)
        return link, client

    def run(self, release):
        """Serve until everybody who reads has activated `release`; return seconds."""
        for link, _ in self.members:
            link.attach(self._loop)
        self._until(lambda: all(link.connected for link, _ in self.members))
        started = time.perf_counter()
        self._loop.call_every(TICK_S, self._tick)
        self._until(lambda: self.active[release] >= self.expected)
        return time.perf_counter() - started

    def close(self):
        for link, client in self.members:
            client.close()
            link.close()
        self._disk.shutdown()
        self._loop.close()

    def _tick(self, now):
        for index, (link, client) in enumerate(self.members):
            client.tick(now)
            if index in self._stalled and link.counters["bytes_received"] > 20_000:
                stop_reading(self._loop, link)
                self._stalled.discard(index)
            elif self._cut_at.get(index, 1 << 60) <= link.counters["bytes_received"] // 65_536:
                del self._cut_at[index]
                link._client.socket().shutdown(2)  # no DISCONNECT: the line is gone

    def _until(self, done):
        deadline = self._loop.clock() + PATIENCE_S
        self._loop.run(until=lambda: done() or self._loop.clock() > deadline)
        if not done():
            sys.exit(f"{self.mode}: not done after {PATIENCE_S:.0f} s: {dict(self.active)} {dict(self.counters)}")


def stop_reading(loop, link):
    """Keep the connection and never read again, as a device does whose application hangs."""
    sock = link._client.socket()
    loop.unwatch(sock)
    link._loop = None  # nothing is registered, and nothing must be any more


def bare(url, devices, topics):
    """Seconds until every plain client has read every topic, and the bytes that they read."""
    selector = selectors.DefaultSelector()
    missing = {}
    got = Counter()
    clients = []

    def on_message(client, _userdata, message):
        missing[client].discard(message.topic)
        got["bytes"] += len(message.payload)

    for index in range(devices):
        client = Client(CallbackAPIVersion.VERSION2, f"bare-{index:04d}", protocol=MQTTv5)
        client.on_message = on_message
        client.connect("127.0.0.1", int(url.rpartition(":")[2]))
        missing[client] = set(topics)
        selector.register(client.socket(), selectors.EVENT_READ, client)
        clients.append(client)
    started = time.perf_counter()
    for client in clients:
        client.subscribe([(name, 1) for name in topics])
    while any(missing.values()):
        for key, _ in selector.select(0.05):
            key.data.loop_read()
        for client in clients:
            if client.want_write():
                client.loop_write()
        if time.perf_counter() - started > PATIENCE_S:
            sys.exit(f"bare: {sum(bool(rest) for rest in missing.values())} clients still wait")
    elapsed = time.perf_counter() - started
    for client in clients:
        client.disconnect()
        client.loop_write()
    selector.close()
    return elapsed, got["bytes"]


class MemoryWatch:
    """The broker's largest resident memory while the block runs, above what it had with the retained set alone."""

    def __init__(self, pid, retained_rss):
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = retained_rss
        self._peak = self._process.memory_info().rss

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def growth_mb(self):
        return (self._peak - self._before) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--model-bytes", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where the devices' disks are (default: a temporary folder)")
    arguments = parser.parse_args()
    if find_mosquitto() is None:
        sys.exit("this benchmark needs Mosquitto: apt-get install mosquitto")
    folder = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        figures = measure(folder, arguments.devices, arguments.model_bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures))


def touch_memory(size_bytes):
    """Have the host back this much memory, so far as there is that much."""
    size = min(size_bytes, psutil.virtual_memory().available * 3 // 4)
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, PAGE_BYTES):
            memory[start] = 1


def measure(folder, devices, model_bytes):
    data = np.random.default_rng(SEED).bytes(model_bytes)
    touch_memory(devices * model_bytes * RUNS)
    with start_broker(folder / "broker", BrokerKind.MOSQUITTO) as broker:
        cloud = Cloud(folder / "cloud", broker.url)
        cloud.ship(1, data)
        retained_rss = psutil.Process(broker.process.pid).memory_info().rss
        setting = Setting(folder, broker, cloud.store.root(), devices, len(split(data)), retained_rss)
        topics = cloud.topics()
        bares, releases = [], []
        for attempt in range(ROUNDS):
            bares.append(bare(broker.url, devices, topics))
            print(f"bare: {bares[-1][1] / 1e6:.1f} MB to {devices} clients in {bares[-1][0]:.2f} s", flush=True)
            releases.append(deliver(setting, "release", f"release-{attempt}"))
        stalled, cut = (deliver(setting, mode, mode) for mode in ("stalled", "cut"))
        bare_s, bare_bytes = min(bares)
        best = min(releases, key=lambda run: run.own_s)
        spent = best.spent
        return {
            "time_ratio": round(best.own_s / bare_s, 2),
            "seconds": round(best.seconds, 2),
            "bytes": best.bytes,
            "bare_seconds": round(bare_s, 2),
            "bare_bytes": bare_bytes,
            "fsync_ms": round(1000 * (spent["fsync"] - spent["refresh_fsync"]) / devices, 2),
            "fsyncs": round(spent["fsyncs"] / devices, 1),
            "refresh_ms": round(1000 * spent["refresh"] / spent["refreshes"], 2),
            "selftest_ms": round(1000 * spent["selftest"] / devices, 2),
            "broker_growth_mb": round(stalled.growth_mb, 1),
            "cut_overhead": round(cut.bytes / best.bytes - 1, 4),
            "devices": devices,
            "model_bytes": model_bytes,
            "machine": {"cores": psutil.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
            "versions": {"mosquitto": broker.version, "paho-mqtt": version("paho-mqtt"), "tuf": version("tuf")},
            "date": datetime.now(UTC).date().isoformat(),
        }


@dataclass
class Run:
    """What one run of a fleet took; `growth_mb` is the broker's."""

    seconds: float
    bytes: int
    growth_mb: float
    spent: Counter

    @property
    def own_s(self):
        """Fetch, verification and fsync."""
        return self.seconds - self.spent["refresh"] - self.spent["selftest"]


@dataclass(frozen=True)
class Setting:
    """What all runs have in common. `retained_rss` is the broker's memory with the retained set alone."""

    folder: Path
    broker: object
    root: bytes
    devices: int
    chunks: int
    retained_rss: int


def deliver(setting, mode, name):
    """Run one fleet on fresh disks.

    They stay until the end: ext4 without a journal makes files several times more slowly while it remembers those
    that were just removed.
    """
    with MemoryWatch(setting.broker.process.pid, setting.retained_rss) as memory:
        fleet = Fleet(setting.folder / name, setting.broker.url, setting.root, setting.devices, mode, setting.chunks)
        with timed_fsync(fleet.spent):
            seconds = fleet.run(1)
    received = sum(link.counters["bytes_received"] for link, _ in fleet.members)
    fleet.close()
    print(
        f"{mode}: {fleet.active[1]} of {setting.devices} active after {seconds:.2f} s, {received / 1e6:.1f} MB, "
        f"{fleet.counters['blobs_retried']} asked for twice, broker grew by {memory.growth_mb:.0f} MB",
        flush=True,
    )
    return Run(seconds, received, memory.growth_mb, fleet.spent)


if __name__ == "__main__":
    main()
