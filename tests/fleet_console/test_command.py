"""`shoal command`, over a real broker."""

import threading

import pytest
from typer.testing import CliRunner

from fleet_console.cli import app
from fleet_console.command import build
from shoal.commands import CommandDesk
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.v1 import command_pb2 as pb

SITE = "command-cli"


@pytest.fixture
def node(broker):
    """A node that drops releases above 3, served in a thread; `asked` has what it was told."""
    loop = Loop()
    link = Link(parse_broker_url(broker.url, session_expiry_s=0), node_identity(SITE, "cam", "device"))
    asked = []

    def drop(action):
        asked.append((action.model, action.release))
        return "dropped"

    CommandDesk(link, SITE, "cam", {"drop_release": drop})
    link.attach(loop)
    loop.run(until=lambda: link.is_subscribed)
    serving = threading.Thread(target=loop.run)
    serving.start()
    yield asked
    loop.stop()
    serving.join()
    link.close()
    loop.close()


def run(broker, *arguments):
    return CliRunner().invoke(app, ["command", SITE, "cam", *arguments, "--broker", broker.url])


def test_command_is_done_and_its_answer_printed(broker, node):
    """Fields by name, of their own types."""
    done = run(broker, "drop_release", "--set", "model=digits", "--set", "release=7")
    assert (done.exit_code, done.output) == (0, "done: dropped\n")
    assert node == [("digits", 7)]


def test_refusal_is_exit_status_one(broker, node):
    """With the node's own words."""
    done = run(broker, "restart")
    assert (done.exit_code, done.output) == (1, "refused: restart is not done here\n")


def test_silence_is_told(broker):
    """After the expiry, past which nobody does it any more."""
    done = CliRunner().invoke(app, ["command", SITE, "gone", "restart", "--broker", broker.url, "--expires-s", "0.3"])
    assert "no answer from command-cli/gone" in str(done.exception)


@pytest.mark.parametrize(
    ("action", "settings", "said"),
    [
        ("dance", [], "no action 'dance'"),
        ("snapshot", ["x=1"], "snapshot: "),
        ("drop_release", ["release=x"], "release"),
    ],
)
def test_what_cannot_be_is_not_sent(action, settings, said):
    """One line for the operator."""
    with pytest.raises(ConfigError, match=said):
        build(action, settings, 1.0)


def test_command_has_an_expiry_and_an_id_of_its_own():
    """Without which no node would do it."""
    one, other = (build("set_policy", ["max_share=0.1"], 10.0) for _ in range(2))
    assert one.id != other.id
    assert one.expires_at_us - one.issued_at_us == 10_000_000
    assert one.set_policy == pb.SetPolicy(max_share=0.1)
