from pathlib import Path

import numpy as np
import pytest

from device_agent.change import DeadBandSettings, RateSettings
from device_agent.policy import PolicyConfig
from device_agent.readings import AnsweredBy, Reading
from device_agent.runtime import RuntimeKind
from shoal.codec import EPOCH_BYTES
from shoal.delivery.outbox import Limits
from shoal.errors import LinkError, ModelError
from shoal.routes import Route
from shoal.v1 import command_pb2
from shoal.v1 import inference_pb2 as pb
from shoal.v1.node_pb2 import ModelState
from shoal.v1.release_pb2 import RESIZE_AREA, Artefact, ReleaseSpec, Tier
from shoal.v1.sensor_pb2 import TIME_QUALITY_SUSPECT, TIME_QUALITY_SYNCED

pytestmark = pytest.mark.device

NO_AUDIT = PolicyConfig(audit_share=0.0, max_share=1.0)


def seqs(questions):
    return [row.reading.seq for question in questions for row in question.rows]


# -- a reading -----------------------------------------------------------------------------------------------------


def test_device_without_a_model_asks_about_every_reading(rig):
    """Pins the question: whose it is, what it holds, how it can be traced, and how long the broker keeps it."""
    outcome = rig.read(1.5, -2.0, reference="row/9")
    (question,) = rig.step()
    (row,) = question.rows
    assert (question.device, question.model, question.answer_within_ms) == ("dev-1", "vibration", 250)
    assert (len(question.epoch), question.replay, question.answer_only) == (EPOCH_BYTES, False, False)
    assert (row.reason, row.HasField("device_answer")) == (pb.ASK_REASON_NO_MODEL, False)
    assert (row.reading.seq, row.reading.reference, row.reading.captured_at_us) == (outcome.seq, "row/9", 17)
    assert list(row.reading.scalars.values) == [1.5, -2.0]
    *_, (_, _, correlation, expiry_s) = rig.link.sent
    assert (len(correlation), expiry_s) == (8, 10)
    assert (outcome.by, outcome.reason, outcome.release) == (AnsweredBy.NOBODY, "asked.no_model", 0)


def test_every_reading_ends_in_one_counter(make_rig, tmp_path):
    """Pins each way that a reading can go, by name, and that they add up."""
    policy = PolicyConfig(audit_share=0.0, max_share=1.0, max_per_minute=2)
    rig = make_rig(tmp_path, policy=policy, change=DeadBandSettings(threshold=0.25))
    rig.activate(threshold=1.0)
    reasons = [rig.read(value).reason for value in (0.5, 0.6, 5.0, 6.0, 7.0, 0.0)]
    assert reasons == [
        "kept.below_threshold",
        "kept.unchanged",
        "asked.score",
        "asked.score",
        "kept.over_budget",
        "kept.below_threshold",
    ]
    assert rig.committed() == {
        "produced": 6,
        "kept.below_threshold": 2,
        "kept.unchanged": 1,
        "kept.over_budget": 1,
        "asked.score": 2,
        "accepted": 2,
        "in_flight": 2,
    }
    rig.check_ledger()


def test_audit_is_asked_even_where_nothing_changed(make_rig, tmp_path):
    """Pins that audits sample all readings: neither the dead band nor a low score keeps one."""
    rig = make_rig(
        tmp_path, policy=PolicyConfig(audit_share=1.0, max_share=1.0), change=DeadBandSettings(threshold=9.0)
    )
    rig.activate()
    assert [rig.read(0.1).reason for _ in range(2)] == ["asked.audit"] * 2
    rig.link.connect()
    (question,) = rig.step()
    assert [row.reason for row in question.rows] == [pb.ASK_REASON_AUDIT] * 2


def test_change_is_measured_against_the_time_of_the_reading(make_rig, tmp_path):
    """Pins that the `[change]` table's kind is the one at work, and that it hears when a reading came."""
    rig = make_rig(tmp_path, policy=NO_AUDIT, change=RateSettings(threshold=1.0))
    rig.activate(threshold=1e9)
    reasons = []
    for value, later_s in ((0.0, 0.0), (3.0, 4.0), (6.0, 1.0)):
        rig.now += later_s
        reasons.append(rig.read(value).reason)
    assert reasons == ["kept.below_threshold", "kept.unchanged", "kept.below_threshold"]


def test_bytes_of_a_day_are_those_of_the_outbox(make_rig, tmp_path):
    """Pins what a byte cap counts, row by row as sent, and that a reading over it is kept with its reason."""
    cap = 200
    rig = make_rig(tmp_path, policy=PolicyConfig(audit_share=0.0, max_share=1.0, max_bytes_per_day=cap))
    reasons = [rig.read(float(value), reference="r" * 20).reason for value in range(1, 9)]
    asked = reasons.count("asked.no_model")
    assert reasons == ["asked.no_model"] * asked + ["kept.over_budget"] * (8 - asked)
    rig.link.connect()
    rows = [row for question in rig.step() for row in question.rows]
    sizes = [row.ByteSize() + 8 for row in rows]
    assert len(sizes) == asked
    assert cap - max(sizes) < sum(sizes) <= cap
    rig.check_ledger()


def test_state_tells_the_threshold_in_force_and_the_share(make_rig, tmp_path):
    """Pins what the fleet sees of a self-tuning threshold: where it is, what it may ask, and what it did ask."""
    rig = make_rig(tmp_path, policy=PolicyConfig(0.01, 0.05, 10**6), limits=Limits(10**5))
    rig.activate(threshold=2.0)
    rig.link.connect()
    rig.step()
    upload = rig.link.sent[-1][1].upload
    assert (upload.threshold, upload.budget_ppm, upload.asked_ppm) == (2.0, 50_000, 0)
    for value in np.random.default_rng(5).uniform(0.0, 10.0, 4000):  # the score is the square
        rig.read(value)
    rig.device.report_soon()
    rig.step()
    states = [message.upload for route, message, *_ in rig.link.sent if route is Route.STATE]
    assert states[-1].threshold == pytest.approx(91.0, abs=4.0)
    assert states[-1].asked_ppm == pytest.approx(50_000, rel=0.1)


def test_own_answer_goes_with_the_question(make_rig, tmp_path):
    """Pins that the gateway learns what the device's model said, and of which release it is."""
    rig = make_rig(tmp_path, policy=NO_AUDIT)
    rig.link.connect()
    rig.activate(release=4, threshold=1.0)
    outcome = rig.read(3.0)
    ((row,),) = [question.rows for question in rig.step()]
    assert (row.reason, row.device_answer) == (pb.ASK_REASON_SCORE, pb.Answer(release=4, score=9.0))
    assert (outcome.by, outcome.release, outcome.score, outcome.label) == (AnsweredBy.DEVICE, 4, 9.0, None)


def test_models_are_loaded_by_the_runtime_of_the_settings(make_rig, tmp_path, monkeypatch):
    """Pins that what the self-test judged with is what answers."""
    rig = make_rig(tmp_path, runtime=RuntimeKind.TFLITE)
    loaded = []
    monkeypatch.setattr("device_agent.device.load", lambda *what: loaded.append(what))
    rig.activate()
    assert loaded == [(Path("model.tflite"), RuntimeKind.TFLITE)]


@pytest.mark.parametrize("values", [(float("nan"),), (float("inf"),), (1.0, 2.0)])
def test_reading_that_the_model_cannot_take_is_asked(make_rig, tmp_path, values):
    """Pins that the gateway judges broken readings: a model is not asked for an answer to them."""
    rig = make_rig(tmp_path, policy=NO_AUDIT)
    rig.activate(threshold=1e9)
    assert rig.read(*values).reason == "asked.no_model"
    assert rig.committed()["model_errors"] == 1


def test_reading_beyond_float32_is_asked_for_its_score(make_rig, tmp_path):
    """Pins that a score which overflows is a reason to ask, and no warning."""
    rig = make_rig(tmp_path, policy=NO_AUDIT)
    rig.activate(threshold=1.0)
    assert rig.read(1e30).reason == "asked.score"
    assert rig.read(0.5).reason == "kept.below_threshold"


def test_new_release_is_judged_by_its_own_scores(make_rig, tmp_path):
    """Pins that a threshold raised by the last model's scores does not mute the next."""
    rig = make_rig(tmp_path, policy=PolicyConfig(0.0, 0.05, 10**6), limits=Limits(10**5))
    rig.activate(threshold=1.0)
    for index in range(2000):
        rig.read(100.0 + index % 2)
    assert rig.read(2.0).reason == "kept.below_threshold"
    rig.activate(release=2, threshold=1.0)
    assert rig.device.release == 2
    assert rig.read(3.0).reason == "asked.score"


def test_release_without_an_artefact_for_devices_is_refused(rig):
    """Pins that such a release leaves the device as it was."""
    rig.activate(release=3)
    spec = ReleaseSpec(release=5, artefacts=[Artefact(tier=Tier.TIER_GATEWAY)])
    with pytest.raises(ModelError, match="release 5 of vibration has nothing for devices"):
        rig.device.activate("vibration", spec, rig.path)
    assert rig.device.release == 3


def test_full_outbox_counts_what_it_drops_as_accepted_and_dropped(make_rig, tmp_path):
    """Pins that want of room is a hole in nobody's books, and that what waits is not pushed out."""
    rig = make_rig(tmp_path, limits=Limits(max_items=2))
    kept = [rig.read(float(value)).seq for value in range(5)]
    assert rig.committed() == {
        "produced": 5,
        "accepted": 5,
        "asked.no_model": 2,
        "dropped.full": 3,
        "in_flight": 2,
    }
    rig.check_ledger()
    rig.link.connect()
    assert seqs(rig.step()) == kept[:2]


# -- questions -----------------------------------------------------------------------------------------------------


def test_nothing_is_asked_before_it_is_durable(rig):
    """Pins that a reading is sent only once a crash cannot lose it."""
    rig.read(1.0)
    rig.device.tick(rig.now)
    assert rig.questions == []
    assert len(rig.step()) == 1


def test_question_without_a_reply_is_asked_again_as_a_replay(rig):
    """Pins the retry: not before its time, with the same number, at low priority and without a hurry."""
    asked = rig.ask().seq
    rig.link.acknowledge()
    assert rig.step(9.9) == []
    (again,) = rig.step(0.1)
    assert (again.replay, again.answer_within_ms, seqs([again])) == (True, 0, [asked])


def test_fresh_and_replayed_rows_travel_apart(rig):
    """Pins that a new reading does not lose its priority to the company of an old one."""
    rig.ask()
    rig.read(6.0)
    fresh = {question.replay: seqs([question]) for question in rig.step(10.0)}
    assert fresh == {True: [0], False: [1]}


def test_questions_wait_for_company(make_rig, tmp_path):
    """Pins `linger_s` and `max_rows`: one message for what comes together, and several where it is too much."""
    rig = make_rig(tmp_path, linger_s=1.0, max_rows=3)
    rig.link.connect()
    rig.step()
    for value in range(5):
        rig.read(float(value))
    assert rig.step(0.9) == []
    assert [len(question.rows) for question in rig.step(0.1)] == [3, 2]


def test_nothing_is_asked_while_disconnected_and_everything_at_once_after(make_rig, tmp_path):
    """Pins that a connection is used as soon as it is there, and its window no further than it goes."""
    rig = make_rig(tmp_path, linger_s=60.0, max_rows=1, window=3)
    rig.link.connect()
    rig.step()
    rig.link.disconnect()
    for value in range(5):
        rig.read(float(value))
    assert rig.step() == []
    rig.link.connect()
    assert seqs(rig.step()) == [0, 1]  # the third message is NodeState
    rig.link.acknowledge()
    assert seqs(rig.step()) == [2, 3, 4]


def test_message_holds_no_more_than_the_contract_allows(rig):
    """Pins that large readings are spread over messages instead of ending the device."""
    for value in range(3):
        rig.read(*[float(value)] * 100_000)
    assert [len(question.rows) for question in rig.step()] == [2, 1]


def test_reading_too_large_for_any_message_is_quarantined(rig):
    """Pins that what can never be asked is not owed for ever."""
    rig.read(*[1.0] * 262_144)
    assert rig.step() == []
    assert rig.committed() == {"produced": 1, "accepted": 1, "quarantined": 1}
    rig.check_ledger()


def test_refusal_of_the_broker_for_ever_quarantines(rig):
    """Pins that a question which would be refused again is not asked again."""
    rig.ask()
    rig.link.acknowledge(LinkError("not authorized", permanent=True))
    assert rig.step(100.0) == []
    assert rig.committed().get("quarantined") == 1
    rig.check_ledger()


@pytest.mark.parametrize("how", ["refused for now", "disconnected"])
def test_question_that_did_not_arrive_is_due_at_once(rig, how):
    """Pins that a transient failure neither loses a reading nor waits for the retry."""
    asked = rig.ask().seq
    if how == "disconnected":
        rig.link.disconnect()
        assert rig.step() == []
        rig.link.connect()
    else:
        rig.link.acknowledge(LinkError("quota exceeded"))
    assert seqs(rig.step()) == [asked]


def test_question_that_found_no_room_is_due_at_once(rig):
    """Pins that a window too narrow for both groups sends the second as soon as there is room."""
    rig.ask()
    rig.link.acknowledge()
    rig.read(6.0)
    rig.link.window = 1
    assert seqs(rig.step(10.0)) == [1]
    rig.link.acknowledge()
    assert seqs(rig.step()) == [0]


def test_link_that_takes_nothing_is_not_asked_for_ever(make_rig, tmp_path, monkeypatch):
    """Pins that a tick ends where a link has room and yet refuses."""
    rig = make_rig(tmp_path, max_rows=1)
    rig.link.connect()
    monkeypatch.setattr(rig.link, "publish", lambda *_, **__: False)
    assert rig.ask().seq == 0
    monkeypatch.undo()
    rig.link.connect()
    assert seqs(rig.step()) == [0]


# -- replies -------------------------------------------------------------------------------------------------------


def test_answer_settles_and_is_heard(rig):
    """Pins the reply's way to the counters and to the application, with the time since the question."""
    asked = rig.ask().seq
    rig.now += 0.25
    rig.reply(asked, answer=pb.Answer(release=7, score=0.5, label=3))
    heard = rig.outcomes[-1]
    assert (heard.seq, heard.by, heard.release, heard.score, heard.label) == (asked, AnsweredBy.GATEWAY, 7, 0.5, 3)
    assert (heard.reason, heard.latency_s) == ("answered", 0.25)
    assert rig.committed() == {"produced": 1, "accepted": 1, "asked.no_model": 1, "answered": 1}
    assert rig.step(100.0) == []


def test_duplicate_replies_settle_once(rig):
    """Pins that a reply repeated, in one message or another, is counted and heard once."""
    asked = rig.ask().seq
    rig.reply(asked, asked)
    rig.reply(asked)
    rig.reply(asked, status=pb.STATUS_INVALID_ARGUMENT)
    assert rig.committed() == {"produced": 1, "accepted": 1, "asked.no_model": 1, "answered": 1}
    assert [outcome.by for outcome in rig.outcomes] == [AnsweredBy.NOBODY, AnsweredBy.GATEWAY]


@pytest.mark.parametrize(
    ("status", "counter"),
    [
        (pb.STATUS_NOT_FOUND, "replies.not_found"),
        (pb.STATUS_RESOURCE_EXHAUSTED, "replies.resource_exhausted"),
        (pb.STATUS_INTERNAL, "replies.internal"),
        (77, "replies.unknown"),
    ],
)
def test_reply_that_asks_for_patience_keeps_it_owed(rig, status, counter):
    """Pins that it is asked again after a fifth of the retry time and not before, also by a newer gateway's word."""
    asked = rig.ask().seq
    rig.reply(asked, status=status)
    counters = rig.committed()
    assert (counters[counter], counters["in_flight"]) == (1, 1)
    assert rig.step(1.9) == []
    assert seqs(rig.step(0.1)) == [asked]
    rig.check_ledger()


def test_invalid_argument_quarantines(rig, caplog):
    """Pins that a reading refused for ever is let go, told and counted once, and not heard as an answer."""
    asked = rig.ask().seq
    rig.reply(asked, status=pb.STATUS_INVALID_ARGUMENT)
    rig.reply(asked, status=pb.STATUS_INVALID_ARGUMENT)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert rig.committed().get("quarantined") == 1
    assert rig.step(100.0) == []
    assert [outcome.by for outcome in rig.outcomes] == [AnsweredBy.NOBODY]
    rig.check_ledger()


@pytest.mark.parametrize("epoch", [b"e" * 16, b"short", b""])
def test_reply_to_another_store_settles_nothing(rig, epoch):
    """Pins that numbers mean nothing without their epoch: a cloned or wiped device's answer is not this one's."""
    asked = rig.ask().seq
    rig.reply(asked, epoch=epoch)
    assert rig.committed().get("in_flight") == 1


# -- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [True, False])
def test_restarted_device_replays_what_it_owes(rig, killed):
    """Pins that a question survives its process, with its number and epoch, and is known as one sent before."""
    asked = rig.ask().seq
    (before,) = rig.questions
    rig.restart(killed=killed)
    rig.link.connect()
    (again,) = rig.step()
    assert (again.replay, again.epoch, seqs([again])) == (True, before.epoch, [asked])
    rig.reply(asked)
    assert rig.committed() == {"produced": 1, "accepted": 1, "asked.no_model": 1, "answered": 1}


def test_numbers_are_never_used_twice(rig):
    """Pins that not even a reading which a kill took gives its number to another."""
    used = []
    for _ in range(3):
        used += [rig.read(float(value)).seq for value in range(300)]
        rig.restart()
    assert len(set(used)) == len(used) == 900
    assert rig.committed() == {}


# -- state ---------------------------------------------------------------------------------------------------------


def states(rig):
    return [message for route, message, *_ in rig.link.sent if route is Route.STATE]


def test_state_reports_committed_counters_and_models(rig):
    """Pins NodeState: the outbox's counters, the link's, and what the update client says of the slots."""
    rig.device.model_states = lambda: [ModelState(model="vibration", release=2)]
    rig.link.counters["connects"] = 1
    rig.read(1.0)
    rig.step()
    (state,) = states(rig)
    expected = {"produced": 1, "accepted": 1, "asked.no_model": 1, "connects": 1}
    assert (dict(state.counters), state.role) == (expected, "device")
    assert [model.release for model in state.models] == [2]
    assert state.time_quality == TIME_QUALITY_SYNCED


def test_state_says_that_the_clock_cannot_be_right(rig):
    """Pins the way from the update client, which knows from signed metadata, to NodeState."""
    rig.device.clock_suspect = lambda: True
    rig.step()
    (state,) = states(rig)
    assert state.time_quality == TIME_QUALITY_SUSPECT


def test_state_is_reported_on_command(rig):
    """Pins `report_state`: the state follows at the next tick, and the command is answered."""
    rig.step()
    rig.link.deliver(
        Route.COMMAND,
        command_pb2.Command(id=b"1", expires_at_us=1 << 60, report_state=command_pb2.ReportState()),
    )
    results = [message for route, message, *_ in rig.link.sent if route is Route.RESULT]
    assert [result.status for result in results] == [command_pb2.COMMAND_STATUS_DONE]
    rig.step()
    assert len(states(rig)) == 2


def test_device_is_settled_when_the_broker_has_its_state(rig):
    """Pins what the simulator waits for before it ends: nothing unsaid, nothing unacknowledged."""
    assert not rig.device.is_settled
    rig.step()
    assert not rig.device.is_settled
    rig.link.acknowledge()
    assert rig.device.is_settled
    rig.device.report_soon()
    assert not rig.device.is_settled


def test_readings_keep_their_float32_values(rig):
    """Pins that what is asked is what was read, bit for bit."""
    values = np.random.default_rng(8).normal(0.0, 1e6, 50).astype(np.float32)
    rig.read(*values)
    ((row,),) = [question.rows for question in rig.step()]
    assert np.array(row.reading.scalars.values, np.float32).tobytes() == values.tobytes()


# -- what the release says of its input ----------------------------------------------------------------------------


def test_window_is_asked_as_one_row_and_every_reading_is_accounted_for(make_rig, tmp_path):
    """Pins windows from the release: scored and asked whole, named after the reading that completes them."""
    rig = make_rig(tmp_path, policy=NO_AUDIT)
    rig.link.connect()
    rig.activate(shape=[3, 2], window=3, stride=2, threshold=5.0)
    outcomes = [rig.read(at, -at, reference=f"row/{at}") for at in range(6)]
    (question,) = rig.step()
    (row,) = question.rows
    assert list(row.reading.scalars.values) == [2, -2, 3, -3, 4, -4]
    assert (row.reading.seq, row.reading.reference) == (outcomes[4].seq, "row/4")
    assert row.device_answer.score == pytest.approx(29 / 3)
    expected = ["gathered", "gathered", "below_threshold", "gathered", "score", "gathered"]
    assert [outcome.reason.partition(".")[2] for outcome in outcomes] == expected
    rig.check_ledger()


@pytest.mark.parametrize("broken_by", ["gap", "refuse", "activate"])
def test_no_window_spans_what_broke_the_series(make_rig, tmp_path, broken_by):
    """Pins that a lost reading, a bad one or another release begins the window anew."""
    rig = make_rig(tmp_path, policy=NO_AUDIT)
    schema = {"shape": [2], "window": 2}
    rig.activate(**schema)
    rig.read(1.0)
    if broken_by == "activate":
        rig.activate(release=2, **schema)
    else:
        getattr(rig.device, broken_by)()
    assert [rig.read(value).reason for value in (2.0, 3.0)] == ["kept.gathered", "asked.score"]
    assert rig.committed().get("bad_readings", 0) == (broken_by == "refuse")
    rig.check_ledger()


def test_release_that_contradicts_itself_is_refused_and_the_old_one_stays(rig):
    """Pins that the schema is checked before the switch."""
    rig.activate()
    with pytest.raises(ModelError, match="3 values are not a window of 2"):
        rig.activate(release=2, shape=[3], window=2)
    assert rig.device.release == 1


def test_picture_is_asked_in_the_size_of_the_release(rig):
    """Pins that the gateway gets what the model gets, not what the camera saw."""
    rig.activate(shape=[1, 2, 1], resize=RESIZE_AREA, threshold=0.0)
    picture = np.array([[2, 4, 6, 8], [2, 4, 6, 8]], np.float32)[..., None]
    rig.device.read(Reading(picture, 17), rig.now)
    ((row,),) = [question.rows for question in rig.step()]
    assert list(row.reading.scalars.values) == [3, 7]
