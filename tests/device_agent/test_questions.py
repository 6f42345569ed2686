"""Questions that are refused for ever, and what makes way in a full outbox."""

import pytest

from device_agent.policy import PolicyConfig
from shoal.delivery.outbox import Limits
from shoal.errors import LinkError
from shoal.routes import Route
from shoal.v1 import inference_pb2 as pb

pytestmark = pytest.mark.device


def numbers(questions):
    return [row.reading.seq for question in questions for row in question.rows]


def test_refused_reading_is_kept_with_its_reason(rig):
    """Pins what an operator needs: which reading, which field, and what the gateway said."""
    asked = rig.ask().seq
    rig.reply(asked, status=pb.STATUS_INVALID_ARGUMENT, field="rows[0].reading", message="3 values, expected 4")
    assert rig.committed().get("quarantined") == 1
    assert rig.quarantine() == [(asked, "INVALID_ARGUMENT", "rows[0].reading", "3 values, expected 4")]
    rig.check_ledger()


def test_reading_too_large_for_any_message_is_kept_with_its_reason(rig):
    """Pins that what never was in the queue is in the quarantine all the same."""
    rig.read(*[1.0] * 262_144)
    assert rig.committed() == {"produced": 1, "accepted": 1, "quarantined": 1}
    ((seq, status, _, message),) = rig.quarantine()
    assert (seq, status) == (0, "TOO_LARGE")
    assert message.endswith("bytes, at most 1047552")
    rig.check_ledger()


def test_question_that_the_broker_refuses_for_ever_is_kept_with_its_reason(rig):
    """Pins that a missing right is found where somebody looks for it."""
    rig.ask()
    rig.link.acknowledge(LinkError("the broker refused: Not authorized", permanent=True))
    assert rig.committed().get("quarantined") == 1
    assert rig.quarantine() == [(0, "REFUSED_BY_BROKER", "", "the broker refused: Not authorized")]
    rig.check_ledger()


def test_question_refused_as_a_whole_is_quarantined_and_no_other(make_rig, tmp_path):
    """Pins that a gateway which cannot say whose rows it refuses is understood, by what came with its reply."""
    rig = make_rig(tmp_path, max_rows=2)
    rig.link.connect()
    for value in range(3):
        rig.read(float(value))
    first, second = rig.step()
    rig.refuse_whole(rig.correlation(first), "epoch", "0 bytes, expected 16")
    rig.refuse_whole(rig.correlation(first), "epoch", "0 bytes, expected 16")
    assert rig.committed()["quarantined"] == 2
    assert rig.quarantine() == [(seq, "INVALID_ARGUMENT", "epoch", "0 bytes, expected 16") for seq in (0, 1)]
    assert numbers([second]) == numbers(rig.step(100.0)) == [2]
    rig.check_ledger()


def test_whole_refusal_spares_what_was_answered_and_what_it_does_not_name(rig):
    """Pins that neither another's reply, nor a status that is no refusal, nor an answered row moves anything."""
    asked = rig.ask().seq
    correlation = rig.correlation(rig.questions[-1])
    rig.refuse_whole(b"")
    rig.refuse_whole(bytes(8))
    rig.refuse_whole(correlation, status=pb.STATUS_INTERNAL)
    assert rig.committed()["in_flight"] == 1
    rig.step(10.0)
    correlation = rig.correlation(rig.questions[-1])
    rig.reply(asked)
    rig.refuse_whole(correlation)
    assert rig.committed()["answered"] == 1
    assert rig.quarantine() == []


def test_whole_refusal_of_a_process_before_this_one_is_not_understood(rig):
    """Pins that correlation data of different processes never meet: what is refused is asked, and refused, again."""
    rig.ask()
    correlation = rig.correlation(rig.questions[-1])
    rig.restart()
    rig.link.connect()
    (again,) = rig.step()
    rig.refuse_whole(correlation)
    assert rig.committed()["in_flight"] == 1
    rig.refuse_whole(rig.correlation(again))
    assert rig.committed()["quarantined"] == 1


def test_no_more_is_asked_at_once_than_a_gateway_takes(make_rig, tmp_path):
    """Pins that a backlog goes out as it is answered, instead of all of it again and again."""
    rig = make_rig(tmp_path, retry_after_s=10.0)
    backlog = [rig.read(float(value)).seq for value in range(150)]
    rig.link.connect()
    questions = rig.step()
    assert numbers(questions) == backlog[:64]
    assert rig.step(1.0) == []
    first, second = questions
    for question in (first, second, first):
        rows = [pb.RowReply(seq=row.reading.seq, status=pb.STATUS_OK) for row in question.rows]
        reply = pb.InferenceReply(epoch=question.epoch, rows=rows)
        rig.link.deliver(Route.REPLY, reply, rig.correlation(question))
    assert numbers(rig.step()) == backlog[64:128]


def test_gateway_that_never_answers_is_asked_again_with_what_is_due(make_rig, tmp_path):
    """Pins that lost replies take no place for longer than their questions wait, and cost no memory."""
    rig = make_rig(tmp_path, retry_after_s=10.0)
    backlog = [rig.read(float(value)).seq for value in range(150)]
    rig.link.connect()
    old = rig.step()
    assert numbers(rig.step(9.9)) == []
    asked = numbers(rig.step(0.1))
    assert asked == backlog[64:128]
    rig.refuse_whole(rig.correlation(old[0]))
    assert len(rig.device._questions._open) == 2
    assert rig.committed()["in_flight"] == 150
    assert set(numbers(rig.step(10.0)) + numbers(rig.step(10.0))) >= set(backlog[128:])


def test_answered_questions_are_forgotten(rig):
    """Pins that what is remembered is what is open."""
    for _ in range(3):
        asked = rig.ask().seq
        question = rig.questions[-1]
        reply = pb.InferenceReply(epoch=question.epoch, rows=[pb.RowReply(seq=asked, status=pb.STATUS_OK)])
        rig.link.deliver(Route.REPLY, reply, rig.correlation(question))
    assert not rig.device._questions._open


@pytest.mark.parametrize("spoiled", [b"\xff\xff\xff", pb.InferenceRow().SerializeToString()])
def test_reading_that_the_disk_spoiled_holds_up_nobody(rig, spoiled):
    """Pins that flash which rots costs the reading it held, told and counted, and not the agent."""
    for value in range(1, 4):
        rig.read(float(value))
    rig.outbox.commit()
    rig.outbox._store.db.execute("UPDATE items SET payload = ? WHERE seq = 1", (spoiled,))
    assert numbers(rig.step()) == [0, 2]
    assert rig.committed()["quarantined"] == 1
    assert rig.quarantine() == [(1, "SPOILED", "", "not what was stored")]
    rig.check_ledger()


def test_alarm_takes_the_place_of_the_oldest_telemetry(make_rig, tmp_path):
    """Pins the way from a reading's score to its priority, and how the one that made way is counted."""
    policy = PolicyConfig(audit_share=0.0, max_share=1.0)
    rig = make_rig(tmp_path, limits=Limits(max_items=2), policy=policy)
    without_a_model = [rig.read(5.0 + row).seq for row in range(2)]
    rig.activate(threshold=1.0)
    alarms = [rig.read(8.0 + row).seq for row in range(3)]
    rig.link.connect()
    assert numbers(rig.step()) == alarms[:2]
    counters = rig.committed()
    assert (counters["dropped.displaced"], counters["dropped.full"]) == (len(without_a_model), 1)
    rig.check_ledger()
