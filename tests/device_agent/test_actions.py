"""What a device does on command."""

import logging
import random
import time

import pytest

from device_agent.actions import Actions
from device_agent.policy import PolicyConfig
from shoal.routes import Route
from shoal.v1 import command_pb2 as pb
from shoal.v1 import inference_pb2
from tests.device_agent.conftest import MODEL

pytestmark = pytest.mark.device

SECOND = 1_000_000


class Updates:
    """Notes what is dropped, and goes back to nothing."""

    def __init__(self, device):
        self.device = device
        self.failed = []

    def fail(self, model, reason):
        self.failed.append((model, reason))
        self.device.deactivate(model)


@pytest.fixture
def obey(rig):
    """Send a command to the rig's device and return the answer."""
    updates = Updates(rig.device)
    restarts = []
    rig.updates, rig.restarts = updates, restarts
    rig.device.actions.update(Actions(rig.device, updates, lambda: restarts.append("asked")).table())
    rig.announced = []
    rig.link.announce = lambda: rig.announced.append("born")
    numbers = iter(range(1, 1000))

    def send(**action):
        expires = int((time.time() + 60) * SECOND)
        rig.link.deliver(Route.COMMAND, pb.Command(id=b"%d" % next(numbers), expires_at_us=expires, **action))
        return next(message for route, message, *_ in reversed(rig.link.sent) if route is Route.RESULT)

    return send


def test_every_action_of_a_command_is_done_here_or_by_the_cloud(rig, obey):
    """Pins that no action of the schema was forgotten."""
    actions = {field.name for field in pb.Command.DESCRIPTOR.oneofs_by_name["action"].fields}
    assert actions - set(rig.device.actions) == {"add_labels", "run_pipeline"}


def test_rebirth_publishes_presence_and_state(rig, obey):
    """Pins what a newcomer who missed both asks for."""
    rig.step()
    states = sum(route is Route.STATE for route, *_ in rig.link.sent)
    assert obey(rebirth=pb.Rebirth()).status == pb.COMMAND_STATUS_DONE
    rig.step()
    assert rig.announced == ["born"]
    assert sum(route is Route.STATE for route, *_ in rig.link.sent) == states + 1


def test_log_level_is_set_or_refused(obey):
    """Pins that the level moves, and that one that does not exist is named."""
    before = logging.getLogger().level
    try:
        assert obey(set_log_level=pb.SetLogLevel(level="DEBUG")).status == pb.COMMAND_STATUS_DONE
        assert logging.getLogger().level == logging.DEBUG
        answer = obey(set_log_level=pb.SetLogLevel(level="LOUD"))
        assert (answer.status, "expected one of DEBUG" in answer.message) == (pb.COMMAND_STATUS_REFUSED, True)
    finally:
        logging.getLogger().setLevel(before)


def test_snapshot_asks_about_one_reading_that_would_have_stayed(make_rig, tmp_path, obey_of):
    """Pins that the next reading is asked though nothing changed and no cap has room, and the one after it is not."""
    rig = make_rig(tmp_path, policy=PolicyConfig(audit_share=0.0, max_per_minute=1))
    rig.link.connect()
    obey = obey_of(rig)
    rig.activate(threshold=100.0)
    assert [rig.ask(1.0).reason for _ in range(2)] == ["kept.below_threshold", "kept.unchanged"]
    for _ in range(2):
        assert obey(snapshot=pb.Snapshot()).status == pb.COMMAND_STATUS_DONE
        assert rig.ask(1.0).reason == "asked.command"
        assert rig.ask(1.0).reason == "kept.unchanged"
    rows = [row for question in rig.questions for row in question.rows]
    assert [row.reason for row in rows] == [inference_pb2.ASK_REASON_COMMAND] * 2
    assert all(row.HasField("device_answer") for row in rows)
    rig.check_ledger()


def test_policy_is_set_within_the_settings_until_the_end(make_rig, tmp_path, obey_of):
    """Pins that the share goes down and back up, never beyond what the device's owner allows, and that it acts."""
    rig = make_rig(tmp_path, policy=PolicyConfig(audit_share=0.01, max_share=0.5, max_per_minute=10**9))
    rig.link.connect()
    obey = obey_of(rig)
    rig.activate(threshold=0.0)
    rng = random.Random(3)

    def asked_of(count):
        return sum(rig.read(rng.gauss(0.0, 3.0)).reason.startswith("asked") for _ in range(count)) / count

    asked_of(500)
    assert 0.3 < asked_of(1000) < 0.6
    assert obey(set_policy=pb.SetPolicy(max_share=0.05)).status == pb.COMMAND_STATUS_DONE
    asked_of(1500)
    assert asked_of(1000) < 0.1
    for wrong in (0.6, 0.0, 0.005, float("nan")):
        answer = obey(set_policy=pb.SetPolicy(max_share=wrong))
        assert (answer.status, answer.message.startswith("max_share")) == (pb.COMMAND_STATUS_REFUSED, True), wrong
    assert asked_of(500) < 0.1
    assert obey(set_policy=pb.SetPolicy(score_threshold=1e9)).status == pb.COMMAND_STATUS_DONE
    assert asked_of(500) < 0.05
    assert obey(set_policy=pb.SetPolicy()).status == pb.COMMAND_STATUS_DONE
    asked_of(1500)
    assert asked_of(500) > 0.3


@pytest.fixture
def obey_of():
    """`obey` for a rig of the test's own."""

    def prepare(rig):
        rig.device.actions.update(Actions(rig.device, Updates(rig.device), lambda: None).table())
        numbers = iter(range(1, 1000))

        def send(**action):
            expires = int((time.time() + 60) * SECOND)
            rig.link.deliver(Route.COMMAND, pb.Command(id=b"%d" % next(numbers), expires_at_us=expires, **action))
            return next(message for route, message, *_ in reversed(rig.link.sent) if route is Route.RESULT)

        return send

    return prepare


@pytest.mark.parametrize(
    ("model", "release", "said"),
    [("other", 3, "model: 'other' is not the model here"), (MODEL, 2, "release: 2 does not run, but 3")],
)
def test_release_that_does_not_run_is_not_dropped(rig, obey, model, release, said):
    """Pins that a command which comes after the next release hits nothing."""
    rig.activate(release=3)
    answer = obey(drop_release=pb.DropRelease(model=model, release=release))
    assert (answer.status, answer.message) == (pb.COMMAND_STATUS_REFUSED, said)
    assert rig.updates.failed == []


def test_release_is_dropped_with_its_reason(rig, obey):
    """Pins what the update client is told; what it makes of it is pinned in test_probation_device.py."""
    rig.activate(release=3)
    answer = obey(drop_release=pb.DropRelease(model=MODEL, release=3, reason="too many alarms"))
    assert (answer.status, answer.message) == (pb.COMMAND_STATUS_DONE, "release 3 is refused; none runs")
    assert rig.updates.failed == [(MODEL, "dropped: too many alarms")]


def test_restart_is_asked_for(rig, obey):
    """Pins that the answer comes before the end."""
    assert obey(restart=pb.Restart()).status == pb.COMMAND_STATUS_DONE
    assert rig.restarts == ["asked"]


def test_metrics_are_prometheus_text(rig, obey):
    """Pins the exposition: counters as committed, gauges, one sample a line."""
    rig.ask()
    text = obey(report_metrics=pb.ReportMetrics()).message
    lines = text.splitlines()
    assert 'shoal_device_events_total{name="asked.no_model"} 1' in lines
    assert "shoal_device_outbox_items 1" in lines
    assert "# TYPE shoal_device_events_total counter" in lines
    samples = [line for line in lines if not line.startswith("#")]
    assert all(float(line.rpartition(" ")[2]) >= 0 for line in samples)
    prometheus = pytest.importorskip("prometheus_client.parser", reason="left out: needs prometheus-client")
    families = {family.name for family in prometheus.text_string_to_metric_families(text)}
    assert {"shoal_device_events", "shoal_device_outbox_items"} <= families
