"""The link while its network misbehaves: a proxy between it and a real broker cuts, refuses and holds back."""

import random
import time
from dataclasses import replace

import pytest

from shoal.errors import LinkError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.v1.inference_pb2 import InferenceRequest
from simulator.proxy import Cut, FaultProxy

_PATIENCE_S = 20.0


class Recorder(random.Random):
    """Remembers how long each wait could have been; all waits are short."""

    def __init__(self):
        super().__init__(1)
        self.highs = []

    def uniform(self, a, b):
        assert a == 0.0
        self.highs.append(b)
        return 0.0


class Net:
    """One loop, a gateway straight at the broker, and a device behind the proxy."""

    def __init__(self, mosquitto, proxy, site):
        self.loop = Loop()
        self.proxy = proxy
        self.site = site
        self.rng = Recorder()
        self.asked = []
        config = parse_broker_url(mosquitto.url, session_expiry_s=0)
        self.gateway = Link(config, node_identity(site, "gw", "gateway"))
        self.gateway.subscribe(Route.INFER, lambda delivery: self.asked.append(delivery.message.model), site=site)
        self.presences = []
        self.gateway.subscribe(
            Route.PRESENCE, lambda delivery: self.presences.append(delivery.message), site=site, node="cam"
        )
        self.gateway.attach(self.loop)
        self.until(lambda: self.gateway.connected)

    def device(self, **settings):
        config = replace(parse_broker_url(f"mqtt://127.0.0.1:{self.proxy.port}"), **settings)
        return Link(config, node_identity(self.site, "cam", "device"), rng=self.rng)

    def until(self, ready):
        deadline = self.loop.clock() + _PATIENCE_S
        stop = self.loop.call_at(deadline, lambda _now: None)
        self.loop.run(until=lambda: ready() or self.loop.clock() >= deadline)
        stop.cancel()
        assert ready(), "it did not come in time"

    def ask(self, device, model, **options):
        request = InferenceRequest(device="cam", model=model)
        return device.publish(Route.INFER, request, site=self.site, node="cam", **options)


@pytest.fixture
def net(mosquitto, request):
    with FaultProxy("127.0.0.1", mosquitto.port) as proxy:
        made = Net(mosquitto, proxy, f"f{abs(hash(request.node.nodeid)) % 10**12}")
        yield made
        made.gateway.close()
        made.loop.close()


@pytest.fixture
def device(net):
    made = net.device(max_inflight=3, backoff_min_s=0.01, backoff_max_s=0.05, keepalive_s=1)
    yield made
    made.close()


@pytest.mark.parametrize("how", Cut)
def test_cut_fails_what_was_under_way_and_sends_nothing_again(net, device, how):
    """The outbox decides what to repeat; the link comes back with a birth and its subscriptions."""
    outcomes, replies = [], []
    device.subscribe(Route.INFER, replies.append, site=net.site, node="mic")
    device.attach(net.loop)
    net.until(lambda: device.connected and device.is_idle)
    net.proxy.partition()
    assert [net.ask(device, "lost", on_done=outcomes.append) for _ in range(4)] == [True, True, True, False]
    assert device.room() == 0
    net.proxy.cut(how)
    net.until(lambda: len(outcomes) == 3)
    assert all(isinstance(error, LinkError) and not error.permanent for error in outcomes)
    net.proxy.heal()
    net.until(lambda: device.connected and device.is_idle)
    assert device.room() == 3
    assert net.ask(device, "again")
    net.gateway.publish(Route.INFER, InferenceRequest(model="x"), site=net.site, node="mic")
    net.until(lambda: replies and "again" in net.asked)
    assert "lost" not in net.asked
    assert (device.counters["connects"], device.counters["disconnects"]) == (2, 1)


def test_will_of_the_cut_session_and_birth_of_the_next_are_told_apart(net, device):
    """By the session in them; the broker sends the will because no DISCONNECT came."""
    device.attach(net.loop)
    net.until(lambda: len(net.presences) == 1)
    net.proxy.cut(Cut.RST)
    net.until(lambda: len(net.presences) >= 3)
    told = [(presence.session, presence.online) for presence in net.presences]
    first, second = told[0][0], next(session for session, _ in told if session != told[0][0])
    assert sorted(told) == sorted([(first, True), (first, False), (second, True)])


def test_goodbye_leaves_no_will(net):
    """An offline presence of the same session, once, and no further attempt to connect."""
    device = net.device()
    device.attach(net.loop)
    net.until(lambda: len(net.presences) == 1)
    device.close()
    assert not net.ask(device, "late")
    net.until(lambda: len(net.presences) == 2)
    # What the broker would send for a will comes before what another client says after it.
    watcher = Link(net.gateway.config, node_identity(net.site, "watcher", "device"))
    watcher.attach(net.loop)
    net.until(lambda: watcher.connected)
    watcher.publish(Route.INFER, InferenceRequest(model="marker"), site=net.site, node="watcher")
    net.until(lambda: "marker" in net.asked)
    watcher.close()
    assert [presence.online for presence in net.presences] == [True, False]
    assert len({presence.session for presence in net.presences}) == 1
    assert net.proxy.counters().accepted == 1


def test_attempts_back_off_with_full_jitter_and_begin_anew_after_success(net, device):
    """Doubling up to the longest wait, from 0 each: a fleet does not come back as one."""
    net.proxy.refuse()
    device.attach(net.loop)
    net.until(lambda: len(net.rng.highs) == 5)
    assert net.rng.highs == [0.01, 0.02, 0.04, 0.05, 0.05]
    assert not net.ask(device, "refused")
    net.proxy.admit()
    net.until(lambda: device.connected)
    net.rng.highs.clear()
    net.proxy.cut(Cut.FIN)
    net.until(lambda: net.rng.highs)
    assert net.rng.highs == [0.01]


def test_silent_network_is_noticed_by_keepalive(net, device):
    """Sockets stay open in a partition; what was under way fails, and healing brings the link back."""
    outcomes = []
    device.attach(net.loop)
    net.until(lambda: device.connected and device.is_idle)
    net.proxy.partition()
    net.ask(device, "unheard", on_done=outcomes.append)
    net.until(lambda: outcomes)
    assert isinstance(outcomes[0], LinkError)
    assert not device.connected
    net.proxy.heal()
    net.until(lambda: device.connected)


def test_slow_network_delays_and_loses_nothing(net):
    """A window that was full opens as the broker answers, each message arrives once and in order."""
    device = net.device(max_inflight=5)
    outcomes = []
    device.attach(net.loop)
    net.until(lambda: device.connected and device.is_idle)
    net.proxy.partition()
    assert [net.ask(device, f"m{number}", on_done=outcomes.append) for number in range(6)] == [True] * 5 + [False]
    net.proxy.heal()
    net.until(lambda: len(outcomes) == 5 and len(net.asked) == 5)
    assert outcomes == [None] * 5
    assert net.asked == [f"m{number}" for number in range(5)]
    assert device.room() == 5
    device.close()


@pytest.mark.parametrize("how", Cut)
def test_goodbye_into_a_cut_line_is_given_up_at_once(net, device, how):
    """What cannot be written any more is not tried for a second on end."""
    device.attach(net.loop)
    net.until(lambda: device.connected and device.is_idle)
    net.proxy.cut(how)
    net.ask(device, "unheard")
    before = time.monotonic()
    device.close()
    assert time.monotonic() - before < 0.5
    assert device.is_idle


def test_refused_subscription_leaves_no_handler(net):
    """A mistake in the call does not occupy the route."""
    with pytest.raises(ValueError, match="retained"):
        net.gateway.subscribe(Route.STATE, print, group="g")
    net.gateway.subscribe(Route.STATE, net.presences.append)
