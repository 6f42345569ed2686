"""What applications on the device hear."""

import json
import os
import random
import subprocess
import threading

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from device_agent.answers import Answers, LineWriter, Result
from device_agent.answers_topic import MqttAnswers, TopicWriter
from device_agent.readings import AnsweredBy, Outcome
from shoal.errors import ConfigError
from shoal.link_config import parse_broker_url
from shoal.loop import Loop
from shoal.v1 import inference_pb2 as pb
from tests.device_agent.test_agent import ROWS, command, config, environment, gateway  # noqa: F401  fixtures

pytestmark = pytest.mark.device


def own(seq, reason, by=AnsweredBy.DEVICE):
    return Outcome(seq, f"row:{seq}", by, 1, 0.5, 0, reason)


def gateways(seq, by=AnsweredBy.GATEWAY):
    return Outcome(seq, "", by, 7, 0.9, 1, "answered", 0.2)


class Ear:
    """Answers with a deadline of a quarter of a second, and what it told: number, by whom, late or not."""

    def __init__(self, within_s=0.25):
        self.results = []
        self.answers = Answers(within_s, self.results.append)

    @property
    def told(self):
        return [(result.seq, result.by, result.is_late) for result in self.results]


def test_own_answer_is_final_where_nobody_is_asked():
    """Pins that it is told at once, and that a reading without a new answer is not told at all."""
    ear = Ear()
    ear.answers.hear(own(1, "kept.below_threshold"), 0.0)
    ear.answers.hear(own(2, "kept.unchanged", AnsweredBy.NOBODY), 0.0)
    ear.answers.tick(10.0)
    assert ear.told == [(1, AnsweredBy.DEVICE, False)]


@pytest.mark.parametrize("by", [AnsweredBy.GATEWAY, AnsweredBy.CACHE])
def test_gateways_answer_in_time_is_the_only_one(by):
    """Pins one result, with the source's own reference and who it came from."""
    ear = Ear()
    ear.answers.hear(own(1, "asked.score"), 0.0)
    ear.answers.tick(0.24)
    ear.answers.hear(gateways(1, by), 0.24)
    ear.answers.tick(10.0)
    assert ear.results == [Result(1, "row:1", by, 7, 0.9, 1, 0.2, is_late=False)]


@pytest.mark.parametrize("by", [AnsweredBy.DEVICE, AnsweredBy.NOBODY])
def test_own_answer_stands_where_the_gateway_is_silent(by):
    """Pins the deadline: final once, at it and not before; the gateway's answer is late by then, and told as such."""
    ear = Ear()
    ear.answers.hear(own(1, "asked.no_model", by), 0.0)
    ear.answers.tick(0.249)
    assert ear.told == []
    ear.answers.tick(0.25)
    ear.answers.tick(0.3)
    ear.answers.hear(gateways(1), 0.4)
    assert ear.told == [(1, by, False), (1, AnsweredBy.GATEWAY, True)]
    assert ear.results[1].reference == "row:1"


def test_without_hurry_the_gateway_has_all_the_time():
    """Pins that 0 is no deadline."""
    ear = Ear(within_s=0.0)
    ear.answers.hear(own(1, "asked.score"), 0.0)
    ear.answers.tick(1e6)
    assert ear.told == []
    ear.answers.hear(gateways(1), 1e6)
    assert ear.told == [(1, AnsweredBy.GATEWAY, False)]


def test_waiting_is_bounded():
    """Pins that a gateway which is gone for good costs no memory: the oldest own answers stand."""
    ear = Ear(within_s=0.0)
    for seq in range(3000):
        ear.answers.hear(own(seq, "asked.score"), 0.0)
    assert ear.told == [(seq, AnsweredBy.DEVICE, False) for seq in range(3000 - 1024)]


@pytest.mark.parametrize("cached", [False, True])
def test_device_tells_whether_the_gateway_remembered(rig, cached):
    """Pins the way of the mark, from the reply to the application."""
    outcome = rig.ask()
    rig.reply(outcome.seq, answer=pb.Answer(release=3, score=0.1, from_cache=cached))
    assert rig.outcomes[-1].by is (AnsweredBy.CACHE if cached else AnsweredBy.GATEWAY)


def test_lines_that_nobody_reads_are_dropped_and_do_not_block(caplog):
    """Pins that an application which hangs or dies holds up nothing; every line that arrives is whole."""
    reading, writing = os.pipe()
    writer = LineWriter(writing)
    result = Result(1, "row:1", AnsweredBy.DEVICE, 1, 0.5, None, 0.0, is_late=False)
    for _ in range(2000):
        writer(result)
    assert writer.dropped > 0
    assert len(caplog.records) < 20
    lines = os.read(reading, 1 << 20).splitlines()
    assert {json.loads(line)["by"] for line in lines} == {"device"}
    assert len(lines) == 2000 - writer.dropped
    os.close(reading)
    dropped = writer.dropped
    writer(result)
    assert writer.dropped == dropped + 1
    os.close(writing)


def test_agent_prints_results_for_programs(config, gateway):  # noqa: F811
    """Pins `[answers]`: one JSON object for each answer, on standard output, and nothing else there."""
    peer = gateway()
    file = config()
    file.write_text(file.read_text() + '\n[answers]\nkind = "stdout"\n')
    with subprocess.Popen(command(file), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as agent:
        peer.until(lambda: peer.counters.get("answered") == ROWS)
        agent.terminate()
        lines = agent.communicate(timeout=30)[0].splitlines()
    results = [json.loads(line) for line in lines]
    assert sorted(result["reference"] for result in results) == [f"readings:{row}" for row in range(1, ROWS + 1)]
    assert {(result["by"], result["is_late"]) for result in results} == {("gateway", False)}


def test_agent_publishes_results_on_a_topic_of_the_device(config, gateway, broker):  # noqa: F811
    """Pins `kind = "mqtt"`: an application that subscribes hears the same objects."""
    address = parse_broker_url(broker.url)
    peer = gateway()
    topic = f"answers/{peer.site}"
    heard = []
    listener = Client(CallbackAPIVersion.VERSION2)
    subscribed = threading.Event()
    listener.on_connect = lambda client, *_: client.subscribe(topic)
    listener.on_subscribe = lambda *_: subscribed.set()
    listener.on_message = lambda _client, _userdata, message: heard.append(json.loads(message.payload))
    listener.connect(address.host, address.port)
    listener.loop_start()
    assert subscribed.wait(10)
    # Slowly, so that the agent's client for the answers is there before the last of them.
    file = config(source={"rate_hz": 1.0})
    file.write_text(file.read_text() + f'\n[answers]\nkind = "mqtt"\ntopic = "{topic}"\nbroker = "{broker.url}"\n')
    with subprocess.Popen(command(file), env=environment(), stderr=subprocess.DEVNULL) as agent:
        peer.until(lambda: bool(heard))
        agent.terminate()
    listener.loop_stop()
    listener.disconnect()
    assert (heard[0]["by"], heard[0]["is_late"]) == ("gateway", False)
    assert heard[0]["reference"].startswith("readings:")


@pytest.mark.parametrize("topic", ["", "a/+", "#", "shoal/v1/up/x", "$SYS/x"])
def test_topic_for_answers_is_checked(topic):
    """Wildcards cannot be published to, and Shoal's own topics have a contract."""
    with pytest.raises(ConfigError, match="expected a plain topic"):
        TopicWriter(MqttAnswers(topic), "dev-1", random.Random(1))


def test_results_without_a_broker_are_dropped_and_do_not_block():
    """The agent never waits for whoever listens."""
    writer = TopicWriter(MqttAnswers("answers", "mqtt://127.0.0.1:1"), "dev-1", random.Random(1))
    loop = Loop()
    writer.attach(loop)
    writer._tick(loop, loop.clock())
    writer(Result(1, "row:1", AnsweredBy.DEVICE, 1, 0.5, None, 0.0, is_late=False))
    assert writer.dropped == 1
    writer.close()
    loop.close()
