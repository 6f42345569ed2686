import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.policy import Choice, PolicyConfig, UploadPolicy

pytestmark = pytest.mark.device

READINGS = 4000
SETTLING = 1000
STREAMS = {
    "uniform": lambda rng: rng.uniform(0.0, 1.0, READINGS),
    "exponential": lambda rng: rng.exponential(300.0, READINGS),
    "lognormal": lambda rng: rng.lognormal(-7.0, 1.0, READINGS),
    "constant": lambda rng: np.full(READINGS, rng.uniform(0.01, 9.0)),
    "two values": lambda rng: rng.choice([0.001, 1.0], READINGS),
}


def policy(*, audit=0.0, share=1.0, per_minute=10**9):
    return UploadPolicy(PolicyConfig(audit_share=audit, max_share=share, max_per_minute=per_minute))


def choices(of, scores, threshold=0.0):
    return [of.decide(float(score), threshold, audit=False, now=0.0) for score in scores]


def asked_share(made):
    return sum(choice is Choice.ASK_SCORE for choice in made) / len(made)


SHARES = st.sampled_from([0.05, 0.2, 0.5, 0.9])
SEEDS = st.integers(0, 2**32)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(STREAMS)), seed=SEEDS, share=SHARES)
def test_share_of_questions_keeps_to_its_maximum(name, seed, share):
    """Pins `max_share` for streams that would all exceed the released threshold, to 5 % and a hundredth."""
    made = choices(policy(share=share), STREAMS[name](np.random.default_rng(seed)))
    assert asked_share(made[SETTLING:]) <= share * 1.05 + 0.01


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(["exponential", "lognormal", "uniform"]), seed=SEEDS, share=SHARES)
def test_share_of_questions_is_made_use_of(name, seed, share):
    """Pins that the threshold rises no further than it must, where scores tell readings apart."""
    made = choices(policy(share=share), STREAMS[name](np.random.default_rng(seed)))
    assert asked_share(made[SETTLING:]) >= share * 0.95 - 0.01


def test_share_keeps_what_scores_highest():
    """Pins that the budget goes to the most interesting readings, not to the first that come."""
    scores = np.random.default_rng(1).uniform(0.0, 1.0, READINGS)
    made = choices(policy(share=0.2), scores)[SETTLING:]
    kept = [score for score, choice in zip(scores[SETTLING:], made, strict=True) if not choice.is_ask]
    asked = [score for score, choice in zip(scores[SETTLING:], made, strict=True) if choice.is_ask]
    assert min(asked) > 0.7
    assert max(kept) < 0.9


def test_released_threshold_is_a_floor():
    """Pins that quiet data is not asked about to fill the share, and that a score at the threshold stays."""
    one = policy(share=0.5)
    assert choices(one, [0.1, 0.3, 0.3000001], threshold=0.3) == [
        Choice.BELOW_THRESHOLD,
        Choice.BELOW_THRESHOLD,
        Choice.ASK_SCORE,
    ]
    choices(one, np.random.default_rng(2).uniform(0.0, 0.3, READINGS), threshold=0.3)
    assert one.threshold(0.3) == 0.3


def test_whole_share_leaves_the_released_threshold_alone():
    """Pins that a share of 1 is no limit."""
    one = policy(share=1.0)
    assert asked_share(choices(one, np.random.default_rng(3).uniform(0.1, 9.0, READINGS))) == 1.0
    assert one.threshold(0.05) == 0.05


def test_threshold_comes_down_after_scores_have_fallen():
    """Pins that a drift which ends does not mute a device: the old scale is forgotten in a few thousand readings."""
    rng = np.random.default_rng(4)
    one = policy(share=0.2)
    choices(one, rng.exponential(1000.0, READINGS))
    choices(one, rng.exponential(1.0, READINGS))
    assert asked_share(choices(one, rng.exponential(1.0, READINGS))) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("absurd", [float("inf"), float("nan"), 1e37])
def test_one_absurd_score_is_asked_and_changes_little(absurd):
    """Pins that a glitch is asked about and neither mutes the device nor spoils its threshold."""
    rng = np.random.default_rng(5)
    one = policy(share=0.2)
    choices(one, rng.uniform(0.0, 1.0, READINGS))
    before = one.threshold(0.0)
    assert choices(one, [absurd]) == [Choice.ASK_SCORE]
    after = []
    for score in rng.uniform(0.0, 1.0, 200):
        choices(one, [score])
        after.append(one.threshold(0.0))
    assert np.abs(np.array(after) - before).max() < 0.3


def test_forgotten_scores_leave_the_released_threshold():
    """Pins that a new model starts with its own threshold, whatever the last one's scores were."""
    one = policy(share=0.2)
    choices(one, [100.0] * READINGS)
    assert one.threshold(0.5) > 50.0
    one.forget_scores()
    assert one.threshold(0.5) == 0.5


@given(share=st.floats(0.0, 1.0), chance=st.floats(0.0, 1.0, exclude_max=True))
def test_audit_is_a_plain_draw(share, chance):
    """Pins that exactly the draws below the share are audits: none at 0, all at 1."""
    assert policy(audit=share).is_audit(chance) is (chance < share)


def test_audit_share_is_what_was_asked_for():
    """Pins the share over many draws."""
    one = policy(audit=0.05)
    draws = np.random.default_rng(6).random(20_000)
    assert sum(map(one.is_audit, draws)) / len(draws) == pytest.approx(0.05, abs=0.005)


def test_audit_is_asked_whatever_its_score():
    """Pins that an audit is counted as one even where its score would have been asked for."""
    one = policy()
    assert [one.decide(score, 0.5, audit=True, now=0.0) for score in (0.1, 9.0)] == [Choice.ASK_AUDIT] * 2


@pytest.mark.parametrize("audit", [False, True])
def test_no_model_is_asked(audit):
    """Pins that a device that cannot answer asks, and says that this is why."""
    assert policy().decide(None, 0.5, audit=audit, now=0.0) is Choice.ASK_NO_MODEL


@given(
    per_minute=st.integers(1, 50),
    gaps=st.lists(st.floats(0.0, 30.0), min_size=1, max_size=200),
    scores=st.sampled_from([None, 1.0]),
    audit=st.booleans(),
)
def test_questions_of_any_span_keep_to_the_bucket(per_minute, gaps, scores, audit):
    """Pins the bound of every span: a minute's worth at once, and the rate on top, whatever the reasons."""
    one = policy(per_minute=per_minute)
    now, asked_at = 0.0, []
    for gap in gaps:
        now += gap
        if one.decide(scores, 0.0, audit=audit, now=now).is_ask:
            asked_at.append(now)
    for first, start in enumerate(asked_at):
        for last in range(first, len(asked_at)):
            span_s = asked_at[last] - start
            assert last - first + 1 <= per_minute * (1.0 + span_s / 60.0) + 1e-6


def test_bucket_refills_with_time_and_no_further_than_full():
    """Pins the rate: a token each 60/n seconds, and never more than a minute's worth."""
    one = policy(per_minute=4)

    def ask(now):
        return one.decide(None, 0.0, audit=False, now=now)

    assert [ask(0.0) for _ in range(5)] == [Choice.ASK_NO_MODEL] * 4 + [Choice.OVER_BUDGET]
    assert [ask(14.0), ask(16.0), ask(16.0)] == [Choice.OVER_BUDGET, Choice.ASK_NO_MODEL, Choice.OVER_BUDGET]
    assert [ask(9999.0) for _ in range(5)] == [Choice.ASK_NO_MODEL] * 4 + [Choice.OVER_BUDGET]


def test_clock_that_stands_still_or_steps_back_gives_nothing():
    """Pins that only time that has passed refills the bucket."""
    one = policy(per_minute=1)
    made = [one.decide(None, 0.0, audit=False, now=now) for now in (100.0, 100.0, 40.0, 41.0)]
    assert made == [Choice.ASK_NO_MODEL] + [Choice.OVER_BUDGET] * 3


def test_what_is_not_asked_costs_no_budget():
    """Pins that quiet readings leave the bucket full."""
    one = policy(per_minute=1)
    assert [one.decide(score, 0.5, audit=False, now=0.0) for score in (0.1, 0.2, 9.0)] == [
        Choice.BELOW_THRESHOLD,
        Choice.BELOW_THRESHOLD,
        Choice.ASK_SCORE,
    ]


def test_choices_are_the_counters_of_the_contract():
    """Pins the counters' names and which of them are questions."""
    assert {choice.value: choice.is_ask for choice in Choice} == {
        "kept.below_threshold": False,
        "kept.over_budget": False,
        "asked.score": True,
        "asked.no_model": True,
        "asked.audit": True,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"audit_share": -0.1},
        {"audit_share": 1.1},
        {"audit_share": float("nan")},
        {"max_share": 0.0},
        {"max_share": 1.1},
        {"max_per_minute": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    """Pins that budgets which cannot be are refused, with the settings named."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PolicyConfig(**wrong)
