"""The order of acknowledgements, step by step against a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.acks import AckQueue

pytestmark = pytest.mark.device


@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
def test_acks_keep_order_while_messages_still_arrive(steps):
    """None is an arrival, a number makes one of those that came ready, perhaps once more."""
    sent, came, ready, done = [], [], [], set()
    queue = AckQueue(sent.append)
    for step in steps:
        if step is None:
            came.append(len(came) + 100)
            ready.append(queue.expect(came[-1]))
        elif ready:
            ready[step % len(ready)]()
            done.add(came[step % len(ready)])
        complete = next((place for place, packet_id in enumerate(came) if packet_id not in done), len(came))
        assert sent == came[:complete]
        assert len(queue) == len(came) - complete


def test_packet_id_used_again_is_another_message():
    """A broker takes an id again as soon as it was acknowledged; a late second call must not count for it."""
    sent = []
    queue = AckQueue(sent.append)
    first = queue.expect(1)
    first()
    second = queue.expect(1)
    first()
    assert sent == [1]
    second()
    assert sent == [1, 1]


def test_ack_while_another_is_sent_keeps_the_order():
    """Sending one may make a handler finish the next."""
    sent = []

    def send(packet_id):
        sent.append(packet_id)
        if packet_id == 1:
            ready[2]()

    queue = AckQueue(send)
    ready = {packet_id: queue.expect(packet_id) for packet_id in (1, 2, 3)}
    ready[3]()
    ready[1]()
    assert sent == [1, 2, 3]
    assert len(queue) == 0
