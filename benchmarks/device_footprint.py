"""What the agent takes of a device: memory, the time to its first reading, a share of one core at 1 reading a second.

    make bench-device-footprint

The agent is `shoal device run` as a process, from an environment with the device's dependencies and nothing else, with
the environment variables of deploy/systemd/shoal-device.service, over Mosquitto on loopback. A signed release (Shuttle's device architecture with random weights, static int8) is published;
the agent verifies it with TUF, tests it in a child, activates it and ends its probation. Then it is watched:

  rss_mb     resident memory (VmRSS, 10^6 bytes) at the end, libraries that are shared with others included; peak_rss_mb
             is VmHWM, and plain_rss_mb that of an agent without the service's variables, a quarter of a minute old
  cpu_share  seconds on the CPU of all its threads over `--seconds` of wall time, one core being 1
  start_s    from the start of a process on the same disk, the model there already, to the commit of its first reading;
             the median of `--starts`, and start_max_s the slowest

Readings come from a CSV file, 9 values each; the policy is the default one, and no gateway answers what is asked.
"""

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.device_step import _MAKE
from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, first_generation
from device_agent.runtime import load
from fleet_console.broker import BrokerKind, start_broker
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.release.trust import model_role
from shoal.routes import Route
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb
from shoal.v1.node_pb2 import SLOT_PHASE_CONFIRMED

MODEL, SITE, NODE = "shuttle", "bench", "dev-1"
CHANNELS = 9
PATIENCE_S = 60.0
PLAIN_S = 15.0
UNIT = Path(__file__).parent.parent / "deploy" / "systemd" / "shoal-device.service"
TARGETS = {"rss_mb": 70.0, "start_s": 2.0, "cpu_share": 0.01}
LOOK_S = 0.002
_VERSIONS = """
import json
from importlib.metadata import distributions
print(json.dumps({item.metadata["Name"].lower(): item.version for item in distributions()}))
"""
_SHOWN = ("ai-edge-litert", "tflite-runtime", "numpy", "protobuf", "paho-mqtt", "tuf", "shoal")
# Whose presence would make the environment another than a device's.
_NOT_A_DEVICES = ("torch", "onnxruntime", "scikit-learn", "typer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="+", type=Path, help="of the devices' environments; the first is the result")
    parser.add_argument("--seconds", type=float, default=60.0, help="of watching (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=7, help="of the agent (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(Path(folder) / str(index), python.absolute(), options)
            for index, python in enumerate(options.pythons)
        ]
    result = {
        **results[0],
        **({"others": results[1:]} if len(results) > 1 else {}),
        "targets": TARGETS,
        "is_met": all(results[0][name] <= target for name, target in TARGETS.items()),
        "watched_s": options.seconds,
        "starts": options.starts,
        "machine": {"cores": os.cpu_count(), "arch": platform.machine(), "kernel": platform.release()},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(result))


def measure(folder: Path, python: Path, options: argparse.Namespace) -> dict[str, object]:
    versions = json.loads(subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True).stdout)
    stranger = [name for name in _NOT_A_DEVICES if name in versions]
    if stranger:
        raise SystemExit(f"{python}: {', '.join(stranger)} is no dependency of a device")
    folder.mkdir()
    with start_broker(folder, BrokerKind.MOSQUITTO) as broker:
        cloud = Cloud(folder, broker.url)
        config = write_config(folder, broker.url, cloud.store.root())
        with closing(Fleet(cloud, broker.url)) as fleet:
            with agent(python, config, folder) as process:
                fleet.until(lambda: fleet.phase == SLOT_PHASE_CONFIRMED)
                before, began = cpu_s(process.pid), time.monotonic()
                fleet.serve(options.seconds)
                share = (cpu_s(process.pid) - before) / (time.monotonic() - began)
                rss, peak = status_mb(process.pid, "VmRSS"), status_mb(process.pid, "VmHWM")
            with agent(python, config, folder, {}) as process:
                fleet.serve(PLAIN_S)
                plain = status_mb(process.pid, "VmRSS")
            starts = [first_reading_s(python, config, folder) for _ in range(options.starts)]
            if fleet.counters["trust_refreshes"] < 1 or fleet.counters["model_errors"]:
                raise SystemExit(f"the agent is not well: {fleet.counters}")
    figures = {
        "rss_mb": round(rss, 1),
        "peak_rss_mb": round(peak, 1),
        "plain_rss_mb": round(plain, 1),
        "start_s": round(statistics.median(starts), 3),
        "start_max_s": round(max(starts), 3),
        "cpu_share": round(share, 5),
        "versions": {name: versions[name] for name in _SHOWN if name in versions} | {"mosquitto": broker.version},
        "python": subprocess.run([python, "-V"], check=True, capture_output=True, text=True).stdout.split()[1],
    }
    print(figures, flush=True)
    return figures


class Cloud:
    """Keys, store, and one release that is signed."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.keys = FileKeyStore(folder / "keys")
        for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role(MODEL)):
            self.keys.create(role)
        self.store = ReleaseStore(folder / "store")
        now = datetime.now(UTC)
        self.store.create(first_generation(self.keys, [MODEL], now))
        subprocess.run([sys.executable, "-c", _MAKE, folder], check=True, capture_output=True)
        path = folder / "int8.tflite"
        rows = np.random.default_rng(1).normal(size=(8, CHANNELS)).astype(np.float32)
        golden = pb.GoldenVectors(inputs=to_tensor(rows), outputs=to_tensor(load(path).run(rows)), tolerance=0.1)
        artefact = pb.Artefact(
            tier=pb.TIER_DEVICE, format=pb.MODEL_FORMAT_TFLITE, golden=golden, threshold=1e9, int8=True
        )
        schema = pb.InputSchema(shape=[CHANNELS], mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS)
        spec = pb.ReleaseSpec(model=MODEL, input=schema, score=pb.SCORE_KIND_RECONSTRUCTION, artefacts=[artefact])
        submit_release(self.store, spec, [path.read_bytes()], self.keys, now)
        plan = pb.RolloutPlan(rollout_id="r1", model=MODEL, release=1, targets=["*"], share_permille=1000)
        submit_plan(self.store, plan, self.keys, now)


class Fleet:
    """The publisher, and somebody who reads what the device says of itself; on one loop."""

    def __init__(self, cloud: Cloud, url: str) -> None:
        self.phase = 0
        self.counters: Counter[str] = Counter()
        self._loop = Loop()
        self._link = Link(parse_broker_url(url, session_expiry_s=0), service_identity("publisher"))
        self._publisher = Publisher(self._link, cloud.store, cloud.keys, counters=Counter())
        self._publisher.start()
        self._link.on_connect(self._publisher.on_connect)
        self._link.attach(self._loop)
        self._loop.call_every(0.1, self._publisher.tick)
        self._eye = Link(parse_broker_url(url, session_expiry_s=0), node_identity(SITE, "eye", "operator"))
        self._eye.subscribe(Route.STATE, self._on_state, site=SITE)
        self._eye.attach(self._loop)

    def until(self, is_so) -> None:
        deadline = self._loop.clock() + PATIENCE_S
        self._loop.run(until=lambda: is_so() or self._loop.clock() > deadline)
        if not is_so():
            raise SystemExit(f"the release is not confirmed on the device: phase {self.phase}, {self.counters}")

    def serve(self, seconds: float) -> None:
        end = self._loop.clock() + seconds
        self._loop.run(until=lambda: self._loop.clock() >= end)

    def close(self) -> None:
        self._publisher.close()
        self._eye.close()
        self._link.close()
        self._loop.close()

    def _on_state(self, delivery) -> None:
        self.counters = Counter(dict(delivery.message.counters))
        for model in delivery.message.models:
            self.phase = model.phase


def write_config(folder: Path, url: str, root: bytes) -> Path:
    (folder / "root.json").write_bytes(root)
    rows = np.random.default_rng(2).normal(size=(1000, CHANNELS))
    names = [f"c{index}" for index in range(CHANNELS)]
    (folder / "rows.csv").write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]))
    config = folder / "agent.toml"
    config.write_text(
        f'site = "{SITE}"\nnode = "{NODE}"\nmodel = "{MODEL}"\ndata_dir = "{folder}/data"\n'
        f'trusted_root = "{folder}/root.json"\nprobation_s = 1.0\nstate_interval_s = 10.0\n'
        f'[broker]\nurl = "{url}"\n'
        f'[source]\nkind = "csv"\npath = "{folder}/rows.csv"\ncolumns = {json.dumps(names)}\nrepeat = true\nrate_hz = 1.0\n'
    )
    return config


def unit_variables() -> dict[str, str]:
    """What the service sets."""
    lines = UNIT.read_text().splitlines()
    return dict(line.removeprefix("Environment=").split("=", 1) for line in lines if line.startswith("Environment="))


@contextmanager
def agent(python: Path, config: Path, folder: Path, variables: dict[str, str] | None = None):
    """`shoal device run` as the environment's own script starts it."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SHOAL_", "PYTHON"))}
    environment |= unit_variables() if variables is None else variables
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'proto'}"
    with (folder / "agent.log").open("ab") as log:
        command = [python.parent / "shoal", "device", "run", "--config", config]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            if process.wait(PATIENCE_S):
                raise SystemExit(
                    f"the agent ended with {process.returncode}: {(folder / 'agent.log').read_text()[-2000:]}"
                )


def first_reading_s(python: Path, config: Path, folder: Path) -> float:
    """Seconds until a reading more than before is committed."""
    store = folder / "data" / "outbox.sqlite"
    before = produced(store)
    began = time.monotonic()
    with agent(python, config, folder):
        while produced(store) == before:
            if time.monotonic() > began + PATIENCE_S:
                raise SystemExit("no reading")
            time.sleep(LOOK_S)
        return time.monotonic() - began


def produced(store: Path) -> int:
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT value FROM counters WHERE name = 'produced'").fetchone()
        return row[0] if row else 0


def cpu_s(pid: int) -> float:
    """Of all threads; nanoseconds of the scheduler, where /proc/PID/stat counts in 10 ms."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def status_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"no {name} of {pid}")


if __name__ == "__main__":
    main()
