"""What docs/detectors.md says of the detector: it looks at the past alone, in no unit, and sees levels and patterns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.detectors import novelty
from cloud.detectors.alarms import Alarms
from cloud.detectors.novelty import NoveltyConfig, NoveltyDetector


def scores_of(values, warm_up=100, memory=200, *, learns=True):
    rows = values[:, None] if values.ndim == 1 else values
    config = NoveltyConfig(channels=rows.shape[1], warm_up=warm_up, memory=memory, learns=learns)
    detector = NoveltyDetector(config)
    return np.array([detector.update(row) for row in rows])


def day(rows, seed=0):
    """A noisy sine of 50 readings a period."""
    return np.sin(np.arange(rows) * 2 * np.pi / 50) + 0.05 * np.random.default_rng(seed).normal(size=rows)


@given(seed=st.integers(0, 99), cut=st.integers(1, 249), channels=st.integers(1, 3), learns=st.booleans())
def test_score_never_depends_on_the_future(seed, cut, channels, learns):
    """Pins causality: what comes after a reading, here nothing or something wild, does not change its score."""
    values = np.random.default_rng(seed).normal(size=(250, channels))
    whole, wild = scores_of(values, learns=learns), values.copy()
    wild[cut:] *= 1e3
    np.testing.assert_array_equal(scores_of(values[:cut], learns=learns), whole[:cut])
    np.testing.assert_array_equal(scores_of(wild, learns=learns)[:cut], whole[:cut])


@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-6, 0.1, 7.0, 1e9]), offset=st.sampled_from([0.0, -3.0, 1e3]))
def test_score_does_not_depend_on_the_unit(seed, factor, offset):
    """Pins that one threshold can serve every sensor."""
    values = np.random.default_rng(seed).normal(size=200)
    np.testing.assert_allclose(scores_of(factor * (values + offset)), scores_of(values), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 99), channels=st.integers(1, 3))
def test_nearest_pattern_is_the_nearest(seed, channels):
    """Pins the sums of sums against a search of all patterns, over several turns of the memory."""
    memory, values = 90, np.random.default_rng(seed).normal(size=(300, channels))
    patterns = novelty._Patterns(channels, memory)
    for end, row in enumerate(values, start=1):
        expected = [nearest(values[:end], length, memory) for length in (1, 4, 16)]
        np.testing.assert_allclose(patterns.distances(row), expected, rtol=1e-9)


@given(seed=st.integers(0, 99), channels=st.integers(1, 3))
def test_nearest_known_pattern_is_the_nearest(seed, channels):
    """Pins the same of a recording that never changes."""
    rng = np.random.default_rng(seed)
    known, values = rng.normal(size=(60, channels)), rng.normal(size=(50, channels))
    patterns, stream = novelty._KnownPatterns(known), np.concatenate([known, values])
    for end, row in enumerate(values, start=61):
        found = patterns.distances(row)
        for length, distance in zip((1, 4, 16), found, strict=True):
            newest = stream[end - length : end]
            starts = range(60 - length + 1)
            expected = min(np.sqrt(np.mean((known[at : at + length] - newest) ** 2)) for at in starts)
            np.testing.assert_allclose(distance, expected, rtol=1e-9)


def nearest(values, length, memory):
    end = len(values)
    earliest = end - memory  # the last reading of the oldest pattern is `memory` readings back
    ends = range(max(length, earliest), end - length + 1)
    newest = values[end - length :]
    return min((np.sqrt(np.mean((values[e - length : e] - newest) ** 2)) for e in ends), default=np.inf)


def test_level_never_seen_stands_out():
    """Pins what every detector must find, and that ordinary readings stay far below it."""
    values = day(600)
    values[500] = 4.0
    scores = scores_of(values)
    assert scores[500] == scores.max() > 5.0
    assert np.quantile(scores[100:500], 0.99) < 2.5


def test_pattern_never_seen_stands_out_at_usual_values():
    """Pins the second distance: a period that stands still lies within the sensor's range, and is found."""
    values = day(1000)
    values[800:850] = values[800]
    scores = scores_of(values, memory=600)
    assert scores[800:850].max() > 1.5 * scores[400:800].max()


def test_anomaly_that_comes_again_is_less_of_one():
    """Pins that all is learnt: one state that returns does not call for people every time."""
    values = day(900)
    for start in (400, 600, 800):
        values[start : start + 16] += 4.0
    first, second, third = (scores_of(values, memory=600)[start : start + 16].max() for start in (400, 600, 800))
    assert first > 2 * second > 2 * third


def test_state_that_stays_becomes_usual_unless_nothing_is_learnt():
    """Pins the difference between the two ways: the same lasting step, forgotten or kept."""
    values = day(700)
    values[300:] += 4.0
    assert scores_of(values)[650:].max() < 1.0
    assert scores_of(values, learns=False)[300:].min() > 2.0


def test_one_channel_of_eight_is_enough():
    """Pins that channels are not averaged into silence."""
    values = np.stack([day(600, seed) for seed in range(8)], axis=1)
    values[500:510, 3] = 5.0
    scores = scores_of(values)
    assert scores[500:510].max() == scores.max() > 4.0


@pytest.mark.parametrize("value", [0.0, 45.0, -1e9])
def test_flat_line_is_no_anomaly_and_a_step_of_it_is(value):
    """Pins the least spread: rounding on a constant is not magnified, a real step is seen."""
    values = np.full(300, value)
    assert not scores_of(values).any()
    values[200:] += 0.1 * abs(value) or 1.0
    assert scores_of(values)[200] > 5.0


def test_wild_number_does_not_drown_what_follows():
    """Pins both bounds: after 1e300 scores are finite, and what matters is soon seen again."""
    values = day(1200)
    values[300], values[700] = 1e300, 6.0
    scores = scores_of(values)
    assert np.isfinite(scores).all()
    assert scores[700] > 2.5


def test_impossible_readings_and_settings_are_refused():
    """Pins that a wrong shape, NaN or a senseless bound is an error and never a score."""
    detector = NoveltyDetector(NoveltyConfig(channels=2))
    with pytest.raises(ValueError, match="shape"):
        detector.update(np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        detector.update(np.array([0.0, np.nan]))
    for wrong in ({"channels": 0}, {"channels": 65}, {"warm_up": 10}, {"memory": 10}, {"memory": 10**6}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NoveltyConfig(**wrong)


def test_alarms_are_apart():
    """Pins the dead time: one alarm, silence for so many readings however high they score, then the next."""
    alarms = Alarms(threshold=2.0, dead_time=3)
    assert [alarms.update(score) for score in (1.9, 2.0, 9.0, 9.0, 9.0, 1.0, 2.5)] == [
        *(False, True, False, False, False, False, True)
    ]
    with pytest.raises(ValueError, match="dead_time"):
        Alarms(threshold=2.0, dead_time=-1)
