"""A node's command desk, without a broker. Over a real one: test_link.py."""

from collections import Counter

import pytest

from shoal.commands import CommandDesk
from shoal.errors import LinkError, PayloadError
from shoal.inbox import Inbox
from shoal.routes import Route, topic
from shoal.v1 import command_pb2 as pb

pytestmark = pytest.mark.device

_NOW_S = 1_000.0
_SITE, _NODE = "plant", "cam"


class Wire:
    """What a desk needs of a link, in memory: a real inbox, and what was published."""

    def __init__(self):
        self.counters = Counter()
        self.inbox = Inbox(self.counters)
        self.published = []
        self.acks = 0
        self.takes = True
        self.hooks = []
        self.pending = []

    def on_connect(self, hook):
        self.hooks.append(hook)

    def subscribe(self, route, handler, **segments):
        assert segments == {"site": _SITE, "node": _NODE}
        self.inbox.register(route, handler, ack_late=False)

    def publish(self, route, message, *, correlation, on_done, **segments):
        assert (route, segments) == (Route.RESULT, {"site": _SITE, "node": _NODE})
        if not self.takes:
            return False
        self.pending.append(on_done)
        self.published.append((correlation, message))
        return True

    def ack(self):
        self.acks += 1

    def send(self, command, *, retained=False, correlation=b""):
        self.inbox.receive(
            topic(Route.COMMAND, site=_SITE, node=_NODE),
            command.SerializeToString(),
            retained=retained,
            ack=self.ack,
            correlation=correlation,
        )

    @property
    def statuses(self):
        return [result.status for _, result in self.published]


class Desk:
    """A desk whose one action notes what it was asked; its clock stands where the test puts it."""

    def __init__(self):
        self.wire = Wire()
        self.now_s = _NOW_S
        self.done = []
        self.desk = CommandDesk(self.wire, _SITE, _NODE, {"run_pipeline": self.run}, wall_clock=lambda: self.now_s)

    def run(self, action):
        self.done.append(action.model)
        if action.model == "unknown":
            raise PayloadError("no such model", field="model")
        return f"{action.model} runs"


@pytest.fixture
def desk():
    return Desk()


def order(command_id=b"1", model="digits", expires_s=_NOW_S + 10):
    return pb.Command(id=command_id, expires_at_us=int(expires_s * 1e6), run_pipeline=pb.RunPipeline(model=model))


def test_command_is_done_and_answered(desk):
    """With its own id, the sender's correlation data and the action's sentence."""
    desk.wire.send(order(), correlation=b"42")
    result = pb.CommandResult(id=b"1", status=pb.COMMAND_STATUS_DONE, message="digits runs")
    assert desk.wire.published == [(b"42", result)]
    assert (desk.done, desk.wire.acks) == (["digits"], 1)


def test_command_is_done_once_for_each_id(desk):
    """A repetition gets the first answer, even past the expiry; another id is another command."""
    desk.wire.send(order())
    desk.now_s += 3_600
    desk.wire.send(order())
    assert desk.done == ["digits"]
    assert desk.wire.statuses == [pb.COMMAND_STATUS_DONE] * 2
    desk.wire.send(order(b"2", expires_s=desk.now_s + 1))
    assert desk.done == ["digits", "digits"]


def test_memory_of_commands_is_bounded(desk):
    """The last 256 are remembered; an older one comes again only if it has not expired."""
    for number in range(257):
        desk.wire.send(order(number.to_bytes(2, "big")))
    desk.wire.send(order((1).to_bytes(2, "big")))
    assert len(desk.done) == 257
    desk.wire.send(order((0).to_bytes(2, "big")))
    assert len(desk.done) == 258
    desk.now_s += 3_600
    desk.wire.send(order((1).to_bytes(2, "big")))
    assert len(desk.done) == 258
    assert desk.wire.statuses[-1] == pb.COMMAND_STATUS_EXPIRED


@pytest.mark.parametrize(
    ("expires_s", "status"),
    [
        (_NOW_S + 1e-6, pb.COMMAND_STATUS_DONE),
        (_NOW_S, pb.COMMAND_STATUS_EXPIRED),
        (_NOW_S - 1, pb.COMMAND_STATUS_EXPIRED),
        (0, pb.COMMAND_STATUS_EXPIRED),
        (-1, pb.COMMAND_STATUS_EXPIRED),
    ],
)
def test_expired_command_is_answered_and_not_done(desk, expires_s, status):
    """From the very microsecond; one without an expiry is never done."""
    desk.wire.send(order(expires_s=expires_s))
    assert desk.wire.statuses == [status]
    assert bool(desk.done) == (status == pb.COMMAND_STATUS_DONE)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (pb.Command(report_state=pb.ReportState()), "report_state is not done here"),
        (pb.Command(), "no action is not done here"),
        (order(model="unknown"), "model: no such model"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(desk, command, said):
    """Another action, none, or one that its handler refuses: the operator reads why."""
    command.id, command.expires_at_us = b"1", int((_NOW_S + 1) * 1e6)
    desk.wire.send(command)
    _, result = desk.wire.published[0]
    assert (result.status, result.message) == (pb.COMMAND_STATUS_REFUSED, said)
    assert desk.wire.counters["bad_payloads"] == 0


def test_retained_command_is_ignored(desk):
    """Neither done nor answered, and gone."""
    desk.wire.send(order(), retained=True)
    assert (desk.done, desk.wire.published, desk.wire.acks) == ([], [], 1)
    assert desk.wire.counters["ignored_messages"] == 1


@pytest.mark.parametrize("command_id", [b"", bytes(65)])
def test_command_without_a_usable_id_is_bad(desk, command_id):
    """Nobody could tell its answer apart, or the memory of ids would not be bounded in bytes."""
    desk.wire.send(order(command_id))
    assert (desk.done, desk.wire.published, desk.wire.acks) == ([], [], 1)
    assert desk.wire.counters["bad_payloads"] == 1


def test_answer_that_the_link_does_not_take_is_kept(desk):
    """In order, and sent once there is room; not again after that."""
    desk.wire.takes = False
    desk.wire.send(order(b"1"), correlation=b"a")
    desk.wire.send(order(b"2"), correlation=b"b")
    desk.desk.tick()
    assert desk.wire.published == []
    desk.wire.takes = True
    desk.desk.tick()
    desk.desk.tick()
    assert [(correlation, result.id) for correlation, result in desk.wire.published] == [(b"a", b"1"), (b"b", b"2")]


def test_answer_that_a_connection_loses_is_sent_on_the_next(desk):
    """One that was refused for ever is not: it would be again."""
    desk.wire.send(order())
    desk.wire.pending.pop()(LinkError("the connection ended"))
    assert len(desk.wire.published) == 1
    for hook in desk.wire.hooks:
        hook()
    assert len(desk.wire.published) == 2
    desk.wire.pending.pop()(LinkError("not authorized", permanent=True))
    desk.desk.tick()
    assert len(desk.wire.published) == 2


def test_kept_answers_are_bounded(desk):
    """The newest stay: whoever sent the others has given up."""
    desk.wire.takes = False
    for number in range(100):
        desk.wire.send(order(number.to_bytes(2, "big")))
    desk.wire.takes = True
    desk.desk.tick()
    assert [result.id for _, result in desk.wire.published] == [n.to_bytes(2, "big") for n in range(36, 100)]
