"""One node that installs what its world offers, as a process that faults are injected into.

    python install_node.py DIRECTORY WORLD WANTED_RELEASE

WORLD is a pickled {topic: payload}. Exits 0 when WANTED_RELEASE is confirmed, 3 when time is up; prints what is active.
Time is simulated: nothing waits.
"""

import json
import os
import pickle
import random
import sys
from collections import Counter, deque
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from shoal.errors import ShoalError
from shoal.inbox import Inbox
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import Outcome, Verdict, run_golden
from shoal.release.trust import TrustStore
from shoal.routes import topic_filter
from shoal.v1.release_pb2 import TIER_DEVICE

MODEL = "digits"
MARK = "begins-here"
_SIGNED_AT = 1_795_400_000
_TICKS = 4000
_TICK_S = 0.5


class World:
    """Retained messages, delivered as a broker does: after the subscription, in order."""

    def __init__(self, retained):
        self._retained = retained
        self._work = deque()
        self.inbox = Inbox(Counter())
        self.connected = True

    def subscribe(self, route, handler, *, group=None, ack_late=False, **segments):
        self.inbox.register(route, handler, ack_late=ack_late)
        name = topic_filter(route, **segments)
        if name in self._retained:
            self._work.append((name, self._retained[name]))

    def unsubscribe(self, route, *, group=None, **segments):
        pass

    def run(self):
        while self._work:
            name, payload = self._work.popleft()
            self.inbox.receive(name, payload, retained=True, ack=lambda: None)


class Doubler:
    """The model: float32 weights in a file; answers inputs times their sum."""

    def __init__(self, path):
        self._factor = np.frombuffer(path.read_bytes(), dtype="<f4").sum()

    def run(self, inputs):
        return inputs * self._factor


class HereSelfTest:
    """The golden vectors, in this process: a fault in a child is another campaign's."""

    def start(self, path, artefact, now):
        return HereTrial(path, artefact)


class InlineDisk(Executor):
    """Does the disk's work at once, so that time stays simulated."""

    def submit(self, fn, /, *args, **kwargs):
        done = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except (OSError, ShoalError) as exc:
            done.set_exception(exc)
        return done


class HereTrial:
    def __init__(self, path, artefact):
        self._path, self._artefact = path, artefact

    def poll(self, now):
        try:
            run_golden(Doubler(self._path), self._artefact)
        except Exception as exc:
            return Verdict(Outcome.FAILED, str(exc))
        return Verdict(Outcome.PASSED)

    def cancel(self):
        pass


def main(directory, world_path, wanted):
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    retained, root = pickle.loads(Path(world_path).read_bytes())
    world = World(retained)
    active = {}

    def activate(model, spec, path):
        artefact = next(item for item in spec.artefacts if item.tier == TIER_DEVICE)
        run_golden(Doubler(path), artefact)  # what answers is checked again here, from outside the installer
        active.update(release=spec.release, sha256=artefact.sha256.hex())

    client = UpdateClient(
        world,
        TrustStore(Path(directory) / "trust", root, clock=lambda: _SIGNED_AT),
        Path(directory) / "models",
        [NodeModel(MODEL, TIER_DEVICE, "numpy", probation_s=2.0)],
        node="node-1",
        self_test=HereSelfTest(),
        activate=activate,
        rng=random.Random(1),
        counters=Counter(),
        disk=InlineDisk(),
    )
    # strace shows this: faults are counted from here.
    os.access(f"/{MARK}", os.F_OK)
    client.start()
    now = 0.0
    for _ in range(_TICKS):
        world.run()
        client.tick(now)
        now += _TICK_S
        state = client.state()[0]
        if active.get("release") == int(wanted) and state.phase == 4:
            break
    client.close()
    print(json.dumps({**active, "phase": client.state()[0].phase}))
    return 0 if active.get("release") == int(wanted) else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
