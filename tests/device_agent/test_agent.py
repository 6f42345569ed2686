"""The agent as a process, and what its settings refuse."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from device_agent.agent import Agent, AgentSettings
from device_agent.agent import run as run_agent
from device_agent.change import ChangeSettings, DeadBandSettings, EwmaSettings, RateSettings
from device_agent.outbox_report import read_outbox
from device_agent.readings import AnsweredBy
from shoal.config import load_config
from shoal.delivery.outbox import Outbox
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.release.client import UpdateClient
from shoal.routes import Route
from shoal.v1 import inference_pb2 as pb
from shoal.v1.command_pb2 import COMMAND_STATUS_DONE, Command, Restart

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
        self.state = None
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
        self.state = delivery.message
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
        made[-1].until(lambda: made[-1].link.connected and made[-1].link.is_idle)  # the broker has its birth
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

    def write(*, source=None, change=None, extra="", **changed):
        table = {"kind": "csv", "path": str(tmp_path / "readings.csv"), "columns": ["b", "a"], "rate_hz": 50.0}
        if source is not None:
            table = source if "kind" in source else table | source
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
        lines += [extra, "[broker]", f"url = {broker.url!r}", "[source]"]
        lines += [f"{key} = {value!r}" for key, value in table.items()]
        if change is not None:
            lines += ["[change]", *(f"{key} = {value!r}" for key, value in change.items())]
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
    assert (len(peer.state.boot_id), peer.state.boot_count) == (16, 1)
    assert peer.state.since_boot_us > 0
    peer.until(lambda: peer.online is False)


def test_agent_restarts_on_command_and_answers_first(config, gateway):
    """Pins the status that makes systemd start it again, and that whoever commanded it hears of it."""
    peer = gateway()
    results = []
    peer.link.subscribe(Route.RESULT, lambda delivery: results.append(delivery.message), site=peer.site)
    expires = int((time.time() + 60) * 1e6)
    order = Command(id=b"1", expires_at_us=expires, restart=Restart())
    with running(config()) as agent:
        peer.until(lambda: peer.counters.get("answered"))
        assert peer.link.publish(Route.COMMAND, order, site=peer.site, node="dev-1")
        peer.until(lambda: results)
        assert agent.wait(PATIENCE_S) == 75
    assert (results[0].id, results[0].status) == (b"1", COMMAND_STATUS_DONE)


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


def test_agent_that_spares_the_flash_writes_what_it_owes_when_it_ends(config, gateway, tmp_path):
    """Pins `outbox_hold_s` in the agent: what was asked while it was held is on disk after SIGTERM."""
    peer = gateway(deaf_first=True)
    file = tmp_path / "data" / "outbox.sqlite"
    with running(config(outbox_hold_s=600.0, retry_after_s=600.0)) as agent:
        peer.until(lambda: len(peer.rows) == ROWS)
        agent.send_signal(signal.SIGTERM)
        agent.communicate(timeout=PATIENCE_S)
    assert (agent.returncode, read_outbox(file).waiting) == (0, ROWS)
    assert read_outbox(file).counters == {"produced": ROWS, "asked.no_model": ROWS, "accepted": ROWS}


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
        run_agent(load_config(config(source={"path": str(tmp_path / "broken.csv")}), AgentSettings), until_dry=True)
    assert excused == ["ordered"]


def test_agent_runs_a_function_of_the_application(config, gateway):
    """Pins the Python API: readings of a function, which no table names, and outcomes told to the application."""
    peer = gateway()
    file = config()
    file.write_text(file.read_text().partition("[source]")[0])
    values = iter([1.0, 2.0])
    outcomes = []
    serving = threading.Thread(target=peer.loop.run)
    serving.start()
    try:
        agent = Agent(load_config(file, AgentSettings), lambda: next(values), rate_hz=50.0, on_outcome=outcomes.append)
        agent.run(until_dry=True)
    finally:
        peer.loop.stop()
        serving.join()
    assert [list(row.reading.scalars.values) for row in peer.rows] == [[1.0], [2.0]]
    assert Counter(outcome.by for outcome in outcomes) == {AnsweredBy.NOBODY: 2, AnsweredBy.GATEWAY: 2}


class EndedSource:
    """A source of the application's own that has nothing."""

    calls = ()

    def start(self, feed):
        self.calls += ("start",)
        feed.end()

    def close(self):
        self.calls += ("close",)


def test_agent_starts_and_closes_a_source_that_it_is_given(config):
    """Pins the protocol for sources of the application's own, which are used instead of the table's."""
    source = EndedSource()
    Agent(load_config(config(), AgentSettings), source).run(until_dry=True)
    assert source.calls == ("start", "close")


def test_agent_without_any_source_says_so(config):
    """Pins the line for a table that was forgotten."""
    file = config()
    file.write_text(file.read_text().partition("[source]")[0])
    assert refusal(file) == "shoal: no readings: the settings have no [source], and the application gives none\n"


@contextmanager
def watching(url, site, count):
    """`shoal watch` on what a site asks, once it hears; yields a function that waits for its lines."""
    pytest.importorskip("rich", reason="left out: needs shoal[console]")
    filters = [f"shoal/v1/up/{site}/gw/presence", f"shoal/v1/up/{site}/+/infer"]
    arguments = ["watch", *filters, "--broker", url, "--json", "--count", str(count + 1)]
    code = "from fleet_console.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            # The gateway's birth is retained: its line says that the subscription stands.
            assert json.loads(process.stdout.readline())["retained"]
            yield lambda: [json.loads(line) for line in process.communicate(timeout=PATIENCE_S)[0].splitlines()]
        finally:
            process.kill()


def asked_in(lines):
    """Reference and values of every row that was seen, in order."""
    rows = [row["reading"] for line in lines for row in line["message"]["rows"]]
    rows.sort(key=lambda row: int(row.get("seq", 0)))
    return [(row["reference"], row["scalars"]["values"]) for row in rows]


def test_agent_on_a_zigbee_topic_asks_and_is_seen(config, gateway, broker, request):
    """Pins an agent beside Zigbee2MQTT over a real broker: mapped, asked, answered, shown by `shoal watch`."""
    pytest.importorskip("jmespath", reason="left out: needs shoal[sensors]")
    peer = gateway()
    site = site_of(request)
    topic = f"zigbee2mqtt/{site[-20:]}"
    source = {"kind": "mqtt", "topics": [topic], "values": ["temperature", "humidity"]}
    publisher = Client(CallbackAPIVersion.VERSION2)
    address = parse_broker_url(broker.url)
    publisher.connect(address.host, address.port)

    def publish(**values):
        publisher.publish(topic, json.dumps({"linkquality": 120, **values}))
        publisher.loop_write()

    sent = []

    def publish_until_heard(_now):
        if not peer.rows:  # nobody but the agent knows when it has subscribed
            sent.append(len(sent))
            publish(temperature=20 + len(sent), humidity=40)

    with watching(broker.url, site, count=1) as shown, running(config(source=source)) as agent:
        beat = peer.loop.call_every(0.1, publish_until_heard)
        peer.until(lambda: peer.counters.get("answered"))
        beat.cancel()
        publish(state="OFF")
        peer.until(lambda: peer.counters.get("bad_readings") == 1)
        agent.send_signal(signal.SIGTERM)
        _, errors = agent.communicate(timeout=PATIENCE_S)
        ((reference, (temperature, humidity)), *_) = asked_in(shown())
    publisher.disconnect()
    assert (reference, humidity) == (topic, 40)
    assert 20 < temperature <= 20 + len(sent)
    assert f"bad input refused=1 last: {topic}: temperature: nothing is not a number" in errors


def test_agent_on_a_directory_of_images_asks_and_is_seen(config, gateway, broker, request, tmp_path):
    """Pins pictures over a real broker, with nothing installed that reads pictures: asked, shown by `shoal watch`."""
    peer = gateway()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, level in (("a", 10), ("b", 250)):
        (folder / f"{name}.pgm").write_bytes(b"P5 4 2 255\n" + bytes([level] * 8))
    source = {"kind": "images", "path": str(folder), "size": [1, 2], "rate_hz": 20.0}
    with watching(broker.url, site_of(request), count=1) as shown, running(config(source=source)):
        peer.until(lambda: peer.counters.get("answered") == 2)
        seen = asked_in(shown())
    asked = sorted((row.reading.reference, list(row.reading.scalars.values)) for row in peer.rows)
    assert asked == [("a.pgm", [10, 10]), ("b.pgm", [250, 250])]
    assert seen == asked[: len(seen)]  # its one message may hold one row or both
    assert seen


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
        ({"max_share": 0.001}, "audit_share 0.005, max_share 0.001"),
        ({"extra": "change_threshold = 0.5"}, "change_threshold"),
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
    file = config(source={"path": str(source), "rate_hz": 1e6})
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
        ("audit_share", -0.1),
        ("max_share", 0.0),
        ("max_per_minute", 0),
        ("max_per_day", 0),
        ("max_bytes_per_minute", -1),
        ("max_bytes_per_day", 0),
        ("answer_within_ms", -1),
        ("answer_within_ms", 1 << 32),
        ("retry_after_s", 0.0),
        ("outbox_items", 0),
        ("outbox_bytes", 0),
        ("outbox_hold_s", -1.0),
        ("outbox_hold_items", 0),
        ("state_interval_s", 0.0),
        ("state_interval_s", 601.0),
        ("probation_s", -1.0),
        ("runtime", "onnx"),
    ],
)
def test_setting_out_of_range_is_refused_by_name(config, key, value):
    """Pins that a number which the agent could not run with is found when the file is read."""
    with pytest.raises(ConfigError, match=rf"\$\.{key}"):
        load_config(config(**{key: value}), AgentSettings)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"rate_hz": 0.0}, "rate_hz"),
        ({"columns": []}, "columns"),
        ({"speed": 3}, "speed"),
        ({"delimiter": ";;"}, "delimiter"),
        ({"kind": "telepathy"}, "kind"),
        ({"kind": "host", "values": ["mood"]}, "mood"),
        ({"kind": "host", "values": []}, "values"),
        ({"kind": "images", "path": "x", "size": [0, 3]}, "size"),
        ({"kind": "images", "path": "x", "rate_hz": 1e6}, "rate_hz"),
        ({"kind": "camera", "rate_hz": 0.0}, "rate_hz"),
        ({"kind": "mqtt", "topics": []}, "topics"),
        ({"kind": "mqtt", "topics": ["a"], "values": []}, "values"),
        ({"kind": "stdin", "path": "x"}, "path"),
    ],
)
def test_source_that_cannot_be_is_refused_by_name(config, source, named):
    """Pins that every kind's table is checked while the file is read."""
    with pytest.raises(ConfigError, match=rf"{named}.*\$\.source|\$\.source\.{named}"):
        load_config(config(source=source), AgentSettings)


def _missing_runtime():
    """The one that this environment lacks."""
    return "tflite" if find_spec("ai_edge_litert") else "litert"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"site": "Plant"}, "site: 'Plant' is not an id"),
        ({"model": "../model"}, "model: '../model' is not an id"),
        ({"data_dir": "/dev/null/data"}, "data_dir /dev/null/data: Not a directory"),
        ({"runtime": _missing_runtime()}, "no TFLite runtime for"),
        ({"source": {"kind": "mqtt", "topics": ["a#"]}}, "source mqtt: 'a#' is not a topic filter"),
        ({"source": {"kind": "images", "path": "/nowhere"}}, "source /nowhere: No such file"),
    ],
)
def test_names_that_cannot_be_used_are_refused(config, changed, message):
    """Pins that ids and folders are checked before anything is opened."""
    settings = load_config(config(**changed), AgentSettings)
    with pytest.raises(ConfigError, match=message):
        run_agent(settings)


def test_settings_of_the_file_reach_the_device(config):
    """Pins that every setting of a device's has its key in the file, under the same name."""
    policy = {
        "audit_share": 0.25,
        "max_share": 0.5,
        "max_per_minute": 9,
        "max_per_day": 99,
        "max_bytes_per_minute": 900,
        "max_bytes_per_day": 9900,
        "score_threshold": 0.75,
    }
    device = {
        "answer_within_ms": 50,
        "retry_after_s": 3.0,
        "state_interval_s": 7.0,
        "runtime": "tflite",
    }
    made = load_config(config(**policy, **device), AgentSettings).device_config()
    assert {name: getattr(made, name) for name in device} == device
    assert {name: getattr(made.policy, name) for name in policy} == policy
    assert (made.node, made.model) == ("dev-1", "vibration")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"kind": "dead_band", "threshold": 1.5, "adapt": 0.125}, DeadBandSettings(threshold=1.5, adapt=0.125)),
        ({"kind": "dead_band", "threshold": [1.5, 2]}, DeadBandSettings(threshold=(1.5, 2.0))),
        ({"kind": "ewma", "threshold": 4.0, "adapt": 0.5}, EwmaSettings(threshold=4.0, adapt=0.5)),
        ({"kind": "rate", "threshold": [1.0], "per": "reading"}, RateSettings(threshold=(1.0,), per="reading")),
    ],
)
def test_change_table_reaches_the_device(config, table, expected):
    """Pins each kind of the `[change]` table with its settings."""
    assert load_config(config(change=table), AgentSettings).device_config().change == expected


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"kind": "dead_band", "threshold": -0.1}, "threshold"),
        ({"kind": "dead_band", "adapt": 1.5}, "adapt"),
        ({"kind": "ewma", "adapt": 0.0}, "adapt"),
        ({"kind": "ewma", "threshold": []}, "threshold"),
        ({"kind": "rate"}, "threshold"),
        ({"kind": "rate", "threshold": 1.0, "per": "hour"}, "per"),
        ({"kind": "mood"}, "kind"),
        ({"threshold": 1.0}, "kind"),
        ({"kind": "dead_band", "per": "second"}, "per"),
    ],
)
def test_change_that_cannot_be_is_refused_by_name(config, table, named):
    """Pins that every kind's table is checked while the file is read."""
    with pytest.raises(ConfigError, match=rf"{named}.*\$\.change|\$\.change\.{named}"):
        load_config(config(change=table), AgentSettings)


def test_every_kind_of_change_is_documented():
    """Pins the page: each kind with its own keys. The agent's keys are pinned with the file that has them all."""
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    table = page.partition("## What has not changed")[2].partition("\n## ")[0]
    for kind in get_args(ChangeSettings):
        row = table.partition(f"| `{kind.__struct_config__.tag}` |")[2].partition("\n")[0]
        assert [name for name in kind.__struct_fields__ if f"`{name}`" not in row] == []
