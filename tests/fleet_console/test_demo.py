"""The demo's witness and its stages, and that it leaves nothing behind; CI runs it from end to end besides."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import psutil
import pytest
from rich.console import Console

from fleet_console.broker import free_port
from fleet_console.demo import run as run_module
from fleet_console.demo.live import LiveView
from fleet_console.demo.observer import Observer
from fleet_console.demo.plan import CAMERAS, SENSORS, Options, make_config
from fleet_console.demo.processes import Processes
from fleet_console.demo.run import Demo, Stage, run_demo
from shoal.codec import encode
from shoal.delivery.ledger import Row
from shoal.errors import ConfigError
from shoal.inbox import Inbox
from shoal.routes import Route, topic
from shoal.v1.inference_pb2 import (
    STATUS_INVALID_ARGUMENT,
    STATUS_NOT_FOUND,
    STATUS_OK,
    InferenceReply,
    InferenceRequest,
    InferenceRow,
    RowReply,
)
from shoal.v1.node_pb2 import ModelState, NodeState, Presence
from shoal.v1.sample_pb2 import Sample, SampleBatch, SampleGroup
from shoal.v1.sensor_pb2 import SensorData
from simulator.journal import Journal

PATIENCE_S = 30.0
STOP_S = 5.0


# -- the witness -------------------------------------------------------------------------------------------------------


class MemoryLink:
    def __init__(self):
        self.inbox = Inbox(Counter())

    def subscribe(self, route, handler, **segments):
        assert segments == {}
        self.inbox.register(route, handler, ack_late=False)

    def deliver(self, route, message, node="cam-01"):
        name = topic(route, site="plant", node=node, service=node)
        payload = message if isinstance(message, bytes) else encode(message)
        self.inbox.receive(name, payload, retained=False, ack=lambda: None)
        return len(payload)


@pytest.fixture
def link():
    return MemoryLink()


@pytest.fixture
def observer(link):
    return Observer(link)


def question(*seqs, model=CAMERAS):
    rows = [InferenceRow(reading=SensorData(seq=seq)) for seq in seqs]
    return InferenceRequest(device="cam-01", model=model, rows=rows)


def test_questions_are_counted_in_bytes_and_remembered_by_row(link, observer):
    """Repeated bytes count again, a repeated row is the same row."""
    size = link.deliver(Route.INFER, question(1, 2)) + link.deliver(Route.INFER, question(2, 3))
    link.deliver(Route.INFER, question(9, model=SENSORS))
    assert observer.seen(CAMERAS).asked == {Row("cam-01", 1), Row("cam-01", 2), Row("cam-01", 3)}
    assert observer.seen(CAMERAS).infer_bytes == size
    assert observer.seen(SENSORS).asked == {Row("cam-01", 9)}
    assert observer.messages == {"infer": 3}


def test_replies_say_what_was_answered_refused_and_promised(link, observer):
    """By the device of the topic; a reply that asks for patience settles nothing."""
    rows = [
        RowReply(seq=1, status=STATUS_OK),
        RowReply(seq=2, status=STATUS_OK, sample_promised=True),
        RowReply(seq=3, status=STATUS_INVALID_ARGUMENT),
        RowReply(seq=4, status=STATUS_NOT_FOUND),
    ]
    link.deliver(Route.REPLY, InferenceReply(model=CAMERAS, rows=rows), node="cam-07")
    seen = observer.seen(CAMERAS)
    assert seen.answered == {Row("cam-07", 1), Row("cam-07", 2)}
    assert seen.refused == {Row("cam-07", 3)}
    assert seen.promised == {Row("cam-07", 2)}


def test_sample_bytes_are_shared_between_the_models_of_a_message(link, observer):
    """All bytes are somebody's; a batch without anything in it does no harm."""
    small = SampleGroup(device="a", model=CAMERAS, samples=[Sample()])
    large = SampleGroup(device="b", model=SENSORS, samples=[Sample(reading=SensorData(reference="x" * 60))] * 9)
    size = link.deliver(Route.SAMPLE, SampleBatch(gateway="gw", groups=[small, large]), node="gw")
    shares = observer.seen(CAMERAS).sample_bytes, observer.seen(SENSORS).sample_bytes
    assert sum(shares) == pytest.approx(size)
    assert shares[1] / shares[0] == pytest.approx(large.ByteSize() / small.ByteSize())
    link.deliver(Route.SAMPLE, SampleBatch(gateway="gw", groups=[small, large]), node="gw")
    assert observer.seen(SENSORS).sample_bytes == pytest.approx(2 * shares[1])
    link.deliver(Route.SAMPLE, SampleBatch(groups=[SampleGroup()]), node="gw")
    link.deliver(Route.SAMPLE, SampleBatch(), node="gw")
    assert observer.messages == {"sample": 4}


def test_will_of_an_earlier_session_is_stale(link, observer):
    """A node that came back before the broker noticed that it had gone is there."""
    for session, online, is_there in [
        (b"1", True, True),
        (b"2", True, True),
        (b"1", False, True),
        (b"2", False, False),
        (b"3", True, True),
    ]:
        link.deliver(Route.PRESENCE, Presence(session=session, online=online))
        assert observer.online["cam-01"] is is_there
    link.deliver(Route.PRESENCE, Presence(session=b"9", online=False), node="cam-02")
    link.deliver(Route.CLOUD_PRESENCE, Presence(session=b"1", online=True), node="ingest")
    assert observer.online == {"cam-01": True, "cam-02": False, "ingest": True}


def test_states_are_the_newest_of_each_node(link, observer):
    """Nodes and services alike; a state that was cleared takes nothing back."""
    for release in (1, 2):
        state = NodeState(role="device", models=[ModelState(model=CAMERAS, release=release)])
        link.deliver(Route.STATE, state)
    link.deliver(Route.STATE, b"")
    link.deliver(Route.CLOUD_STATE, NodeState(role="trainer"), node="trainer")
    assert [model.release for model in observer.model_states("device")] == [2]
    assert set(observer.states) == {"cam-01", "trainer"}


# -- stages ------------------------------------------------------------------------------------------------------------


class FakeChild:
    is_running = True


@pytest.fixture
def demo(tmp_path):
    """A demo without its processes; its clock is the test's."""
    options = Options(out=tmp_path, quick=True)
    config = make_config(options, "mqtt://127.0.0.1:1")
    config.cloud.directory.mkdir(parents=True)
    processes = Processes(options.run_dir, keep_going=False)
    demo = Demo(options, config, processes, LiveView(Console(quiet=True)), "mqtt://127.0.0.1:1")
    processes.children |= {"sensors": FakeChild(), "cameras": FakeChild()}
    demo.now = demo._started
    demo._loop.clock = lambda: demo.now
    yield demo
    demo.close()


def stage(demo):
    demo._advance(demo.now)
    return demo.stage


def test_stages_follow_what_the_cameras_see(demo, tmp_path, read):
    """From the first reading to the drift and the recovery; a lone late reading turns nothing back."""
    journal = Journal(tmp_path / "run" / "cameras.csv")
    assert stage(demo) is Stage.TRAINING
    for phase, expected in [
        ("before_drift", Stage.RUNNING),
        ("after_drift", Stage.DRIFTED),
        ("before_drift", Stage.DRIFTED),
        ("after_update", Stage.UPDATED),
        ("after_drift", Stage.UPDATED),
    ]:
        journal.write(read(1, phase=phase))
        journal.flush()
        demo._read_journals()
        assert stage(demo) is expected
    journal.close()
    assert [note.split("  ")[-1] for note in demo._notes] == [
        Stage.RUNNING.value,
        Stage.DRIFTED.value,
        Stage.UPDATED.value,
    ]


def test_run_that_takes_too_long_is_over(demo):
    """Whatever stage it is in."""
    demo.now += demo._options.sizes.max_s
    assert stage(demo) is Stage.TRAINING
    demo.now += 0.1
    assert stage(demo) is Stage.OVER


def test_run_is_over_when_everything_promised_is_stored(demo):
    """After the fleets have ended the gateway's last samples are waited for, but not for ever."""
    demo._processes.children["sensors"].is_running = False
    assert stage(demo) is Stage.TRAINING
    demo._processes.children["cameras"].is_running = False
    demo.now += 1.0
    assert stage(demo) is Stage.SETTLING
    demo.observer.states["gw-01"] = NodeState(role="gateway", counters={"samples.waiting": 2})
    assert stage(demo) is Stage.SETTLING
    demo.observer.states["gw-01"] = NodeState(role="gateway", counters={"samples.waiting": 0})
    demo.observer.seen(CAMERAS).promised.add(Row("cam-01", 1))
    assert stage(demo) is Stage.SETTLING
    demo.observer.seen(CAMERAS).promised.clear()
    assert stage(demo) is Stage.OVER


def test_settling_has_an_end(demo):
    """A sample that never comes is a hole in the report, not a demo without an end."""
    for child in demo._processes.children.values():
        child.is_running = False
    assert stage(demo) is Stage.SETTLING
    demo.now += run_module._SETTLE_S
    assert stage(demo) is Stage.SETTLING
    demo.now += 0.1
    assert stage(demo) is Stage.OVER


# -- the whole thing ---------------------------------------------------------------------------------------------------


def test_broker_that_is_not_there_is_said(tmp_path, monkeypatch):
    """A user's broker is asked for before anything is trained."""
    monkeypatch.setattr(run_module, "_SETTLE_S", 0.2)
    monkeypatch.setattr(run_module.signal, "signal", lambda *_: None)
    url = f"mqtt://127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"^no MQTT 5 broker answers at {url}$"):
        run_demo(Options(out=tmp_path, quick=True, broker_url=url), Console(quiet=True))


def test_only_what_an_earlier_run_made_is_removed(tmp_path, monkeypatch):
    """A folder may hold more than the demo's own files."""
    for name in ("run/old.log", "report.json", "report.html", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    run_module._clear(Options(out=tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "run"]
    with pytest.raises(ConfigError, match=r"mine\.txt is not a folder"):
        run_module._clear(Options(out=tmp_path / "mine.txt"))


def poll(is_so, limit_s):
    deadline = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return is_so()


def processes_of(out):
    """Whatever names the run's folder on its command line, brokers included."""
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            str(out) in word for word in process.info["cmdline"] or ()
        ):
            found[process.pid] = process.info["cmdline"]
    return found


def groups_left(pids):
    left = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, 0)
            left.append(pid)
    return left


@pytest.fixture
def start(tmp_path):
    """Start `shoal demo --quick` as a process; kill what a test that fails leaves behind."""
    started = []

    def start(broker_url=None):
        command = [sys.executable, "-c", "from fleet_console.cli import main; main()", "demo", "--quick"]
        environment = {key: value for key, value in os.environ.items() if key != "SHOAL_BROKER"}
        environment |= {} if broker_url is None else {"SHOAL_BROKER": broker_url}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen([*command, "--out", str(tmp_path)], stdout=pipe, stderr=pipe, text=True, env=environment)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for pid in processes_of(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_ctrl_c_ends_all_of_it(start, tmp_path):
    """Three seconds into a run, in the middle of training: exit status 130 within five, and no process is left."""
    demo = start()
    assert poll((tmp_path / "run" / "pids.json").exists, PATIENCE_S)
    with pytest.raises(subprocess.TimeoutExpired):
        demo.wait(3)
    assert poll(lambda: any("cloud.pipelines" in words for words in processes_of(tmp_path).values()), PATIENCE_S)
    pids = json.loads((tmp_path / "run" / "pids.json").read_text())
    assert {"publisher", "ingest", "trainer", "gateway", "labeller", "sensors", "cameras"} == set(pids)
    running = processes_of(tmp_path)
    assert set(running) > {*pids.values(), demo.pid}
    demo.send_signal(signal.SIGINT)
    _, err = demo.communicate(timeout=STOP_S)
    assert (demo.returncode, "Traceback" in err) == (130, False), err
    assert poll(lambda: not processes_of(tmp_path), 1), processes_of(tmp_path)
    assert groups_left(pids.values()) == []
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_politeness_ends_it_like_ctrl_c(start, tmp_path, number):
    """As `timeout`, service managers and closed terminals do it, here while the broker is still waited for."""
    demo = start(f"mqtt://127.0.0.1:{free_port()}")
    assert poll((tmp_path / "run" / "cloud" / "root.json").exists, PATIENCE_S)
    demo.send_signal(number)
    _, err = demo.communicate(timeout=STOP_S)
    assert (demo.returncode, "Traceback" in err) == (130, False), err
    assert poll(lambda: not processes_of(tmp_path), 1), processes_of(tmp_path)
