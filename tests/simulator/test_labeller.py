"""The annotator's process: what it hears, what it sends, and when."""

import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest

from shoal.codec import encode
from shoal.config import load_config
from shoal.errors import ConfigError
from shoal.inbox import Inbox
from shoal.link import Link
from shoal.link_config import parse_broker_url, service_identity
from shoal.loop import Loop
from shoal.routes import ROUTES, Route, topic
from shoal.v1 import command_pb2 as pb
from shoal.v1.sample_pb2 import Sample, SampleBatch, SampleGroup
from shoal.v1.sensor_pb2 import SensorData
from simulator.labeller import Labeller, LabellerSettings

PATIENCE_S = 30.0
DELAY_S, RETRY_S = 2.0, 5.0
EPOCH = bytes(range(16))
INGEST = topic(Route.COMMAND, site="cloud", node="ingest")


class MemoryLink:
    """The part of a link that the labeller uses; `commands` is what reached ingest."""

    def __init__(self):
        self.connected = True
        self.is_full = False
        self.counters = Counter()
        self.inbox = Inbox(self.counters)
        self.commands = []
        self.expiries_s = []

    def subscribe(self, route, handler, **_):
        self.inbox.register(route, handler, ack_late=False)

    def publish(self, route, message, *, expiry_s, **segments):
        assert type(message) is ROUTES[route].message
        assert topic(route, **segments) == INGEST
        if self.is_full or not self.connected:
            return False
        self.commands.append(message)
        self.expiries_s.append(expiry_s)
        return True

    def deliver(self, route, message, **segments):
        name = topic(route, **segments)
        self.inbox.receive(name, encode(message), retained=False, ack=lambda: None)


class Rig:
    """A labeller whose time is the test's."""

    def __init__(self):
        self.now = 0.0
        self.link = MemoryLink()
        self.loop = Loop(clock=lambda: self.now)
        settings = LabellerSettings(models=["digits"], delay_s=DELAY_S, retry_after_s=RETRY_S)
        self.labeller = Labeller(settings, self.link, self.loop)

    def show(self, *references, now=0.0, model="digits"):
        """Samples on their way to the cloud; each is numbered by its place."""
        self.now = now
        samples = [Sample(reading=SensorData(seq=seq, reference=reference)) for seq, reference in enumerate(references)]
        group = SampleGroup(device="cam-00", epoch=EPOCH, model=model, samples=samples)
        self.link.deliver(Route.SAMPLE, SampleBatch(gateway="gw", groups=[group]), site="plant", node="gw")

    def tick(self, now):
        """Return what the labeller says now: the numbers and labels of each command."""
        self.now, before = now, len(self.link.commands)
        self.labeller.tick(now)
        return [[(item.seq, item.label) for item in c.add_labels.labels] for c in self.link.commands[before:]]

    def answer(self, status=pb.COMMAND_STATUS_DONE):
        result = pb.CommandResult(id=self.link.commands[-1].id, status=status)
        self.link.deliver(Route.RESULT, result, site="cloud", node="ingest")


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.loop.close()


@pytest.fixture
def rows(digits_data):
    """References and labels of rows that may be labelled, and of rows that may not."""
    streamed = digits_data.stream.tolist()
    held = [f"digits/{row}/5" for row in streamed if digits_data.held_out[row]]
    free = [(f"digits/{row}/5", int(digits_data.labels[row])) for row in streamed if not digits_data.held_out[row]]
    return free, held


def test_label_comes_late_and_is_the_truth(rig, rows):
    """Nothing before the delay, then the data set's own labels with the keys of their samples, once."""
    (first, one), (second, two) = rows[0][:2]
    rig.show(first, second)
    assert rig.tick(DELAY_S - 0.01) == []
    assert rig.tick(DELAY_S) == [[(0, one), (1, two)]]
    rig.answer()
    assert rig.tick(DELAY_S + 100) == []


def test_command_says_who_speaks_and_until_when(rig, rows):
    """A person's labels, with an author, an id and an expiry on the wire and in the message."""
    rig.show(rows[0][0][0])
    before_us = time.time() * 1e6
    rig.tick(DELAY_S)
    (command,) = rig.link.commands
    assert (len(command.id), command.add_labels.source) == (16, pb.LABEL_SOURCE_PERSON)
    assert command.add_labels.author
    assert {(item.device, item.epoch) for item in command.add_labels.labels} == {("cam-00", EPOCH)}
    assert before_us - 1 <= command.issued_at_us == command.expires_at_us - RETRY_S * 1e6
    assert rig.link.expiries_s == [5]


def test_held_out_samples_are_never_labelled(rig, rows):
    """Accuracy is measured on them: no release may have seen them."""
    free, held = rows
    assert len(held) > 400
    for start in range(0, len(held), 200):
        rig.show(*held[start : start + 200], now=float(start))
    rig.show(*held[:3], free[0][0], now=1000.0)
    assert rig.tick(2000.0) == [[(3, free[0][1])]]


def test_labels_without_a_result_are_sent_again(rig, rows):
    """Until ingest says that it has them, with a new id each time, so that the answer is its own."""
    reference, label = rows[0][0]
    rig.show(reference)
    assert rig.tick(DELAY_S) == [[(0, label)]]
    assert rig.tick(DELAY_S + RETRY_S - 0.01) == []
    assert rig.tick(DELAY_S + RETRY_S) == [[(0, label)]]
    rig.answer(pb.COMMAND_STATUS_EXPIRED)
    assert rig.tick(DELAY_S + 2 * RETRY_S) == [[(0, label)]]
    assert len({command.id for command in rig.link.commands}) == 3
    rig.answer()
    assert rig.tick(DELAY_S + 9 * RETRY_S) == []


def test_labels_survive_a_link_that_is_down_or_full(rig, rows):
    """What could not be sent is sent when it can be."""
    reference, label = rows[0][0]
    rig.show(reference)
    rig.link.connected = False
    assert rig.tick(DELAY_S + 50) == []
    rig.link.connected = True
    assert rig.tick(60.0) == [[(0, label)]]
    rig.link.is_full = True
    assert rig.tick(60.0 + RETRY_S) == []
    rig.link.is_full = False
    assert rig.tick(60.0 + 2 * RETRY_S) == [[(0, label)]]


def test_sample_that_nobody_can_look_up_holds_up_no_other(rig, rows):
    """Samples of real devices on the same broker have references of their own, or none."""
    (first, one), (second, two) = rows[0][:2]
    rig.show(first, "", "digits/99999/1", "engine/5", second)
    assert rig.tick(DELAY_S) == [[(0, one), (4, two)]]
    assert rig.link.counters["bad_payloads"] == 0


def test_other_models_are_nobodys_business(rig, rows):
    """Only what the settings name is labelled."""
    rig.show(rows[0][0][0], model="shuttle")
    assert rig.tick(100.0) == []


def test_wrong_settings_are_refused(tmp_path):
    """A retry of nothing would send without end."""
    path = tmp_path / "labeller.toml"
    path.write_text('models = ["digits"]\nretry_after_s = 0.0\n')
    with pytest.raises(ConfigError, match="retry_after_s"):
        load_config(path, LabellerSettings)


@pytest.fixture
def process(tmp_path, mosquitto):
    """A real labeller on a real broker."""
    path = tmp_path / "labeller.toml"
    path.write_text(f'models = ["digits"]\ndelay_s = 0.1\n[broker]\nurl = "{mosquitto.url}"\n')
    command = [sys.executable, "-m", "simulator", "labeller", "--config", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_process_labels_over_the_broker_and_ends_when_it_is_told_to(process, mosquitto, rows):
    """A sample goes by, a command comes to ingest's topic; SIGTERM is exit status 0."""
    reference, label = rows[0][0]
    commands, online = [], []
    with closing(Loop()) as loop:
        link = Link(parse_broker_url(mosquitto.url, session_expiry_s=0), service_identity("ingest"))
        link.subscribe(Route.COMMAND, lambda delivery: commands.append(delivery.message), site="cloud", node="ingest")
        link.subscribe(Route.CLOUD_PRESENCE, lambda delivery: online.append(delivery.message), service="labeller")
        link.attach(loop)

        def until(is_so):
            deadline = time.monotonic() + PATIENCE_S
            late = loop.call_at(deadline, lambda _: None)
            loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
            late.cancel()
            assert is_so()

        def show(_now):
            group = SampleGroup(device="cam-00", epoch=EPOCH, model="digits")
            group.samples.add().reading.reference = reference
            link.publish(Route.SAMPLE, SampleBatch(gateway="gw", groups=[group]), site="plant", node="gw")

        until(lambda: online and online[-1].online)
        loop.call_every(0.2, show)  # its subscription follows its presence
        until(lambda: commands)
        assert [(item.seq, item.label) for item in commands[0].add_labels.labels] == [(0, label)]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=5)
        assert (process.returncode, "Traceback" in errors) == (0, False)
        until(lambda: not online[-1].online)
        link.close()
