"""The agent as a process, and what its settings refuse."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from device_agent.agent import AgentSettings
from device_agent.agent import run as run_agent
from shoal.config import load_config
from shoal.delivery.outbox import Outbox
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.release.client import UpdateClient
from shoal.routes import Route
from shoal.v1 import inference_pb2 as pb

pytestmark = pytest.mark.device

PATIENCE_S = 30.0
ROWS = 6


class Gateway:
    """Answers OK to every question of its site, from the second time on where `deaf_first`."""

    def __init__(self, url, site, *, deaf_first=False):
        self.loop = Loop()
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(site, "gw", "gateway"))
        self.link.subscribe(Route.INFER, self._on_question, site=site)
        self.link.subscribe(Route.STATE, self._on_state, site=site)
        self.link.subscribe(Route.PRESENCE, self._on_presence, site=site)
        self.link.attach(self.loop)
        self.site = site
        self.is_deaf = deaf_first
        self.rows = []
        self.replayed = set()
        self.counters = {}
        self.online = None

    def _on_question(self, delivery):
        question = delivery.message
        self.rows += question.rows
        self.replayed |= {row.reading.seq for row in question.rows if question.replay}
        if not self.is_deaf:
            rows = [pb.RowReply(seq=row.reading.seq, status=pb.STATUS_OK) for row in question.rows]
            reply = pb.InferenceReply(epoch=question.epoch, model=question.model, rows=rows)
            assert self.link.publish(Route.REPLY, reply, site=self.site, node=question.device)

    def _on_state(self, delivery):
        self.counters = dict(delivery.message.counters)

    def _on_presence(self, delivery):
        if delivery.address.node != "gw":
            self.online = delivery.message.online

    def until(self, is_so):
        """Serve until it is so; fail where it never is."""
        deadline = time.monotonic() + PATIENCE_S
        late = self.loop.call_at(deadline, lambda _: None)  # the loop looks again by then
        self.loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
        late.cancel()
        assert is_so()


@pytest.fixture
def gateway(broker, request):
    """Start gateways of this test's own site."""
    made = []

    def start(**options):
        made.append(Gateway(broker.url, site_of(request), **options))
        made[-1].until(lambda: made[-1].link.connected)
        return made[-1]

    yield start
    for one in made:
        one.link.close()
        one.loop.close()


def site_of(request):
    return request.node.name.replace("_", "-").partition("[")[0][:40]


@pytest.fixture
def config(broker, request, tmp_path):
    """Write agent.toml, with a CSV of a few rows; a test changes what it wants, None leaves a key out."""
    (tmp_path / "readings.csv").write_text("a,b\n" + "".join(f"{row},{row / 2}\n" for row in range(ROWS)))
    (tmp_path / "root.json").write_text("{}")

    def write(*, path=tmp_path / "readings.csv", columns=("b", "a"), rate_hz=50.0, extra="", **changed):
        keys = {
            "site": site_of(request),
            "node": "dev-1",
            "model": "vibration",
            "data_dir": str(tmp_path / "data"),
            "trusted_root": str(tmp_path / "root.json"),
            "state_interval_s": 0.2,
            **changed,
        }
        # Quoted as Python has it is quoted as TOML has it.
        lines = [f"{key} = {value!r}" for key, value in keys.items() if value is not None]
        lines += [extra, "[broker]", f"url = {broker.url!r}"]
        lines += ["[source]", f"path = {str(path)!r}", f"columns = {list(columns)!r}", f"rate_hz = {rate_hz!r}"]
        file = tmp_path / "agent.toml"
        file.write_text("\n".join(lines))
        return file

    return write


def command(file):
    return [sys.executable, "-W", "error", "-m", "device_agent", "run", "--config", str(file)]


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}


@contextmanager
def running(file):
    """The agent while the block runs; killed after it, unless it has ended."""
    with subprocess.Popen(command(file), env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_agent_asks_is_answered_and_ends_on_sigterm(config, gateway):
    """Pins the whole process over a real broker: birth, questions without a model, books that close, exit 0."""
    peer = gateway()
    with running(config()) as agent:
        peer.until(lambda: peer.counters.get("answered") == ROWS)
        assert peer.online is True
        agent.send_signal(signal.SIGTERM)
        _, errors = agent.communicate(timeout=PATIENCE_S)
    assert (agent.returncode, "Traceback" in errors) == (0, False), errors
    assert {row.reason for row in peer.rows} == {pb.ASK_REASON_NO_MODEL}
    readings = sorted((row.reading for row in peer.rows), key=lambda reading: reading.seq)
    assert [reading.reference for reading in readings] == [f"readings:{row}" for row in range(1, ROWS + 1)]
    assert [list(reading.scalars.values) for reading in readings] == [[row / 2, row] for row in range(ROWS)]
    expected = {"produced": ROWS, "accepted": ROWS, "asked.no_model": ROWS, "answered": ROWS}
    assert {name: value for name, value in peer.counters.items() if name in expected} == expected
    peer.until(lambda: peer.online is False)


def test_killed_agent_replays_what_it_owes(config, gateway):
    """Pins durability over a real broker: what a killed process had asked, the next one asks again, as a replay."""
    peer = gateway(deaf_first=True)
    file = config(retry_after_s=600.0)
    with running(file) as agent:
        peer.until(lambda: len(peer.rows) == ROWS)
        agent.kill()
    asked = {row.reading.seq for row in peer.rows}
    peer.is_deaf = False
    with running(file) as agent:
        peer.until(lambda: asked <= peer.replayed and peer.counters.get("answered") == 2 * ROWS)
        agent.send_signal(signal.SIGTERM)
        agent.communicate(timeout=PATIENCE_S)
    assert agent.returncode == 0
    assert len({row.reading.seq for row in peer.rows}) == 2 * ROWS


def test_agent_that_runs_until_dry_ends_when_all_is_answered(config, gateway, tmp_path):
    """Pins `until_dry`, on which scripts rely: it returns after the last answer, and not before."""
    peer = gateway()
    serving = threading.Thread(target=peer.loop.run)
    serving.start()
    try:
        run_agent(load_config(config(), AgentSettings), until_dry=True)
    finally:
        peer.loop.stop()
        serving.join()
    assert len(peer.rows) == ROWS
    outbox = Outbox(tmp_path / "data" / "outbox.sqlite")
    assert outbox.counters()["answered"] == ROWS
    outbox.close()


def test_only_an_ordered_end_is_excused(config, gateway, monkeypatch, tmp_path):
    """Pins that a model on probation keeps its try over an ordered end, and loses it where the agent breaks."""
    excused = []
    monkeypatch.setattr(UpdateClient, "excuse_start", lambda _: excused.append("ordered"))
    peer = gateway()
    serving = threading.Thread(target=peer.loop.run)
    serving.start()
    try:
        run_agent(load_config(config(), AgentSettings), until_dry=True)
    finally:
        peer.loop.stop()
        serving.join()
    assert excused == ["ordered"]
    (tmp_path / "broken.csv").write_text("a,b\nx,y\n")
    with pytest.raises(ConfigError):
        run_agent(load_config(config(path=tmp_path / "broken.csv"), AgentSettings), until_dry=True)
    assert excused == ["ordered"]


def refusal(file):
    """What the agent says when it will not run."""
    done = subprocess.run(
        command(file), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"extra": "max_shere = 0.1"}, "max_shere"),
        ({"trusted_root": None}, "trusted_root"),
        ({"max_share": 2.0}, "max_share"),
        ({"node": "Dev 1"}, "node: 'Dev 1'"),
        ({"trusted_root": "/nowhere/root.json"}, "trusted_root /nowhere/root.json: No such file"),
    ],
)
def test_bad_configuration_ends_with_two_and_one_line(config, changed, named):
    """Pins what the operator sees: one line that names the key, and exit status 2."""
    errors = refusal(config(**changed))
    assert named in errors
    assert len(errors.splitlines()) == 1


def test_missing_configuration_ends_with_two_and_one_line(tmp_path):
    """Pins the line for a wrong path of the file itself."""
    errors = refusal(tmp_path / "gone.toml")
    assert errors == f"shoal: {tmp_path / 'gone.toml'}: No such file or directory\n"


def test_bad_cell_ends_with_two_and_loses_nothing_that_was_read(config, tmp_path):
    """Pins that an error in the middle of a source is told in one line, and what was read before it is durable."""
    source = tmp_path / "broken.csv"
    source.write_text("a,b\n1,2\n3,4\n5,x\n")
    file = config(path=source, rate_hz=1e6)
    errors = refusal(file)
    assert errors.splitlines()[-1] == f"shoal: source {source}, row 3, column b: 'x' is not a number"
    assert "Traceback" not in errors
    outbox = Outbox(tmp_path / "data" / "outbox.sqlite")
    assert dict(outbox.counters()) == {"produced": 2, "accepted": 2, "asked.no_model": 2}
    assert outbox.in_flight == 2
    outbox.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("change_threshold", -0.1),
        ("change_adapt", 1.5),
        ("audit_share", -0.1),
        ("max_share", 0.0),
        ("max_per_minute", 0),
        ("answer_within_ms", -1),
        ("answer_within_ms", 1 << 32),
        ("retry_after_s", 0.0),
        ("outbox_items", 0),
        ("outbox_bytes", 0),
        ("state_interval_s", 0.0),
        ("state_interval_s", 601.0),
        ("probation_s", -1.0),
        ("rate_hz", 0.0),
        ("columns", ()),
    ],
)
def test_setting_out_of_range_is_refused_by_name(config, key, value):
    """Pins that a number which the agent could not run with is found when the file is read."""
    with pytest.raises(ConfigError, match=rf"\$\.(source\.)?{key}"):
        load_config(config(**{key: value}), AgentSettings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"site": "Plant"}, "site: 'Plant' is not an id"),
        ({"model": "../model"}, "model: '../model' is not an id"),
        ({"data_dir": "/dev/null/data"}, "data_dir /dev/null/data: Not a directory"),
    ],
)
def test_names_that_cannot_be_used_are_refused(config, changed, message):
    """Pins that ids and folders are checked before anything is opened."""
    settings = load_config(config(**changed), AgentSettings)
    with pytest.raises(ConfigError, match=message):
        run_agent(settings)


def test_settings_of_the_file_reach_the_device(config):
    """Pins that every setting of a device's has its key in the file, under the same name."""
    policy = {"audit_share": 0.25, "max_share": 0.5, "max_per_minute": 9}
    device = {
        "change_threshold": 1.5,
        "change_adapt": 0.125,
        "answer_within_ms": 50,
        "retry_after_s": 3.0,
        "state_interval_s": 7.0,
    }
    made = load_config(config(**policy, **device), AgentSettings).device_config()
    assert {name: getattr(made, name) for name in device} == device
    assert {name: getattr(made.policy, name) for name in policy} == policy
    assert (made.node, made.model) == ("dev-1", "vibration")
