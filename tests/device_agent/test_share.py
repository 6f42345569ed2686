import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.share import ShareKeeper

pytestmark = pytest.mark.device

ANY_SCORE = st.floats(allow_nan=True, allow_infinity=True)
SHARES = st.sampled_from([0.01, 0.02, 0.1, 0.3, 0.9])


def keep(share, scores, *, audit=0.0, seed=0, keeper=None):
    """Which of the scores are asked; None is a reading that had none. Audits are charged as the policy does."""
    keeper = keeper or ShareKeeper(share)
    asked = []
    for score, draw, chance in zip(scores, *np.random.default_rng(seed).random((2, len(scores))), strict=True):
        keeper.allow()
        is_audit = draw < audit
        is_high = score is not None and keeper.is_high(float(score), float(chance))
        if is_audit or is_high:
            keeper.charge()
        asked.append(is_audit or is_high)
    return np.array(asked)


def credit(share):
    return max(5.0, 250 * share)


@settings(max_examples=60, deadline=None)
@given(
    share=SHARES,
    parts=st.lists(st.tuples(ANY_SCORE, st.integers(1, 300)), min_size=1, max_size=6),
    slope=st.sampled_from([-1.0, 0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_no_sequence_of_scores_exceeds_the_share_for_long(share, parts, slope, seed):
    """Pins the bound for every span of any scores, drifting, jumping, constant and broken ones included."""
    scores = [score + slope * index for score, count in parts for index in range(count)]
    ahead = np.cumsum(keep(share, scores, seed=seed)) - share * np.arange(1, len(scores) + 1)
    low = np.minimum.accumulate(np.concatenate([[0.0], ahead]))[:-1]
    assert (ahead - low).max() <= 2 * credit(share) + 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(values=st.lists(ANY_SCORE, min_size=1, max_size=20), share=SHARES, seed=st.integers(0, 999))
def test_share_is_met_for_any_distribution(values, share, seed):
    """Pins the realised share for independent draws of whatever values, down to a single one or none but NaN."""
    scores = np.random.default_rng(10_000 + seed).choice(values, 6000)  # independent of the lots
    assert keep(share, scores, seed=seed)[1000:].mean() == pytest.approx(share, rel=0.1, abs=0.002)


CONTINUOUS = {
    "uniform": lambda rng, n: rng.uniform(0.0, 1.0, n),
    "lognormal": lambda rng, n: rng.lognormal(-7.0, 2.0, n),
    "no mean": lambda rng, n: rng.pareto(0.5, n),
    "negative": lambda rng, n: -rng.exponential(1.0, n),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_budget_goes_to_the_highest_scores(name, share):
    """Pins selectivity: nearly all that is asked is of the highest scores, which an oracle would have asked."""
    scores = CONTINUOUS[name](np.random.default_rng(1), 20_000)
    asked = keep(share, scores)[1000:]
    best = scores[1000:] > np.quantile(scores, 1 - 1.5 * share)
    assert (asked & best).sum() / asked.sum() > 0.85
    assert asked.mean() == pytest.approx(share, rel=0.03)


def test_scale_and_offset_mean_nothing():
    """Pins that decisions rest on the scores' order alone."""
    scores = np.random.default_rng(2).integers(0, 50, 3000).astype(float)
    assert (keep(0.05, scores) == keep(0.05, 1e6 * scores - 3.0)).all()
    assert (keep(0.05, scores) == keep(0.05, np.exp(scores))).all()


@pytest.mark.parametrize("factor", [1e3, 1e-3, 0.5, 2.0])
def test_share_recovers_within_a_window_of_another_scale(factor):
    """Pins recovery from a jump of the scores: after 1000 readings the share is as it was, up or down."""
    rng = np.random.default_rng(3)
    scores = np.concatenate([rng.lognormal(0, 1, 5000), factor * rng.lognormal(0, 1, 9000)])
    asked = keep(0.02, scores)
    assert asked[5000:6000].mean() <= 0.02 + 11 / 1000
    assert asked[6000:].mean() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("per_reading", [1e-3, -1e-3])
def test_share_holds_while_scores_drift_without_end(per_reading):
    """Pins the account: where every score is a record, or none ever is, ranks alone would ask all or nothing."""
    rng = np.random.default_rng(4)
    scores = np.exp(per_reading * np.arange(20_000)) * rng.lognormal(0, 1, 20_000)
    assert keep(0.02, scores)[1000:].mean() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("scored", [0.5, 0.1])
def test_share_is_of_all_readings_not_of_those_with_a_score(scored):
    """Pins that readings which a change detector kept lend their share to the others."""
    rng = np.random.default_rng(5)
    scores = [score if rng.random() < scored else None for score in rng.exponential(1.0, 20_000)]
    asked = keep(0.02, scores)[2000:]
    assert asked.mean() == pytest.approx(0.02, rel=0.1)
    best = np.nanquantile([np.nan if score is None else score for score in scores], 1 - 0.03 / scored)
    assert np.mean([scores[2000 + place] > best for place in np.flatnonzero(asked)]) > 0.9


def test_share_beyond_the_scored_ones_asks_them_all():
    """Pins that a budget which all scored readings fit is no reason to keep any of them."""
    rng = np.random.default_rng(6)
    scores = [1.0 if rng.random() < 0.05 else None for _ in range(5000)]
    asked = keep(0.2, scores)[1500:]
    assert asked.sum() == sum(score is not None for score in scores[1500:])


def test_audits_count_within_the_share():
    """Pins that what is drawn by lot leaves that much less for scores."""
    scores = np.random.default_rng(7).exponential(1.0, 30_000)
    assert keep(0.05, scores, audit=0.02)[1000:].mean() == pytest.approx(0.05, rel=0.05)


def test_share_of_audits_alone_leaves_nothing_for_scores():
    """Pins the edge where both are one, the whole included."""
    scores = np.arange(3000.0)
    assert keep(1.0, scores, audit=1.0).all()
    assert keep(0.05, scores, audit=0.05)[100:].mean() == pytest.approx(0.05, rel=0.3)


def test_whole_share_asks_everything():
    """Pins that a share of 1 is no limit."""
    assert keep(1.0, np.random.default_rng(8).normal(size=3000)).all()


def test_start_trusts_the_released_threshold_on_credit():
    """Pins the beginning: what comes first is asked, as far as the credit goes, and then the rank decides."""
    asked = keep(0.02, np.ones(3000))
    assert np.flatnonzero(asked[:32]).tolist() == [0, 1, 2, 3, 4, 5]
    assert asked[32:].mean() == pytest.approx(0.02, rel=0.1)


def test_smaller_share_holds_from_then_on():
    """Pins that a budget which shrinks is followed at once."""
    keeper = ShareKeeper(0.5)
    scores = np.random.default_rng(9).exponential(1.0, 5000)
    keep(0.5, scores, keeper=keeper)
    keeper.set_share(0.02)
    assert keep(0.02, scores, keeper=keeper).mean() == pytest.approx(0.02, rel=0.15)


def test_threshold_parts_asked_from_kept():
    """Pins what is reported: scores clearly above it are asked, those clearly below it stay."""
    keeper = ShareKeeper(0.1)
    assert keeper.threshold == -math.inf
    scores = np.random.default_rng(10).uniform(0.0, 1.0, 4000)
    asked = keep(0.1, scores, keeper=keeper)[2000:]
    assert keeper.threshold == pytest.approx(0.9, abs=0.04)
    assert asked[scores[2000:] > 0.95].all()
    assert not asked[scores[2000:] < 0.8].any()


def test_threshold_of_a_whole_share_is_none():
    """Pins that nothing stands in the way where everything may be asked."""
    keeper = ShareKeeper(1.0)
    keep(1.0, np.arange(100.0), keeper=keeper)
    assert keeper.threshold == -math.inf


def test_forgotten_scores_start_anew():
    """Pins that another model's scores are ranked among their own."""
    keeper = ShareKeeper(0.05)
    keep(0.05, np.full(2000, 100.0), keeper=keeper)
    keeper.forget()
    assert keeper.threshold == -math.inf
    assert keep(0.05, [3.0], keeper=keeper).all()
