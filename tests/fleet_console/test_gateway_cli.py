"""`shoal gateway record` and `shoal gateway tune`, as an operator runs them."""

import json
import threading

import pytest
from typer.testing import CliRunner

from edge_gateway.trace import Asked, format_line, parse_trace
from fleet_console.cli import app
from fleet_console.recorder import record
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import Scalars, SensorData
from tests.edge_gateway.test_gateway_live import linear

PATIENCE_S = 10.0


def question(device, rows=1, sender=None):
    row = pb.InferenceRow(reading=SensorData(seq=1, scalars=Scalars(values=[1.0, 2.0])))
    return pb.InferenceRequest(device=sender or device, epoch=b"e" * 16, model="m", rows=[row] * rows)


class Fleet:
    """Devices that ask again and again, until they are told to end."""

    def __init__(self, url, site):
        self.loop = Loop()
        self.site = site
        self.links = {}
        for device in ("cam1", "cam2"):
            self.links[device] = Link(parse_broker_url(url, session_expiry_s=0), node_identity(site, device, "device"))
            self.links[device].attach(self.loop)
        self.loop.call_every(0.005, self.ask)

    def ask(self, _now):
        for device, message in (
            ("cam1", question("cam1", rows=3)),
            ("cam2", question("cam2")),
            ("cam2", question("cam2", sender="cam1")),
        ):
            self.links[device].publish(Route.INFER, message, site=self.site, node=device)

    def close(self):
        for link in self.links.values():
            link.close()
        self.loop.close()


def test_recording_has_who_asked_when_and_how_much(broker, tmp_path):
    """And neither what they said, nor what is not their own; the count ends it."""
    fleet = Fleet(broker.url, "recorded")
    thread = threading.Thread(target=fleet.loop.run)
    thread.start()
    out = tmp_path / "trace.jsonl"
    try:
        recorder = record(broker.url, "recorded", out, PATIENCE_S, 20)
    finally:
        fleet.loop.stop()
        thread.join()
        fleet.close()
    with out.open("rb") as lines:
        trace = parse_trace(lines)
    assert len(trace) >= 20
    assert {(each.device, each.model, each.rows) for each in trace} == {("cam1", "m", 3), ("cam2", "m", 1)}
    assert {each.bytes for each in trace} == {question("cam1", rows=3).ByteSize(), question("cam2").ByteSize()}
    assert trace[0].at_s < trace[-1].at_s < PATIENCE_S
    assert recorder.unreadable > 0


def test_recording_of_silence_says_so(broker, tmp_path):
    """It ends when it was told to; an empty file is no trace."""
    out = tmp_path / "trace.jsonl"
    arguments = ["gateway", "record", "--site", "silent", "--seconds", "0.2", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--broker", broker.url])
    assert result.exit_code == 0
    assert result.output.startswith("0 questions in ")
    assert out.read_bytes() == b""


def test_recording_without_a_broker_says_so(tmp_path):
    """One line, with what to do."""
    with pytest.raises(ConfigError, match="start one with `shoal broker`"):
        record("mqtt://127.0.0.1:1", "s", tmp_path / "trace.jsonl", 1.0, 0)
    with pytest.raises(ConfigError, match="No such file"):
        record("mqtt://127.0.0.1:1", "s", tmp_path / "no" / "trace.jsonl", 1.0, 0)


@pytest.fixture
def tune(tmp_path):
    """Run `shoal gateway tune` on a trace of so many questions a second."""

    def run(rate, *options, lines=None, model="m"):
        path = tmp_path / "trace.jsonl"
        asked = [Asked(index / rate, f"d{index % 60}", model, 1, 40) for index in range(3000)]
        path.write_bytes(lines if lines is not None else b"".join(map(format_line, asked)))
        file = linear(tmp_path / "linear.onnx")
        arguments = ["--model", str(file), "--trace", str(path), "--seconds", "0.2", "--cores", "1", *options]
        return CliRunner().invoke(app, ["gateway", "tune", *arguments])

    return run


def test_advice_is_a_table_and_lines_for_the_configuration(tune):
    """What is printed last can be pasted into gateway.toml."""
    result = tune(100)
    assert result.exit_code == 0
    assert "p99 ms" in result.output
    assert "\nmax_batch_size = " in result.output
    assert "\nmax_delay_ms = 0.0\n" in result.output
    assert "workers =" not in result.output


def test_advice_for_machines_is_json(tune):
    """The best candidate, all others, and what was measured."""
    found = json.loads(tune(100, "--json").output)
    assert found["best"] in found["candidates"]
    assert found["best"]["keeps_up"]
    assert {each["max_batch_size"] for each in found["candidates"]} == {1, 2, 4, 8, 16, 32, 64}
    assert {each["rows"] for each in found["costs_us"]["batch"]} == {1, 2, 4, 8, 16, 32, 64}


def test_trace_that_nothing_keeps_up_with_is_told(tune):
    """Ten thousand times as fast is more than any machine takes."""
    result = tune(1000, "--speed", "100000")
    assert result.exit_code == 1
    assert "No setting keeps up" in result.output


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (b'{"at_s": 0}\n', "trace.jsonl: line 1: Object missing required field `device`"),
        (b"", "trace.jsonl: no requests in it"),
    ],
)
def test_trace_that_is_none_is_told(tune, lines, said):
    """With its file, line and field."""
    result = tune(1, lines=lines)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).endswith(said)
