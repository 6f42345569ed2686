"""How fast samples get into the store, durably and acknowledged, and whether any comes in twice.

    make bench-ingest

Two things, over Mosquitto on loopback and the ingest service as users run it (`python -m cloud ingest`), one process:

  rate   `--samples` samples of 512 bytes in batches of 128, as gateways send them, from the first PUBLISH to the last
         ack; beside it, in turn, the same rows by one `executemany` for each `--transaction` rows into the same table,
         in WAL mode with synchronous=FULL as well, with nothing else to do: no broker, no parsing, no acks
  kills  every batch is sent three times, and ingest is killed (SIGKILL) ten times on the way and started again

`ratio` is samples a second through ingest over rows a second of the bare `executemany`: of the medians of the rounds.
`duplicates` counts what is in the store more than once after the kills, `missing` what is not there.
The last line is all of it as JSON.
"""

import argparse
import json
import os
import platform
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

from cloud.ingest import read_group
from cloud.sqlite_store import INSERT_SAMPLE, SqliteSampleStore
from fleet_console.broker import BrokerKind, find_mosquitto, start_broker
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.tensors import to_tensor
from shoal.v1 import inference_pb2
from shoal.v1.sample_pb2 import Sample, SampleBatch, SampleGroup
from shoal.v1.sensor_pb2 import SensorData

SITE, GATEWAY, MODEL = "bench", "gw-bench", "shuttle"
DEVICES = 16
BATCH = 128
VALUES = 128
REPEATS = 3
KILLS = 10
PATIENCE_S = 120.0
SEED = 7


def batched(items, count):
    """As itertools does from Python 3.12 on."""
    items = iter(items)
    while part := tuple(islice(items, count)):
        yield part


def batches_of(count, first=0):
    """Samples `first` and up as gateways batch them: each batch of one device."""
    rng = np.random.default_rng(SEED)
    values = rng.normal(size=(64, VALUES)).astype(np.float32)
    made = []
    for number, seqs in enumerate(batched(range(first, first + count), BATCH)):
        group = SampleGroup(device=f"cam-{number % DEVICES:02d}", epoch=b"e" * 16, model=MODEL)
        for seq in seqs:
            answer = inference_pb2.Answer(release=1, score=0.5, label=3)
            reading = SensorData(
                seq=seq, captured_at_us=seq, tensor=to_tensor(values[seq % len(values)]), reference=f"row/{seq}"
            )
            group.samples.append(
                Sample(
                    reading=reading, reason=inference_pb2.ASK_REASON_SCORE, device_answer=answer, gateway_answer=answer
                )
            )
        made.append(SampleBatch(gateway=GATEWAY, groups=[group]))
    return made


@contextmanager
def ingest(config, log):
    """The service, running and connected or about to be."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloud", "ingest", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


class Sender:
    """A gateway that sends batches and knows which are acknowledged; what is not is sent again after `retry_s`."""

    def __init__(self, url, retry_s, most_unacked=1 << 30):
        self.loop = Loop()
        self.retry_s = retry_s
        self._most_unacked = most_unacked
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(SITE, GATEWAY, "gateway"))
        self.link.subscribe(Route.ACK, self._on_ack, site=SITE, node=GATEWAY)
        self.link.attach(self.loop)
        self.acked = set()
        self._batches = {}
        self._waiting = deque()
        self._sent_at = {}
        self.loop.on_idle(self._send)

    def deliver(self, batches, on_progress=lambda _: None):
        """Send all of them until all are acknowledged; return the seconds from the first PUBLISH on."""
        self._batches = {batch.groups[0].samples[0].reading.seq: batch for batch in batches}
        self._waiting = deque(self._batches)
        self._sent_at = {}
        self.acked = set()
        deadline = time.monotonic() + PATIENCE_S
        self.loop.run(until=lambda: self.link.connected or time.monotonic() > deadline)
        began = time.perf_counter()

        def is_over():
            on_progress(len(self.acked) / len(self._batches))
            return len(self.acked) == len(self._batches) or time.monotonic() > deadline

        self.loop.run(until=is_over)
        if len(self.acked) < len(self._batches):
            sys.exit(f"{len(self.acked)} of {len(self._batches)} batches acknowledged after {PATIENCE_S:.0f} s")
        return time.perf_counter() - began

    def close(self):
        self.link.close()
        self.loop.close()

    def _send(self, now):
        while self._waiting and self.link.room() > 0 and len(self._sent_at) < self._most_unacked:
            first = self._waiting.popleft()
            if not self.link.publish(Route.SAMPLE, self._batches[first], site=SITE, node=GATEWAY):
                self._waiting.appendleft(first)
                break
            self._sent_at[first] = now
        for first in [first for first, sent_at in self._sent_at.items() if now - sent_at > self.retry_s]:
            del self._sent_at[first]
            self._waiting.append(first)

    def _on_ack(self, delivery):
        for group in delivery.message.groups:
            if group.quarantined:
                sys.exit(f"{len(group.quarantined)} samples were refused")
            self.acked.add(min(group.stored))
            self._sent_at.pop(min(group.stored), None)


def raw(path, batches, per_transaction):
    """Seconds for the same rows by `executemany` alone; they are made before the clock starts."""
    samples = [read_group(GATEWAY, group, 1)[0] for batch in batches for group in batch.groups]
    rows = [(*sample, sample.digest) for group in samples for sample in group]
    SqliteSampleStore(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        began = time.perf_counter()
        for part in batched(rows, per_transaction):
            db.execute("BEGIN IMMEDIATE")
            db.executemany(INSERT_SAMPLE, part)
            db.execute("COMMIT")
        return time.perf_counter() - began


def write_config(folder, url):
    config = folder / "cloud.toml"
    config.write_text(
        f'data_dir = "{folder / "cloud"}"\n[broker]\nurl = "{url}"\n[[models]]\nname = "{MODEL}"\n', encoding="utf-8"
    )
    (folder / "cloud").mkdir(parents=True)
    SqliteSampleStore(folder / "cloud" / "samples.sqlite").close()
    return config


def measure_rate(folder, url, options):
    rates = {"ingest": [], "raw": []}
    config = write_config(folder, url)
    with ingest(config, folder / "ingest.log") as process:
        sender = Sender(url, retry_s=30.0)
        sender.deliver(batches_of(BATCH))  # until it answers
        for number in range(options.rounds):
            batches = batches_of(options.samples, first=(number + 1) * 10_000_000)
            rates["raw"].append(options.samples / raw(folder / f"raw-{number}.sqlite", batches, options.transaction))
            busy = sum(psutil.Process(process.pid).cpu_times()[:2])
            rates["ingest"].append(options.samples / sender.deliver(batches))
            busy = sum(psutil.Process(process.pid).cpu_times()[:2]) - busy
            print(
                f"round {number + 1}: ingest {rates['ingest'][-1]:,.0f} samples/s ({busy / options.samples * 1e6:.1f} us of "
                f"processor time each), raw executemany {rates['raw'][-1]:,.0f} rows/s",
                flush=True,
            )
        sender.close()
    return rates


def measure_kills(folder, url, samples):
    """Send everything three times while ingest is killed again and again; count what the store holds."""
    rng = random.Random(SEED)
    folder.mkdir()
    config = write_config(folder, url)
    batches = batches_of(samples)
    places = sorted(rng.uniform(0.02, 0.98) for _ in range(KILLS))
    kills = [(round_number, place) for place in places for round_number in [int(place * REPEATS)]]
    done = 0
    sender = Sender(url, retry_s=1.0, most_unacked=8)  # few, so that each kill comes at its place
    with (folder / "ingest.log").open("ab") as output:

        def start():
            return subprocess.Popen(
                [sys.executable, "-m", "cloud", "ingest", "--config", str(config)], stdout=output, stderr=output
            )

        process = start()
        try:
            for number in range(REPEATS):
                mine = [place * REPEATS - number for round_number, place in kills if round_number == number]

                def kill_when_due(progress, mine=mine):
                    nonlocal process, done
                    if mine and progress >= mine[0]:
                        mine.pop(0)
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                        process = start()
                        done += 1

                sender.deliver(batches, kill_when_due)
        finally:
            process.terminate()
            process.wait()
            sender.close()
    with closing(sqlite3.connect(folder / "cloud" / "samples.sqlite")) as db:
        stored, distinct, set_aside = db.execute(
            "SELECT COUNT(*), COUNT(DISTINCT reference), (SELECT COUNT(*) FROM quarantine) FROM samples"
        ).fetchone()
    print(f"kills: {done}, {samples} samples sent {REPEATS} times, {stored} stored, {set_aside} set aside", flush=True)
    return {"kills": done, "duplicates": stored - distinct, "missing": samples - distinct, "set_aside": set_aside}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--transaction", type=int, default=1000, help="rows of `raw` (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where the stores are (default: a temporary folder)")
    options = parser.parse_args()
    if find_mosquitto() is None:
        sys.exit("this benchmark needs Mosquitto: apt-get install mosquitto")
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        with start_broker(folder / "broker", BrokerKind.MOSQUITTO) as broker:
            rates = measure_rate(folder, broker.url, options)
            kills = measure_kills(folder / "kills", broker.url, options.samples // 2)
            broker_version = broker.version
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures = {
        "ratio": round(medians["ingest"] / medians["raw"], 3),
        "samples_per_s": round(medians["ingest"]),
        "raw_per_s": round(medians["raw"]),
        **kills,
        "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
        "machine": {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "versions": {"mosquitto": broker_version, "sqlite": sqlite3.sqlite_version, "protobuf": version("protobuf")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
