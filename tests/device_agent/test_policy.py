import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.policy import Choice, PolicyConfig, UploadPolicy

pytestmark = pytest.mark.device

DAY = 86_400.0
ANY_SCORE = st.none() | st.floats(allow_nan=True, allow_infinity=True)


def policy(*, audit=0.0, share=1.0, per_minute=10**9, **others):
    return UploadPolicy(PolicyConfig(audit_share=audit, max_share=share, max_per_minute=per_minute, **others))


def step(of, score, *, chance=0.5, now=0.0, threshold=0.0, size=100, changed=True):
    """One reading on its way through the policy, as the device leads it."""
    audit = of.take(chance, now)
    if not changed and not audit:
        return None
    choice = of.decide(score, threshold, audit=audit)
    if choice.is_ask and not of.spend(size, now):
        return Choice.OVER_BUDGET
    return choice


def steps(of, scores, *, seed=0, gap_s=0.0, start=0.0, **others):
    chances = np.random.default_rng(seed).random(len(scores))
    return [
        step(of, score, chance=chance, now=start + index * gap_s, **others)
        for index, (score, chance) in enumerate(zip(scores, chances.tolist(), strict=True))
    ]


def count(made, *choices):
    return sum(choice in choices for choice in made)


def asked(made):
    return count(made, Choice.ASK_SCORE, Choice.ASK_AUDIT, Choice.ASK_NO_MODEL)


# -- score -----------------------------------------------------------------------------------------------------------


def test_released_threshold_is_a_floor():
    """Pins that quiet data is not asked about to fill the share, and that a score at the threshold stays."""
    one = policy(share=0.5)
    assert steps(one, [0.1, 0.3, 0.3000001], threshold=0.3) == [
        Choice.BELOW_THRESHOLD,
        Choice.BELOW_THRESHOLD,
        Choice.ASK_SCORE,
    ]
    made = steps(one, np.random.default_rng(2).uniform(0.0, 0.3, 4000), threshold=0.3)
    assert asked(made) == 0
    assert one.threshold(0.3) == 0.3


@pytest.mark.parametrize(("own", "score", "expected"), [(0.0, 0.1, True), (2.0, 1.5, False), (None, 0.1, False)])
def test_own_threshold_stands_in_for_the_released_one(own, score, expected):
    """Pins that `score_threshold` may lie below the release's or above it."""
    one = policy(score_threshold=own)
    assert (step(one, score, threshold=1.0) is Choice.ASK_SCORE) is expected
    assert one.threshold(1.0) == (1.0 if own is None else own)


def test_threshold_in_force_rises_with_the_scores():
    """Pins what is reported where the budget is less than what exceeds the released threshold."""
    one = policy(share=0.1)
    steps(one, np.random.default_rng(3).uniform(0.0, 1.0, 3000), threshold=0.5)
    assert one.threshold(0.5) == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize("absurd", [float("inf"), float("nan"), 1e37])
def test_one_absurd_score_is_asked_and_changes_little(absurd):
    """Pins that a glitch is asked about and neither mutes the device nor spoils its threshold."""
    one = policy(share=0.2)
    scores = np.random.default_rng(5).uniform(0.0, 1.0, 4000)
    steps(one, scores)
    before = one.threshold(0.0)
    assert steps(one, [absurd]) == [Choice.ASK_SCORE]
    assert one.threshold(0.0) == pytest.approx(before, abs=0.01)


def test_forgotten_scores_leave_the_released_threshold():
    """Pins that a new model starts with its own threshold, whatever the last one's scores were."""
    one = policy(share=0.2)
    steps(one, [100.0] * 4000)
    assert one.threshold(0.5) > 50.0
    one.forget_scores()
    assert one.threshold(0.5) == 0.5
    assert step(one, 0.6, threshold=0.5) is Choice.ASK_SCORE


@pytest.mark.parametrize("audit", [0.0, 1.0])
def test_no_model_is_asked(audit):
    """Pins that a device that cannot answer asks, whatever its share, and says that this is why."""
    assert step(policy(audit=audit, share=audit or 0.01), None) is Choice.ASK_NO_MODEL


# -- share -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats().filter(lambda value: value != -math.inf), min_size=1, max_size=10),
    share=st.sampled_from([0.02, 0.1, 0.5]),
    audits=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_questions_keep_to_the_share_audits_included(values, share, audits, seed):
    """Pins the budget: scores and audits together meet it, whatever the scores and however it is divided."""
    one = policy(share=share, audit=share * audits, score_threshold=-math.inf)
    scores = np.random.default_rng(10_000 + seed).choice(values, 6000)  # independent of the lots
    made = steps(one, scores, seed=seed)[1000:]
    assert asked(made) / len(made) == pytest.approx(share, rel=0.3 if audits == 1.0 else 0.12, abs=0.004)
    assert one.asked_share == pytest.approx(asked(made) / len(made), rel=0.3)


def test_unchanged_readings_count_into_the_share():
    """Pins that the budget is of all readings: what the change detector kept leaves more for the others."""
    one = policy(share=0.02)
    scores = np.random.default_rng(6).exponential(1.0, 20_000)
    made = [step(one, score, chance=0.5, changed=index % 4 == 0) for index, score in enumerate(scores)]
    assert asked(made[2000:]) / 18_000 == pytest.approx(0.02, rel=0.1)


# -- audits ----------------------------------------------------------------------------------------------------------


@given(share=st.floats(0.0, 1.0), chance=st.floats(0.0, 1.0, exclude_max=True))
def test_audit_is_a_plain_draw(share, chance):
    """Pins that exactly the draws below the share are audits: none at 0, all at 1."""
    assert policy(audit=share).take(chance, 0.0) is (chance < share)


@given(scores=st.lists(ANY_SCORE, max_size=60), seed=st.integers(0, 99), changed=st.booleans())
def test_audit_is_independent_of_scores(scores, seed, changed):
    """Pins that which readings are audited depends on the draws alone, never on a score or what was asked before."""
    one, other = policy(audit=0.3, share=0.4), policy(audit=0.3, share=0.4)
    chances = np.random.default_rng(seed).random(len(scores)).tolist()
    drawn = []
    for score, chance in zip(scores, chances, strict=True):
        step(one, score, chance=chance, changed=changed)
        drawn.append(other.take(chance, 0.0))
    assert drawn == [chance < 0.3 for chance in chances]


def test_audit_is_asked_whatever_its_score():
    """Pins that an audit is counted as one even where its score would have been asked for, or nothing changed."""
    one = policy(audit=1.0)
    made = [step(one, 0.1, threshold=0.5), step(one, 9.0), step(one, 0.1, changed=False)]
    assert made == [Choice.ASK_AUDIT] * 3


# -- caps ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    caps=st.fixed_dictionaries(
        {"max_per_minute": st.integers(1, 20)},
        optional={
            "max_per_day": st.integers(1, 60),
            "max_bytes_per_minute": st.integers(1, 3000),
            "max_bytes_per_day": st.integers(1, 9000),
        },
    ),
    readings=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 9.0, 61.0, 7000.0, 90_000.0]),
            ANY_SCORE,
            st.integers(1, 900),
            st.floats(0.0, 1.0, exclude_max=True),
        ),
        min_size=1,
        max_size=150,
    ),
    audit=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_no_minute_and_no_day_exceeds_a_cap(caps, readings, audit):
    """Pins every cap in every window, by messages and by bytes, whatever the reasons, audits and no model included."""
    one = UploadPolicy(PolicyConfig(audit_share=audit, max_share=1.0, **caps))
    now, spent = 0.0, []
    for gap, score, size, chance in readings:
        now += gap
        choice = step(one, score, chance=chance, now=now, size=size)
        if choice.is_ask:
            spent.append((now, size))
    for end, _ in spent:
        for name, cap in caps.items():
            span = DAY if name.endswith("day") else 60.0
            inside = [size for at, size in spent if end - span < at <= end]
            assert (sum(inside) if "bytes" in name else len(inside)) <= cap


def test_spent_budget_keeps_readings_and_says_why():
    """Pins the counter of what would have been asked, audits too, and that the next day begins anew."""
    one = policy(audit=0.5, max_bytes_per_day=250)
    made = [step(one, 1.0, chance=chance, now=1.0) for chance in (0.9, 0.1, 0.9, 0.1)]
    assert made == [Choice.ASK_SCORE, Choice.ASK_AUDIT, Choice.OVER_BUDGET, Choice.OVER_BUDGET]
    assert one.spend(250, DAY * 1.1)


def test_what_is_not_asked_costs_no_budget():
    """Pins that quiet readings leave the cap alone."""
    one = policy(per_minute=1)
    assert steps(one, [0.1, 0.2, 9.0], threshold=0.5) == [
        Choice.BELOW_THRESHOLD,
        Choice.BELOW_THRESHOLD,
        Choice.ASK_SCORE,
    ]


def test_threshold_follows_the_bytes_of_a_day():
    """Pins the derived share: a day's bytes are spent over the day, on its highest scores, and nearly all of them."""
    one = policy(max_bytes_per_day=100 * 300, audit=0.05)
    scores = np.random.default_rng(7).exponential(1.0, 3 * 8640)
    made = steps(one, scores, gap_s=10.0, size=300)
    assert one.budget_share == pytest.approx(100 / 8640, rel=0.03)
    last_day = made[2 * 8640 :]
    assert 85 <= asked(last_day) <= 100
    assert count(last_day, Choice.OVER_BUDGET) <= 15
    for half in (last_day[:4320], last_day[4320:]):
        assert asked(half) >= 35
    high = scores[2 * 8640 :] > np.quantile(scores, 0.98)
    by_score = np.array([choice is Choice.ASK_SCORE for choice in last_day])
    assert (by_score & high).sum() / by_score.sum() > 0.8


def test_tight_caps_thin_audits_in_proportion():
    """Pins that in a small day budget audits keep their part of the questions, no more and no less."""
    one = policy(audit=0.02, share=0.2, max_per_day=200)
    made = steps(one, np.random.default_rng(8).exponential(1.0, 10 * 8640), gap_s=10.0)[8640:]
    assert count(made, Choice.ASK_AUDIT) / asked(made) == pytest.approx(0.1, rel=0.25)


def test_device_without_a_model_spreads_its_questions():
    """Pins that questions of a device that cannot answer are drawn by lot over the minute, not its first readings."""
    one = policy(per_minute=60)
    made = steps(one, [None] * 60_000, gap_s=0.1)
    late = made[6000:]
    assert 0.87 * 90 * 60 < asked(late) <= 90 * 60
    assert all(asked(late[first : first + 150]) for first in range(0, len(late), 150))


def test_caps_of_no_consequence_leave_the_share_alone():
    """Pins that generous caps do not shrink the budget, nor does a clock that stands."""
    one = policy(share=0.5, per_minute=600, max_bytes_per_day=10**9)
    steps(one, [1.0] * 500, gap_s=1.0)
    assert one.budget_share == 0.5
    still = policy(share=0.5, per_minute=1)
    steps(still, [1.0] * 500)
    assert still.budget_share == 0.5


# -- names -----------------------------------------------------------------------------------------------------------


def test_choices_are_the_counters_of_the_contract():
    """Pins the counters' names and which of them are questions."""
    assert {choice.value: choice.is_ask for choice in Choice} == {
        "kept.below_threshold": False,
        "kept.over_budget": False,
        "asked.score": True,
        "asked.no_model": True,
        "asked.command": True,
        "asked.audit": True,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"audit_share": -0.1},
        {"audit_share": 1.1},
        {"audit_share": float("nan")},
        {"audit_share": 0.3, "max_share": 0.2},
        {"max_share": 0.0, "audit_share": 0.0},
        {"max_share": 1.1},
        {"max_per_minute": 0},
        {"max_per_day": 0},
        {"max_bytes_per_minute": -1},
        {"max_bytes_per_day": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    """Pins that budgets which cannot be are refused, with the settings named."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PolicyConfig(**wrong)
