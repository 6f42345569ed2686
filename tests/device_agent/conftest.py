"""A device between an in-memory link, whose other end is the test, and a real outbox."""

import contextlib
import random
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from device_agent.config import DeviceConfig
from device_agent.device import Device
from device_agent.readings import Reading
from shoal.codec import encode
from shoal.delivery.outbox import Outbox
from shoal.errors import LinkError
from shoal.inbox import Inbox
from shoal.link_config import node_identity
from shoal.routes import ROUTES, Route, topic, topic_filter
from shoal.v1 import inference_pb2 as pb
from shoal.v1.release_pb2 import SCORE_KIND_RECONSTRUCTION, Artefact, InputSchema, ReleaseSpec, Tier

SITE, NODE, MODEL = "plant", "dev-1", "vibration"


class MemoryLink:
    """The part of a link that devices use. What is published waits for `acknowledge`, as it waits for the broker."""

    def __init__(self, window=100):
        self.identity = node_identity(SITE, NODE, "device")
        self.connected = False
        self.counters = Counter()
        self.window = window
        self.inbox = Inbox(self.counters)
        self.filters = set()
        self.hooks = []
        self.pending = []
        self.sent = []

    def subscribe(self, route, handler, *, group=None, ack_late=False, **segments):
        self.inbox.register(route, handler, ack_late=ack_late)
        self.filters.add(topic_filter(route, group=group, **segments))

    def on_connect(self, hook):
        self.hooks.append(hook)

    def room(self):
        return self.window - len(self.pending) if self.connected else 0

    @property
    def is_idle(self):
        return not self.pending

    def publish(self, route, message, *, correlation=b"", expiry_s=None, on_done=None, **segments):
        if self.room() <= 0:
            return False
        assert type(message) is ROUTES[route].message
        encode(message)
        assert topic(route, **segments) == topic(route, site=SITE, node=NODE)
        self.pending.append(on_done)
        self.sent.append((route, message, correlation, expiry_s))
        return True

    def acknowledge(self, error=None):
        """The broker answers everything that waits."""
        pending, self.pending = self.pending, []
        for done in pending:
            if done is not None:
                done(error)

    def connect(self):
        self.connected = True
        for hook in self.hooks:
            hook()

    def disconnect(self):
        self.connected = False
        self.acknowledge(LinkError("the connection ended before the broker answered"))

    def deliver(self, route, message, correlation=b""):
        name = topic(route, site=SITE, node=NODE)
        assert name in self.filters
        self.inbox.receive(name, encode(message), retained=False, ack=lambda: None, correlation=correlation)


class ZeroModel:
    """Answers zeros: as a reconstruction, its score is the mean square of the input."""

    def run(self, inputs):
        return np.zeros_like(inputs)


class Rig:
    """One device; `restart` ends it and starts the next one on the same store."""

    def __init__(self, directory, *, limits=None, hold=None, window=100, **settings):
        self.path = directory / "outbox.sqlite"
        self.limits = limits
        self.hold = hold
        self.window = window
        self.config = DeviceConfig(SITE, NODE, MODEL, **settings)
        self.now = 1000.0
        self.outcomes = []
        self.start()

    def start(self):
        self.link = MemoryLink(self.window)
        self.outbox = Outbox(self.path, self.limits, hold=self.hold)
        self.device = Device(
            self.config,
            self.link,
            self.outbox,
            rng=random.Random(7),
            clock=lambda: self.now,
            on_outcome=self.outcomes.append,
        )

    def restart(self, *, killed=True):
        """A killed process commits nothing."""
        self.close(killed=killed)
        self.start()

    def close(self, *, killed=False):
        if killed:
            self.outbox._store.close()
        else:
            self.outbox.close()

    def activate(self, *, release=1, threshold=1.0, channels=1, **schema):
        schema = InputSchema(**{"shape": [channels], "mean": [0.0], "std": [1.0], **schema})
        artefact = Artefact(tier=Tier.TIER_DEVICE, threshold=threshold)
        spec = ReleaseSpec(release=release, input=schema, score=SCORE_KIND_RECONSTRUCTION, artefacts=[artefact])
        self.device.activate(MODEL, spec, Path("model.tflite"))

    def read(self, *values, reference="row"):
        return self.device.read(Reading(np.array(values, np.float32), 17, reference), self.now)

    def ask(self, *values):
        """Take one reading and send what is due."""
        outcome = self.read(*(values or (5.0,)))
        self.step()
        return outcome

    def step(self, later_s=0.0):
        """Commit and tick, as the agent does; return the questions that this sent."""
        self.now += later_s
        before = len(self.link.sent)
        self.outbox.commit_due(self.now, is_connected=self.link.connected)
        self.device.tick(self.now)
        return [message for route, message, *_ in self.link.sent[before:] if route is Route.INFER]

    @property
    def questions(self):
        return [message for route, message, *_ in self.link.sent if route is Route.INFER]

    def reply(self, *seqs, status=pb.STATUS_OK, epoch=None, answer=None, field="", message=""):
        rows = [pb.RowReply(seq=seq, status=status, answer=answer, field=field, message=message) for seq in seqs]
        epoch = self.outbox.epoch(NODE) if epoch is None else epoch
        self.link.deliver(Route.REPLY, pb.InferenceReply(epoch=epoch, model=MODEL, rows=rows))

    def correlation(self, question):
        """What this question can be answered by."""
        return next(correlation for _, message, correlation, _ in self.link.sent if message is question)

    def refuse_whole(self, correlation, field="device", message="not yours", status=pb.STATUS_INVALID_ARGUMENT):
        """What a gateway says of a message that it cannot use: no epoch, and one row without a number."""
        row = pb.RowReply(status=status, field=field, message=message)
        self.link.deliver(Route.REPLY, pb.InferenceReply(rows=[row]), correlation)

    def quarantine(self):
        """As committed, oldest first: number, status, field, message."""
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            return db.execute("SELECT seq, status, field, message FROM quarantine ORDER BY id").fetchall()

    def counters(self):
        """As committed, with what waits, read by another connection."""
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            counters = Counter(dict(db.execute("SELECT name, value FROM counters")))
            counters["in_flight"] = db.execute("SELECT COUNT(*) FROM items").fetchone()[0]
        return counters

    def committed(self):
        self.outbox.commit()
        return {name: value for name, value in self.counters().items() if value}

    def check_ledger(self):
        """Pin the two equations of docs/topics.md, on what is on disk."""
        counters = self.counters()
        totals = Counter()
        for name, value in counters.items():
            totals[name.partition(".")[0]] += value
        assert totals["produced"] == totals["kept"] + totals["accepted"], counters
        settled = totals["answered"] + totals["dropped"] + totals["quarantined"]
        assert totals["accepted"] == settled + counters["in_flight"], counters


@pytest.fixture
def make_rig(monkeypatch):
    """Make rigs whose models are `ZeroModel`."""
    monkeypatch.setattr("device_agent.device.load", lambda *_: ZeroModel())
    with contextlib.ExitStack() as closing:

        def make(directory, **settings):
            made = Rig(directory, **settings)
            closing.callback(made.close)
            return made

        yield make


@pytest.fixture
def rig(make_rig, tmp_path):
    """A connected device without a model, so that it asks about everything."""
    made = make_rig(tmp_path, retry_after_s=10.0, answer_within_ms=250)
    made.link.connect()
    return made
