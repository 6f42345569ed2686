"""Somebody else's topics over a real broker."""

import json
import random
from contextlib import closing

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from device_agent.sources.mqtt import MqttSettings, MqttSource
from device_agent.sources.settings import make_source
from shoal.errors import ConfigError
from shoal.link_config import LinkConfig, parse_broker_url

pytestmark = pytest.mark.device

SOME_BROKER = LinkConfig("localhost")


@pytest.fixture
def bridge(broker):
    """What another program publishes, once it is on the broker."""
    config = parse_broker_url(broker.url)
    client = Client(CallbackAPIVersion.VERSION2)
    client.connect(config.host, config.port)
    client.loop_start()

    def publish(topic, payload, *, retain=False):
        client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(10)

    yield publish
    client.disconnect()
    client.loop_stop()


@pytest.fixture
def topic(request):
    return f"zigbee2mqtt/{request.node.name[:30]}"


def serving(feed, broker_url, settings):
    """A source whose subscription the broker has confirmed."""
    made = MqttSource(settings, parse_broker_url(broker_url), "dev-1-source", random.Random(1))
    confirmed = []
    made._subscribed = lambda *_: confirmed.append(True)
    made.start(feed)
    feed.until(lambda: confirmed)
    return closing(made)


def test_json_of_one_topic_becomes_readings(broker, bridge, feed, topic):
    """Pins Zigbee2MQTT's way: all values in one message, picked by expressions, wildcards, bad ones told by field."""
    pytest.importorskip("jmespath", reason="left out: needs shoal[sensors]")
    settings = MqttSettings(topics=[f"{topic}/+"], values=["temperature", "humidity"])
    with serving(feed, broker.url, settings):
        bridge(f"{topic}/kitchen", json.dumps({"temperature": 21.5, "humidity": 40, "linkquality": 99}))
        bridge(f"{topic}/kitchen", json.dumps({"humidity": 41}))
        bridge(f"{topic}/bathroom", json.dumps({"temperature": 24, "humidity": 61}))
        feed.until(lambda: len(feed.readings) == 2)
    assert feed.values == [[21.5, 40], [24, 61]]
    assert all(topic.startswith(reference[:40]) or reference.startswith(topic) for reference in feed.references)
    assert [error.partition(": ")[2] for error in feed.refused] == ["temperature: nothing is not a number"]


def test_values_of_several_topics_make_one_reading(broker, bridge, feed, topic):
    """Pins ESPHome's way: a topic for each value; a reading is complete when each has come anew, newest first."""
    topics = [f"{topic}/t/state", f"{topic}/h/state"]
    with serving(feed, broker.url, MqttSettings(topics=topics)):
        for name, value in ((0, b"20"), (0, b"21"), (1, b"50"), (1, b"51"), (0, b"22")):
            bridge(topics[name], value)
        feed.until(lambda: len(feed.readings) == 2)
    assert feed.values == [[21, 50], [22, 51]]


@pytest.mark.parametrize("taken", [False, True])
def test_retained_values_are_old_unless_wanted(broker, bridge, feed, topic, taken):
    """Pins that a value of some other day is no reading of now."""
    bridge(topic, b"1", retain=True)
    with serving(feed, broker.url, MqttSettings(topics=[topic], retained=taken)):
        bridge(topic, b"2")
        feed.until(lambda: [2.0] in feed.values)
    bridge(topic, b"", retain=True)
    assert feed.values == ([[1], [2]] if taken else [[2]])


def test_lost_connection_is_a_gap_and_comes_back(broker, bridge, feed, topic):
    """Pins that half a reading is forgotten, no window spans the loss, and the source subscribes again."""
    topics = [f"{topic}/a", f"{topic}/b"]
    settings = MqttSettings(topics=topics)
    made = MqttSource(settings, parse_broker_url(broker.url), "dev-1-source", random.Random(1))
    confirmed = []
    made._subscribed = lambda *_: confirmed.append(True)
    with closing(made):
        made.start(feed)
        feed.until(lambda: confirmed)
        bridge(topics[0], b"1")
        feed.until(lambda: made._parts._values)
        made._client.socket().shutdown(2)
        feed.until(lambda: len(confirmed) == 2)
        bridge(topics[1], b"2")
        bridge(topics[0], b"3")
        feed.until(lambda: feed.readings)
    assert feed.values == [[3, 2]]
    assert feed.heard[0] == "gap"


def test_broker_that_is_not_there_is_tried_again(feed, caplog):
    """Pins that nobody waits: the loop runs on and the next try is planned."""
    made = MqttSource(MqttSettings(topics=["a"]), LinkConfig("127.0.0.1", 9), "dev-1-source", random.Random(1))
    with closing(made):
        made.start(feed)
        feed.until(lambda: "source cannot connect broker=127.0.0.1:9" in caplog.text)
        assert made._client is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topics": ["a", "b"], "values": ["@", "@", "@"]}, "3 values for 2 topics, expected 1 or as many"),
        ({"topics": ["a", "a"]}, "a topic is named twice"),
        ({"topics": ["a+"]}, r"'a\+' is not a topic filter"),
        ({"topics": ["#/a"]}, "'#/a' is not a topic filter"),
        ({"topics": ["a#"]}, "'a#' is not a topic filter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    """Pins what can be told before any broker is asked."""
    with pytest.raises(ConfigError, match=f"source mqtt: .*{message}"):
        MqttSource(MqttSettings(**settings), SOME_BROKER, "dev-1-source", random.Random(1))


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("", {"SHOAL_SOURCE_USERNAME": "no"}, ("localhost", "", "")),
        ("mqtt://ha.local", {}, ("ha.local", "", "")),
        ("mqtt://a:b@ha.local", {}, ("ha.local", "a", "b")),
        (
            "mqtt://ha.local",
            {"SHOAL_SOURCE_USERNAME": "reader", "SHOAL_SOURCE_PASSWORD": "x", "SHOAL_PASSWORD": "no"},
            ("ha.local", "reader", "x"),
        ),
    ],
)
def test_other_broker_has_credentials_of_its_own(url, environment, expected):
    """Pins that the agent's own password is never sent to somebody else's broker."""
    settings = MqttSettings(topics=["a"], broker=url)
    made = make_source(settings, node="d", broker=SOME_BROKER, rng=random.Random(1), environment=environment)
    assert (made._broker.host, made._broker.username, made._broker.password) == expected
