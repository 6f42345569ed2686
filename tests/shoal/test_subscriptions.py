"""The book of what a broker must be told, without a broker."""

from itertools import chain

import pytest

from shoal.routes import Route
from shoal.subscriptions import TOPICS_IN_PACKET, Packets, Subscriptions

pytestmark = pytest.mark.device


def fresh(*patterns: str, route: Route = Route.BLOB) -> Subscriptions:
    book = Subscriptions()
    book.connect(session_present=False)
    for pattern in patterns:
        book.add(pattern, route)
    return book


def test_many_topics_share_packets_that_no_broker_refuses():
    """Twenty topics in three packets, none asked for twice, and nothing to take back on a fresh session."""
    names = [f"blob/{number}" for number in range(20)]
    packets = fresh(*names).take()
    assert [len(packet) for packet in packets.subscribe] == [TOPICS_IN_PACKET, TOPICS_IN_PACKET, 4]
    assert list(chain.from_iterable(packets.subscribe)) == names
    assert packets.unsubscribe == []


def test_taken_topics_are_not_sent_again():
    """And what was taken back before it was sent leaves just its UNSUBSCRIBE."""
    book = fresh("a", "b")
    book.remove("b")
    assert book.take() == Packets([["b"]], [["a"]])
    assert book.take() == Packets([], [])


def test_topic_asked_for_again_is_taken_back_first():
    """The broker iotcore sends a retained message only for a new subscription; a retry must be one."""
    book = fresh("a")
    book.take()
    book.remove("a")
    book.add("a", Route.BLOB)
    assert book.take() == Packets([["a"]], [["a"]])
    book.add("a", Route.BLOB)
    assert book.take() == Packets([["a"]], [["a"]])


def test_older_session_may_hold_anything():
    """What a process before us subscribed is unknown: retained topics are taken back first, others are not."""
    book = fresh("a")
    book.add("b", Route.INFER)
    book.connect(session_present=True)
    assert book.take() == Packets([["a"]], [["a", "b"]])


def test_new_connection_asks_for_what_is_wanted_now():
    """Not for what was wanted when the last one ended: blobs that have arrived are not sent again."""
    book = fresh("a", "b")
    book.take()
    book.remove("a")
    book.connect(session_present=False)
    assert book.take() == Packets([], [["b"]])


def test_kept_session_is_told_what_was_taken_back_meanwhile():
    """Else the broker would go on sending it."""
    book = fresh("a", "b")
    book.take()
    book.remove("a")
    book.connect(session_present=True)
    assert book.take() == Packets([["a", "b"]], [["b"]])
