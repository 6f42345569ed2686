import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.caps import Cap, Pace

pytestmark = pytest.mark.device

MINUTE = 60.0
DAY = 86_400.0


@given(
    limit=st.integers(1, 50),
    period_s=st.sampled_from([MINUTE, DAY]),
    wishes=st.lists(st.tuples(st.floats(0.0, 0.6), st.integers(1, 20)), min_size=1, max_size=150),
    start=st.floats(0.0, 1e6),
)
def test_no_window_holds_more_than_the_cap(limit, period_s, wishes, start):
    """Pins the promise: whatever is wished for and when, no span of a whole period spends more than the limit."""
    cap = Cap(limit, period_s)
    now, spent = start, []
    for gap, cost in wishes:
        now += gap * period_s
        if cap.fits(cost, now):
            cap.spend(cost)
            spent.append((now, cost))
    for end, _ in spent:
        assert sum(cost for at, cost in spent if end - period_s < at <= end) <= limit


def test_whole_limit_may_be_spent_at_once_and_comes_back():
    """Pins that a burst is served, and that its room is free again a slot after the period at the latest."""
    cap = Cap(10, MINUTE)
    assert cap.fits(10, 5.0)
    cap.spend(10)
    assert [cap.fits(1, now) for now in (5.0, 30.0, 65.0, 66.0)] == [False, False, False, True]
    assert cap.fits(10, 66.0)
    assert not cap.fits(11, 66.0)


def test_steady_spending_reaches_the_lasting_rate():
    """Pins that what `lasting` promises can be had, and is 60/61 of the limit."""
    cap = Cap(1000, DAY)
    spent = 0
    for now in np.arange(0.0, 5 * DAY, DAY / cap.lasting / DAY / 3):
        if cap.fits(1, now):
            cap.spend(1)
            spent += 1
    assert cap.lasting * DAY == pytest.approx(1000 * 60 / 61)
    assert spent >= 5 * 0.98 * 1000


def test_clock_that_stands_still_or_steps_back_frees_nothing():
    """Pins that only time that has passed makes room."""
    cap = Cap(1, MINUTE)
    assert cap.fits(1, 500.0)
    cap.spend(1)
    assert [cap.fits(1, now) for now in (500.0, 10.0, 559.0, 561.5)] == [False, False, False, True]


def test_spending_unasked_is_a_mistake():
    """Pins that nobody books without having asked."""
    with pytest.raises(RuntimeError, match="nothing was asked"):
        Cap(1, MINUTE).spend(1)


def test_pace_is_the_readings_of_a_second():
    """Pins the rate after the first look, and that nothing is claimed before it."""
    pace = Pace()
    news = [pace.count(index * 0.5) for index in range(41)]
    assert [index for index, new in enumerate(news) if new] == [20, 40]
    assert pace.per_second == pytest.approx(2.0, rel=0.05)
    assert not Pace().per_second


def test_pace_forgets_over_an_hour():
    """Pins that night follows day: three hours of another pace are the pace."""
    pace = Pace()
    now = 0.0
    for gap_s, readings in ((0.5, 7200), (5.0, 2160)):
        for _ in range(readings):
            now += gap_s
            pace.count(now)
    assert pace.per_second == pytest.approx(0.2, rel=0.5)


def test_asked_share_is_of_recent_readings():
    """Pins the realised share, before any time has passed and after an hour's change."""
    pace = Pace()
    assert not pace.asked_share
    for index in range(10):
        pace.count(0.0)
        if index < 4:
            pace.count_asked()
    assert pace.asked_share == 0.4
    for now in range(1, 4 * 3600):
        pace.count(float(now))
        if now % 10 == 0:
            pace.count_asked()
    assert pace.asked_share == pytest.approx(0.1, rel=0.05)
