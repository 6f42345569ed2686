"""Faults at every system call of an install: kill, EIO, ENOSPC, by strace, on a real node process.

    python tests/campaigns/faults_install.py [--every N] [--jobs N]

Two stories: a node that runs release 1 installs release 2, and a new node installs release 2. First the calls that
touch its directory are listed. Then, for each of them and each fault, the node starts from the same disk, meets the
fault, and is started again without it. What it runs must be whole and pass its golden vectors (else `bad_active`), it
must not end by itself (else `died`), and it must reach release 2 in the end (else `stuck`).

The control does the same to a node whose files are written in place, without fsync and rename: it must fail, or this
campaign would prove nothing. Prints one JSON object last.
"""

import argparse
import datetime as dt
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, first_generation
from shoal.codec import encode
from shoal.release.trust import model_role
from shoal.routes import topic
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb

HERE = Path(__file__).parent
NODE = HERE / "install_node.py"
MODEL = "digits"
MARK = "begins-here"
NOW = dt.datetime(2026, 11, 20, 12, tzinfo=dt.UTC)
# 150,000 bytes: three chunks, so that an artefact is in pieces on its way.
WEIGHTS = 37_500
CALLS = "openat,write,pwrite64,fsync,rename,renameat,renameat2,ftruncate,unlink,unlinkat,mkdir"
TIMEOUT_S = 60
FAILURES = ("bad_active", "stuck", "died")
SETTINGS = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}

# Where a file is replaced, the control writes it in place: what a careless updater does.
CARELESS = """
import os, pathlib, shoal.release.durable as durable, shoal.release.slot_store as store, shoal.release.trust as trust
def careless(path, data, mode=0o644):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    for at in range(0, len(data), 64):
        os.write(handle, data[at:at + 64])
    os.close(handle)
for module in (durable, store, trust):
    if hasattr(module, "write_atomic"): module.write_atomic = careless
def save(self, body):
    careless(self._copies[0], body)
def load(self):
    return self._copies[0].read_bytes() if self._copies[0].exists() else None
durable.CheckedFile.save, durable.CheckedFile.load = save, load
"""


class Shelf:
    """A link that only keeps retained messages, for the publisher to fill."""

    connected = True

    def __init__(self):
        self.retained = {}
        self.done = []

    def publish(self, route, message, *, on_done=None, **segments):
        name = topic(route, **segments)
        payload = message if isinstance(message, bytes) else encode(message)
        if payload:
            self.retained[name] = payload
        else:
            self.retained.pop(name, None)
        self.done.append(on_done)
        return True

    def settle(self):
        while self.done:
            self.done.pop(0)(None)


def make_worlds(folder):
    """Publish release 1, then release 2 of a model that multiplies; return what is retained after each."""
    keys = FileKeyStore(folder / "keys")
    for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role(MODEL)):
        keys.create(role)
    store = ReleaseStore(folder / "store")
    store.create(first_generation(keys, [MODEL], NOW))
    shelf = Shelf()
    publisher = Publisher(shelf, store, keys, counters=Counter(), wall_clock=lambda: NOW)
    publisher.start()
    worlds = []
    for release in (1, 2):
        spec, files = make_release(release)
        submit_release(store, spec, files, keys, NOW)
        plan = pb.RolloutPlan(
            rollout_id=f"r{release}", model=MODEL, release=release, targets=["*"], share_permille=1000
        )
        submit_plan(store, plan, keys, NOW)
        while not publisher.settled:
            publisher.tick(float(release))
            shelf.settle()
        path = folder / f"world-{release}"
        path.write_bytes(pickle.dumps((dict(shelf.retained), store.root())))
        worlds.append(path)
    publisher.close()
    return worlds


def make_release(release):
    weights = np.random.default_rng(release).normal(size=WEIGHTS).astype("<f4")
    inputs = np.arange(4, dtype=np.float32).reshape(4, 1)
    golden = pb.GoldenVectors(
        inputs=to_tensor(inputs), outputs=to_tensor((inputs * weights.sum()).astype(np.float32)), tolerance=1e-3
    )
    artefact = pb.Artefact(tier=pb.TIER_DEVICE, format=pb.MODEL_FORMAT_TFLITE, golden=golden)
    schema = pb.InputSchema(shape=[1], mean=[0.0], std=[1.0])
    spec = pb.ReleaseSpec(model=MODEL, parent=release - 1, input=schema, score=1, artefacts=[artefact])
    return spec, [weights.tobytes()]


def node_command(directory, world, wanted, *, careless):
    if not careless:
        return [sys.executable, str(NODE), str(directory), str(world), str(wanted)]
    program = CARELESS + f"\nimport runpy, sys\nsys.argv[:] = {['x', str(directory), str(world), str(wanted)]!r}\n"
    return [sys.executable, "-c", program + f"runpy.run_path({str(NODE)!r}, run_name='__main__')"]


def run(command):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, **SETTINGS}
    )


def list_calls(template, world, folder, *, careless):
    """(call, ordinal among its kind in the whole process) of each call that touches the node's directory."""
    directory, log = folder / "dry", folder / "dry.log"
    shutil.copytree(template, directory)
    traced = ["strace", "-y", "-o", str(log), "-e", f"trace={CALLS},access,faccessat,faccessat2"]
    done = run([*traced, *node_command(directory, world, 2, careless=careless)])
    if done.returncode != 0:
        sys.exit(f"the install without faults failed: {done.stdout} {done.stderr[-500:]}")
    counts, calls, begun = Counter(), [], False
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(\w+)\(", line)
        if match is None:
            continue
        begun = begun or MARK in line
        counts[match[1]] += 1
        reads = match[1] == "openat" and "O_WRONLY" not in line and "O_RDWR" not in line
        if begun and str(directory) in line and not reads:
            calls.append((match[1], counts[match[1]]))
    return calls


def faults_of(call):
    yield "signal=KILL"
    yield "error=EIO"
    if call in ("openat", "write", "pwrite64", "fsync", "rename", "renameat", "renameat2", "mkdir"):
        yield "error=ENOSPC"


def try_fault(template, world, directory, case, *, careless):
    """Meet one fault, then start again; return what was wrong, empty when nothing was."""
    call, ordinal, fault = case
    shutil.copytree(template, directory)
    inject = f"inject={call}:{fault}:when={ordinal}"
    try:
        met = run(
            [
                "strace",
                "-o",
                "/dev/null",
                "-e",
                f"trace={call}",
                "-e",
                inject,
                *node_command(directory, world, 2, careless=careless),
            ]
        )
        problem = judge(met, allow_death="KILL" in fault)
        after = run(node_command(directory, world, 2, careless=careless))
        if after.returncode not in (0, 3) or not after.stdout.startswith("{"):
            return problem or "bad_active"
        return problem or ("stuck" if after.returncode == 3 else "")
    except subprocess.TimeoutExpired:
        return "stuck"
    finally:
        shutil.rmtree(directory)


def judge(met, *, allow_death):
    """A node may end by the fault's signal; by an error of its own it may not: the agent goes on."""
    if met.returncode < 0 or met.returncode > 128:
        return "" if allow_death else "died"
    return "" if met.stdout.startswith("{") else "died"


def campaign(folder, *, story, every, jobs, careless):
    """Run all cases of one story of one kind of node."""
    folder.mkdir()
    first, second = make_worlds(folder)
    template = folder / "template"
    template.mkdir()
    if story == "update":
        done = run(node_command(template, first, 1, careless=careless))
        if done.returncode != 0:
            sys.exit(f"release 1 could not be installed: {done.stdout} {done.stderr[-500:]}")
    calls = list_calls(template, second, folder, careless=careless)
    cases = [(call, ordinal, fault) for call, ordinal in calls for fault in faults_of(call)][::every]
    print(f"{story}: {len(calls)} calls on the node's directory, {len(cases)} faults", flush=True)
    results = Counter()
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(
            lambda item: try_fault(template, second, folder / f"case-{item[0]}", item[1], careless=careless),
            enumerate(cases),
        )
        for case, outcome in zip(cases, outcomes, strict=True):
            results[outcome] += 1
            if outcome and not careless:
                print(f"  {case[0]} #{case[1]} {case[2]}: {outcome}", flush=True)
    return Counter(faults=len(cases), bad_active=results["bad_active"], stuck=results["stuck"], died=results["died"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="take each Nth fault only (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="nodes at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        sys.exit("strace is missing: apt-get install strace")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("careful node: as shipped")
        careful = Counter()
        for story in ("update", "first"):
            careful.update(
                campaign(folder / story, story=story, every=arguments.every, jobs=arguments.jobs, careless=False)
            )
        print("control: a node that writes in place")
        control = campaign(
            folder / "control", story="update", every=arguments.every, jobs=arguments.jobs, careless=True
        )
    failed = any(control[name] for name in FAILURES)
    print(json.dumps({**careful, "control_failed": failed, "control": control}))
    return int(any(careful[name] for name in FAILURES) or not failed)


if __name__ == "__main__":
    sys.exit(main())
