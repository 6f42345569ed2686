"""A fleet as a process, between a real broker and whatever answers there."""

import datetime as dt
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tomli_w
from torch import nn

from cloud import services
from cloud.export import to_tflite
from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.settings import CloudSettings, ModelSettings
from device_agent.runtime import load
from fleet_console.broker import free_port, start_broker
from shoal.config import BrokerSettings
from shoal.delivery.outbox import Limits, Outbox, lane_by_device
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.routes import Route
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb
from shoal.v1.inference_pb2 import STATUS_OK, Answer, InferenceReply, RowReply
from simulator import __main__ as command
from simulator.fleet import FleetSettings, json_sizes
from simulator.journal import JournalReader
from simulator.streams import FleetKind, Share, open_stream

PATIENCE_S = 30.0
SITE = "plant"
NODES = ("sensor-00", "sensor-01", "sensor-02")
READINGS = 90


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A broker that holds a release for devices, and the root that it is trusted by."""
    directory = tmp_path_factory.mktemp("published")
    settings = CloudSettings(data_dir=str(directory / "cloud"), models=[ModelSettings("shuttle")])
    root = services.init(settings)
    keys, store = FileKeyStore(settings.keys_dir), ReleaseStore(settings.releases_dir)
    model = to_tflite(nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 9)), (9,))
    (directory / "model.tflite").write_bytes(model)
    golden = np.ones((2, 9), np.float32)
    artefact = pb.Artefact(tier=pb.TIER_DEVICE, format=pb.MODEL_FORMAT_TFLITE, threshold=1e9)
    artefact.golden.inputs.CopyFrom(to_tensor(golden))
    artefact.golden.outputs.CopyFrom(to_tensor(load(directory / "model.tflite").run(golden)))
    artefact.golden.tolerance = 1e-4
    schema = pb.InputSchema(shape=[9], mean=[0.0] * 9, std=[100.0] * 9)
    spec = pb.ReleaseSpec(model="shuttle", input=schema, score=pb.SCORE_KIND_RECONSTRUCTION, artefacts=[artefact])
    now = dt.datetime.now(dt.UTC)
    submit_release(store, spec, [model], keys, now)
    submit_plan(
        store, pb.RolloutPlan(rollout_id="r", model="shuttle", release=1, targets=["*"], share_permille=1000), keys, now
    )
    with start_broker(directory / "broker") as broker, closing(Loop()) as loop:
        link = Link(parse_broker_url(broker.url, session_expiry_s=0), service_identity("publisher"))
        publisher = Publisher(link, store, keys, counters=Counter())
        publisher.start()
        link.on_connect(publisher.on_connect)
        link.attach(loop)
        loop.call_every(0.02, publisher.tick)
        deadline = time.monotonic() + PATIENCE_S
        loop.run(until=lambda: publisher.settled or time.monotonic() > deadline)
        assert publisher.settled
        publisher.close()
        link.close()
        yield broker.url, str(root)


@pytest.fixture
def settings(tmp_path, published):
    """Three sensors that ask about every reading."""
    url, root = published
    return FleetSettings(
        kind="sensors",
        site=SITE,
        prefix="sensor",
        model="shuttle",
        devices=3,
        rate_hz=60.0,
        readings=READINGS,
        data_dir=str(tmp_path / "data"),
        journal=str(tmp_path / "sensors.csv"),
        trusted_root=root,
        broker=BrokerSettings(url=url),
        audit_share=1.0,
        max_share=1.0,
        retry_after_s=0.5,
        probation_s=0.2,
    )


def write(settings, path, **changes):
    table = {key: value for key, value in msgspec.to_builtins(settings).items() if key != "broker"} | changes
    path.write_text(tomli_w.dumps(table | {"broker": {"url": settings.broker.url}}))
    return path


@pytest.fixture
def start(tmp_path):
    """Start `python -m simulator fleet`."""
    started = []

    def start(settings):
        path = write(settings, tmp_path / "fleet.toml")
        arguments = [sys.executable, "-m", "simulator", "fleet", "--config", str(path)]
        started.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends_well(process, limit_s):
    _, errors = process.communicate(timeout=limit_s)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors


class Gateway:
    """Hears every question of the site, and answers when it is told to."""

    def __init__(self, url, *, answers):
        self.loop = Loop()
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(SITE, "gw", "gateway"))
        self.answers = answers
        self.asked = Counter()
        self.online = {}
        self.link.subscribe(Route.INFER, self._on_question, site=SITE)
        self.link.subscribe(Route.PRESENCE, self._on_presence, site=SITE)
        self.link.attach(self.loop)

    def _on_question(self, delivery):
        question = delivery.message
        self.asked.update((question.device, row.reading.seq) for row in question.rows)
        if self.answers:
            answer = Answer(release=1, score=0.5)
            rows = [RowReply(seq=row.reading.seq, status=STATUS_OK, answer=answer) for row in question.rows]
            reply = InferenceReply(epoch=question.epoch, model=question.model, rows=rows)
            self.link.publish(Route.REPLY, reply, site=SITE, node=question.device)

    def _on_presence(self, delivery):
        if delivery.message is not None and delivery.address.node in NODES:
            self.online[delivery.address.node] = delivery.message.online

    def until(self, is_so):
        deadline = time.monotonic() + PATIENCE_S
        self.loop.call_every(0.1, lambda _: None)
        self.loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
        assert is_so(), (self.online, len(self.asked))

    def close(self):
        self.link.close()
        self.loop.close()


def books(settings):
    """What the fleet's own store says, by device: owed numbers and counters."""
    path = Path(settings.data_dir) / "outbox.sqlite"
    with closing(Outbox(path, Limits(200_000, 1 << 30), lane_by_device)) as outbox:
        owed = {(key.device, key.seq) for key in outbox.waiting_keys()}
        return owed, {node: outbox.counters(node) for node in NODES}


def entries(path, event):
    return [entry for entry in JournalReader(path).new() if entry.event == event]


def test_fleet_without_a_gateway_keeps_what_it_owes_and_ends_when_it_is_told_to(settings, start, published, tmp_path):
    """What nobody answers is asked again, owed over SIGTERM, and asked by the next process until it is answered."""
    journal = tmp_path / "sensors.csv"
    process = start(settings)
    with closing(Gateway(published[0], answers=False)) as gateway:
        gateway.until(lambda: len(gateway.asked) == READINGS and min(gateway.asked.values()) > 1)
        assert gateway.online == dict.fromkeys(NODES, True)
        process.send_signal(signal.SIGTERM)
        ends_well(process, 3)
        gateway.until(lambda: not any(gateway.online.values()))
        asked = set(gateway.asked)
    read = entries(journal, "read")
    assert {(entry.device, entry.seq) for entry in read} == asked
    assert {entry.reason for entry in read} == {"asked.audit"}
    owed, counters = books(settings)
    assert owed == asked
    for node in NODES:
        assert counters[node]["accepted"] == counters[node]["produced"] == READINGS / 3
        assert counters[node]["answered"] == 0

    process = start(settings)
    with closing(Gateway(published[0], answers=True)) as gateway:
        gateway.until(lambda: process.poll() is not None)
        ends_well(process, 1)
        assert asked < set(gateway.asked)
    owed, counters = books(settings)
    assert owed == set()
    for node in NODES:
        assert counters[node]["accepted"] == counters[node]["answered"] == 2 * READINGS / 3
    replies = entries(journal, "reply")
    assert len(replies) == READINGS  # those of this process; the first one's questions are in its own memory no more
    assert {(entry.score, entry.release, entry.reason) for entry in replies} == {(0.5, 1, "answered")}


def test_rows_are_dealt_to_the_devices_and_taken_down_with_the_truth(
    settings, start, published, tmp_path, shuttle_data
):
    """Each streamed row is read by one device, and the journal has its label and its size as JSON."""
    process = start(settings)
    with closing(Gateway(published[0], answers=True)) as gateway:
        gateway.until(lambda: process.poll() is not None)
    ends_well(process, 1)
    read = entries(tmp_path / "sensors.csv", "read")
    rows = [int(entry.reference.split("/")[1]) for entry in read]
    assert sorted(rows) == shuttle_data.stream[:READINGS].tolist()
    assert all(entry.label == shuttle_data.labels[row] for entry, row in zip(read, rows, strict=True))
    assert {(entry.phase, entry.release, entry.held_out) for entry in read} == {("before_drift", 1, 0)}
    assert min(entry.bytes_json_compact for entry in read) > 50
    assert all(entry.bytes_json > entry.bytes_json_compact for entry in read)


def test_fleet_without_a_broker_ends_when_it_is_told_to(settings, start, tmp_path):
    """It has no model, reads nothing, tries again and again, and SIGTERM is still exit status 0 at once."""
    process = start(msgspec.structs.replace(settings, broker=BrokerSettings(url=f"mqtt://127.0.0.1:{free_port()}")))
    journal = tmp_path / "sensors.csv"
    deadline = time.monotonic() + PATIENCE_S
    while not (journal.exists() and journal.read_bytes()):
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    process.send_signal(signal.SIGTERM)
    ends_well(process, 3)
    assert list(JournalReader(journal).new()) == []


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """Run the command in this process on settings with changes."""

    def run(settings, **changes):
        path = write(settings, tmp_path / "fleet.toml", **changes)
        monkeypatch.setattr("sys.argv", ["simulator", "fleet", "--config", str(path)])
        return command.main(), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "boats"}, "$.kind"),
        ({"devices": 0}, "$.devices"),
        ({"rate_hz": 0.0}, "$.rate_hz"),
        ({"audit_share": 1.5}, "$.audit_share"),
        ({"max_share": 0.5}, "audit_share 1.0, max_share 0.5"),
        ({"state_interval_s": 0.0}, "$.state_interval_s"),
        ({"colour": 1}, "colour"),
        ({"site": "Not An Id"}, "site: 'Not An Id'"),
        ({"prefix": "x" * 62}, "node: "),
        ({"model": ""}, "model: ''"),
        ({"trusted_root": "/nowhere/root.json"}, "/nowhere/root.json: No such file"),
        ({"data_dir": "/dev/null/data"}, "/dev/null"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_status_2(settings, run_main, changes, named):
    """The operator reads what is wrong, and no device connects."""
    status, out, err = run_main(settings, **changes)
    assert status == 2
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def test_json_is_measured_as_an_engineer_would_write_it(digits_data):
    """The short form spends one character on a pixel's digit; the canonical one is protobuf's own mapping."""
    share = Share(0, 1)
    truth = open_stream(FleetKind.CAMERAS, digits_data, seed=1, device="cam-00", share=share).next()
    blank = replace(truth, values=np.zeros((8, 8, 1), np.float32))
    canonical, compact = json_sizes("cam-00", 7, blank)
    empty = len(json.dumps({"device": "cam-00", "seq": 7, "t": 1800000000.123, "values": []}, separators=(",", ":")))
    assert empty + 127 - 3 <= compact <= empty + 127
    assert canonical > compact + 64
