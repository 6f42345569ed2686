"""The fleet in C against the echo in C, through a real broker: a benchmark is worth what its generator counts."""

import contextlib
import json
import signal
import struct
import subprocess
import threading

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from benchmarks.gateway.native import build, find_compiler
from benchmarks.gateway.payloads import DEVICES, device_name, payload_count, read_payload, typical_reply, write_payloads
from benchmarks.gateway.processes import running
from shoal.v1 import inference_pb2 as pb

_PATIENCE_S = 60
_STALL_S = 0.5


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    if find_compiler() is None:
        pytest.skip("left out: needs a C compiler")
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def payloads(tmp_path_factory):
    path = tmp_path_factory.mktemp("payloads") / "requests"
    write_payloads(path, "mlp", (3072,))
    return path


def command(programs, port, payloads, *options):
    return [programs / "mqtt_load", "--port", str(port), "--site", "echo", "--payloads", payloads, *options]


def ask(programs, port, payloads, *options):
    """Run the fleet and return what it counted."""
    arguments = command(programs, port, payloads, *options)
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=_PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def echo(programs, port, reply, tmp_path):
    (tmp_path / "reply").write_bytes(reply)
    arguments = [programs / "mqtt_echo", "--port", str(port), "--site", "echo", "--reply", tmp_path / "reply"]
    return running(arguments, tmp_path / "echo.log", ready="ready")


@contextlib.contextmanager
def watching(port, on_message):
    """A client that hears every question."""
    client = Client(CallbackAPIVersion.VERSION2, "watcher", protocol=MQTTv5)
    client.on_message = on_message
    client.on_connect = lambda *_: client.subscribe("shoal/v1/up/echo/+/infer", qos=1)
    is_subscribed = threading.Event()
    client.on_subscribe = lambda *_: is_subscribed.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert is_subscribed.wait(_PATIENCE_S)
    yield
    client.disconnect()
    client.loop_stop()


@pytest.mark.parametrize("options", [["--outstanding", "64"], ["--rate", "2000"], ["--qos", "0"], ["--devices", "3"]])
def test_each_question_is_answered_once(mosquitto, programs, payloads, tmp_path, options):
    """200 questions, 200 answers, none of them twice, none of them an error; closed loop and open, QoS 1 and 0."""
    with echo(programs, mosquitto.port, typical_reply("mlp"), tmp_path):
        counted = ask(programs, mosquitto.port, payloads, "--count", "200", "--seconds", "30", *options)
    assert (counted["requests"], counted["answered"], counted["unsent"]) == (200, 200, 0)
    assert (counted["errors"], counted["strays"], counted["unanswered"]) == (0, 0, 0)
    assert counted["seconds"] < 30
    assert 0 < counted["p50_us"] <= counted["p99_us"] <= counted["p999_us"]


def test_reply_that_is_no_answer_is_an_error(mosquitto, programs, payloads, tmp_path):
    """A gateway that refuses everything is fast; that must not count."""
    refused = pb.InferenceReply(
        rows=[pb.RowReply(seq=1, status=pb.STATUS_OK), pb.RowReply(seq=2, status=pb.STATUS_INTERNAL)]
    )
    for reply in (refused.SerializeToString(), pb.InferenceReply().SerializeToString(), b"\xff"):
        with echo(programs, mosquitto.port, reply, tmp_path):
            counted = ask(programs, mosquitto.port, payloads, "--count", "10", "--seconds", "30")
        assert (counted["answered"], counted["errors"]) == (10, 10)


def test_being_told_to_ask_again_is_an_error_of_its_own(mosquitto, programs, payloads, tmp_path):
    """A flood that is turned away is neither served nor broken."""
    full, broken = [pb.STATUS_OK, pb.STATUS_RESOURCE_EXHAUSTED], [pb.STATUS_INTERNAL]
    for statuses, exhausted in ((full[1:], 10), (full, 10), (broken, 0)):
        reply = pb.InferenceReply(rows=[pb.RowReply(seq=1, status=status) for status in statuses])
        with echo(programs, mosquitto.port, reply.SerializeToString(), tmp_path):
            counted = ask(programs, mosquitto.port, payloads, "--count", "10", "--seconds", "30")
        assert (counted["answered"], counted["errors"], counted["exhausted"]) == (10, 10, exhausted)


def test_second_answer_is_counted_apart(mosquitto, programs, payloads):
    """It makes nothing faster."""

    def answer_twice(client, _userdata, question):
        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData = question.properties.CorrelationData
        topic = question.topic.replace("/up/", "/down/").replace("/infer", "/reply")
        for _ in range(2):
            client.publish(topic, typical_reply("mlp"), qos=1, properties=properties)

    with watching(mosquitto.port, answer_twice):
        options = ["--count", "100", "--seconds", "30", "--devices", "1", "--outstanding", "1"]
        counted = ask(programs, mosquitto.port, payloads, *options)
    assert (counted["requests"], counted["answered"], counted["unanswered"]) == (100, 100, 0)
    # The last one's may come after the end.
    assert counted["strays"] in {99, 100}


def test_silence_is_counted(mosquitto, programs, payloads):
    """Nobody serves the site: what was sent has no answer, and the program ends all the same."""
    counted = ask(programs, mosquitto.port, payloads, "--seconds", "0.2", "--outstanding", "5")
    assert (counted["requests"], counted["answered"], counted["unanswered"]) == (5, 0, 5)


def test_a_stall_is_charged_to_every_question_that_it_delays(mosquitto, programs, payloads, tmp_path):
    """Open loop: stopped for a while, the fleet asks late what fell due meanwhile, and counts from when it was due."""
    asked = threading.Event()
    with (
        watching(mosquitto.port, lambda *_: asked.set()),
        echo(programs, mosquitto.port, typical_reply("mlp"), tmp_path),
    ):
        fleet = subprocess.Popen(
            command(programs, mosquitto.port, payloads, "--rate", "200", "--seconds", "2"), stdout=subprocess.PIPE
        )
        assert asked.wait(_PATIENCE_S)
        fleet.send_signal(signal.SIGSTOP)
        threading.Event().wait(_STALL_S)
        fleet.send_signal(signal.SIGCONT)
        counted = json.loads(fleet.communicate(timeout=_PATIENCE_S)[0])
    assert (counted["requests"], counted["unanswered"]) == (400, 0)
    assert counted["p99_us"] > 0.8 * _STALL_S * 1e6


def test_payloads_are_their_devices_own_and_differ(payloads):
    """Payload i is of device i % DEVICES, and the answer cache never has one of them when it comes round."""
    count = struct.unpack("<I", payloads.read_bytes()[:4])[0]
    assert count == payload_count((3072,))
    assert count % DEVICES == 0
    asked = [pb.InferenceRequest.FromString(read_payload(payloads, index)) for index in (0, 1, DEVICES, count - 1)]
    assert [request.device for request in asked] == [device_name(index) for index in (0, 1, 0, DEVICES - 1)]
    assert len({request.rows[0].reading.tensor.data for request in asked}) == len(asked)
    assert asked[0].epoch == asked[2].epoch != asked[1].epoch
    assert count * 3072 * 4 > 16 << 20


def test_another_fleet_asks_under_its_own_names_about_other_things(tmp_path, payloads):
    """So that the cache never answers one fleet what another one asked."""
    write_payloads(tmp_path / "flood", "mlp", (3072,), prefix="flood", devices=1)
    files = (tmp_path / "flood", payloads)
    asked, others = ([pb.InferenceRequest.FromString(read_payload(path, i)) for i in range(3)] for path in files)
    assert {request.device for request in asked} == {"flood00"}
    assert len({request.rows[0].reading.tensor.data for request in asked + others}) == 6
