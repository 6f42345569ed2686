"""From bytes to handlers, and acknowledgements in order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.acks import AckQueue
from shoal.errors import PayloadError
from shoal.inbox import Inbox
from shoal.routes import Route, topic
from shoal.v1.command_pb2 import Command
from shoal.v1.inference_pb2 import InferenceReply

pytestmark = pytest.mark.device

_REPLY = topic(Route.REPLY, site="a", node="cam")
_COMMAND = topic(Route.COMMAND, site="a", node="cam")
_PRESENCE = topic(Route.PRESENCE, site="a", node="cam")


class Feed:
    """An inbox, what its handlers got, and how often it acknowledged."""

    def __init__(self):
        self.counters = Counter()
        self.inbox = Inbox(self.counters)
        self.got = []
        self.acks = 0

    def take(self, delivery):
        self.got.append(delivery)

    def ack(self):
        self.acks += 1

    def send(self, text, payload=b"", *, retained=False):
        self.inbox.receive(text, payload, retained=retained, ack=self.ack)


@pytest.fixture
def feed():
    return Feed()


def test_message_arrives_decoded_and_is_acknowledged(feed):
    """The plain case."""
    feed.inbox.register(Route.REPLY, feed.take, ack_late=False)
    feed.send(_REPLY, InferenceReply(model="digits").SerializeToString())
    assert feed.got[0].message.model == "digits"
    assert feed.got[0].address.node == "cam"
    assert feed.acks == 1


def test_late_acknowledgement_is_the_handlers(feed):
    """Nothing is acknowledged behind its back."""
    feed.inbox.register(Route.REPLY, feed.take, ack_late=True)
    feed.send(_REPLY)
    assert feed.acks == 0
    feed.got[0].ack()
    assert feed.acks == 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("text", [_REPLY, "someone/elses/topic"])
def test_bad_payload_is_counted_acknowledged_and_forgotten(feed, late, text):
    """It never blocks what is behind it."""
    told = []
    feed.inbox.register(Route.REPLY, feed.take, ack_late=late)
    feed.inbox.on_bad(Route.REPLY, lambda delivery, error: told.append((delivery.address.node, error)))
    feed.send(text, b"\xff\xff\xff")
    feed.send(_REPLY, InferenceReply(model="next").SerializeToString())
    assert feed.counters["bad_payloads"] == 1
    assert feed.got[-1].message.model == "next"
    assert feed.acks == (1 if late else 2)
    assert len(told) == (text == _REPLY)


def test_handler_may_refuse_what_it_got(feed):
    """Its PayloadError counts like bytes that do not parse."""

    def refuse(_delivery):
        raise PayloadError("no", field="model")

    feed.inbox.register(Route.REPLY, refuse, ack_late=True)
    feed.send(_REPLY)
    assert (feed.counters["bad_payloads"], feed.acks) == (1, 1)


def test_retained_command_is_ignored(feed):
    """Every node that ever connects would obey it again."""
    feed.inbox.register(Route.COMMAND, feed.take, ack_late=False)
    feed.send(_COMMAND, Command(id=b"1").SerializeToString(), retained=True)
    assert not feed.got
    assert (feed.counters["ignored_messages"], feed.acks) == (1, 1)
    feed.send(_COMMAND, Command(id=b"1").SerializeToString())
    assert len(feed.got) == 1


def test_cleared_state_has_no_message(feed):
    """An empty retained payload means that the topic was cleared, not a default message."""
    feed.inbox.register(Route.PRESENCE, feed.take, ack_late=False)
    feed.send(_PRESENCE, b"")
    assert feed.got[0].message is None


def test_route_has_one_handler(feed):
    """A second one would silently take the first one's messages."""
    feed.inbox.register(Route.REPLY, feed.take, ack_late=False)
    feed.inbox.register(Route.REPLY, feed.take, ack_late=False)
    with pytest.raises(ValueError, match="handler already"):
        feed.inbox.register(Route.REPLY, print, ack_late=False)


@given(st.permutations(range(8)))
def test_acks_leave_in_order_of_arrival(order):
    """MQTT 5, section 4.6, whatever becomes ready first."""
    sent = []
    queue = AckQueue(sent.append)
    ready = [queue.expect(packet_id) for packet_id in range(8)]
    for place, packet_id in enumerate(order):
        ready[packet_id]()
        ready[packet_id]()  # once more changes nothing
        done = set(order[: place + 1])
        assert sent == list(range(next((n for n in range(8) if n not in done), 8)))
    assert len(queue) == 0


def test_postponed_message_is_decoded_when_it_is_its_turn(feed):
    """Until then it costs its bytes, and nobody has acknowledged it."""
    waiting = []

    def postpone(delivery):
        waiting.append(delivery)
        return True

    feed.inbox.register(Route.REPLY, feed.take, ack_late=False)
    feed.inbox.on_arrival(Route.REPLY, postpone)
    feed.send(_REPLY, InferenceReply(model="digits").SerializeToString())
    feed.send(_REPLY, b"\xff")
    assert [delivery.message for delivery in waiting] == [None, None]
    assert (feed.got, feed.acks, feed.counters["bad_payloads"]) == ([], 0, 0)
    for delivery in waiting:
        feed.inbox.handle(delivery)
    assert [delivery.message.model for delivery in feed.got] == ["digits"]
    assert (feed.acks, feed.counters["bad_payloads"]) == (2, 1)


def test_message_that_is_not_postponed_is_handled_at_once(feed):
    """Where the hook says no."""
    feed.inbox.register(Route.REPLY, feed.take, ack_late=False)
    feed.inbox.on_arrival(Route.REPLY, lambda delivery: delivery.address.node != "cam")
    feed.send(_REPLY, InferenceReply(model="digits").SerializeToString())
    assert (len(feed.got), feed.acks) == (1, 1)
