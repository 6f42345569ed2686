"""What the link does where the broker or its configuration says no."""

import random
from dataclasses import replace

import pytest

from fleet_console.broker import BrokerKind, start_broker
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route, topic
from shoal.v1.inference_pb2 import InferenceRequest

pytestmark = pytest.mark.device

_PATIENCE_S = 10.0


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def make_link(loop):
    """Links of site `a`; `url` and settings are a test's own."""
    made = []

    def make(node, url, **settings):
        config = replace(parse_broker_url(url, session_expiry_s=0), backoff_max_s=0.05, **settings)
        made.append(Link(config, node_identity("a", node, "device"), rng=random.Random(1)))
        made[-1].attach(loop)
        return made[-1]

    yield make
    for link in made:
        link.close()


def run_until(loop, ready):
    deadline = loop.clock() + _PATIENCE_S
    loop.call_at(deadline, lambda _now: None)
    loop.run(until=lambda: ready() or loop.clock() > deadline)
    assert ready(), "it did not come in time"


def ask(link, node, on_done=None):
    request = InferenceRequest(device=node, model="m")
    return link.publish(Route.INFER, request, on_done=on_done, site="a", node=node)


def test_forbidden_topic_is_a_permanent_refusal_and_ends_nothing(mosquitto, loop, make_link, tmp_path):
    """NotAuthorized comes in the PUBACK: the caller quarantines, the connection and its other messages go on."""
    rights = tmp_path / "acl"
    rights.write_text(f"topic readwrite {topic(Route.INFER, site='a', node='cam')}\ntopic read #\n")
    rights.chmod(0o644)
    with start_broker(tmp_path / "b", BrokerKind.MOSQUITTO, extra_config=f"acl_file {rights}\n") as broker:
        link = make_link("cam", broker.url)
        run_until(loop, lambda: link.connected and link.is_idle)
        refused_birth = link.counters["refused_publishes"]
        outcomes = {}
        assert ask(link, "cam", lambda error: outcomes.update(cam=error))
        assert ask(link, "mic", lambda error: outcomes.update(mic=error))
        run_until(loop, lambda: len(outcomes) == 2)
        assert outcomes["cam"] is None
        assert outcomes["mic"].permanent
        assert (link.counters["connects"], link.counters["refused_publishes"]) == (1, refused_birth + 1)
        link.close()


def test_broker_that_stops_and_comes_back_finds_its_subscribers(mosquitto, loop, make_link, tmp_path):
    """It has forgotten everything: birth and subscriptions are made again, and nobody is told to."""
    got = []
    with start_broker(tmp_path / "b", BrokerKind.MOSQUITTO) as broker:
        port = broker.port
        gateway, device = make_link("gw", broker.url), make_link("cam", broker.url)
        gateway.subscribe(Route.INFER, got.append, site="a")
        run_until(loop, lambda: gateway.is_subscribed and device.connected)
    run_until(loop, lambda: not gateway.connected and not device.connected)
    assert not ask(device, "cam")
    with start_broker(tmp_path / "c", BrokerKind.MOSQUITTO, port=port):
        run_until(loop, lambda: gateway.is_subscribed and device.connected and device.is_idle)
        assert ask(device, "cam")
        run_until(loop, lambda: got)
        for link in (gateway, device):
            link.close()


def test_birth_takes_its_place_in_the_window(broker, loop, make_link):
    """A broker that grants one message at a time never gets two."""
    link = make_link("cam", broker.url, max_inflight=1)
    room = []
    link.on_connect(lambda: room.append((link.room(), link.is_idle)))
    run_until(loop, lambda: link.room() == 1)
    assert room == [(0, False)]
    assert ask(link, "cam")
    assert link.room() == 0


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_authority_that_cannot_be_used_is_the_operators_to_mend(loop, make_link, tmp_path, content):
    """One line with the file's name, not a retry for ever."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    make_link("cam", "mqtts://127.0.0.1:1", tls_ca=str(path))
    with pytest.raises(ConfigError, match=r"TLS with .*ca\.pem: "):
        loop.run()


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "127.0.0.1"])
def test_host_that_cannot_be_reached_is_tried_again(loop, make_link, caplog, host):
    """A name that no host can have, one that is too long, and one where nobody listens: the loop goes on."""
    make_link("cam", f"mqtt://{host}:1", backoff_min_s=0.01)
    run_until(loop, lambda: len(caplog.records) >= 2)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
