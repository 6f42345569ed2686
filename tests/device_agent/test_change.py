import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import change
from device_agent.change import DeadBand, DeadBandSettings, Ewma, EwmaSettings, Rate, RateSettings, make_change

pytestmark = pytest.mark.device

# Multiples of a power of two, so that sums and differences are exact in float32.
STEPS = st.integers(-64, 64).map(lambda step: step / 8)


def f32(*values):
    return np.array(values, dtype=np.float32)


EVERY_KIND = [
    pytest.param(DeadBand, id="dead band"),
    pytest.param(lambda threshold: DeadBand(threshold, adapt=0.5), id="adaptive dead band"),
    pytest.param(Ewma, id="ewma"),
    pytest.param(Rate, id="rate"),
    pytest.param(lambda threshold: Rate(threshold, per_second=False), id="rate per reading"),
]


def test_documented_line_works():
    """Pins what an application can write without an agent."""
    assert doctest.testmod(change).failed == 0


@pytest.mark.parametrize("make", EVERY_KIND)
def test_first_reading_counts_as_changed(make):
    """Pins that a device says something before it falls silent, however wide its band."""
    assert make(1e9).should_upload(f32(0.0), 0.0)


@pytest.mark.parametrize("make", EVERY_KIND)
def test_equal_readings_are_unchanged(make):
    """Pins that a sensor at rest costs nothing, even at a threshold of 0."""
    detector = make(0.0)
    assert [detector.should_upload(f32(0.1, 7.0), float(now)) for now in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("make", EVERY_KIND)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_broken_reading_is_never_silent(make, broken):
    """Pins that each reading that is not finite counts as changed, and that the good ones after it settle again."""
    detector = make(1e9)
    detector.should_upload(f32(7.0, 0.0), 0.0)
    assert [detector.should_upload(f32(7.0, broken), now) for now in (1.0, 2.0, 3.0)] == [True] * 3
    detector.should_upload(f32(7.0, 0.0), 4.0)
    assert [detector.should_upload(f32(7.0, 0.0), now) for now in (5.0, 6.0)] == [False] * 2


@pytest.mark.parametrize("make", EVERY_KIND)
@pytest.mark.parametrize("shape", [(2,), (4, 1), (1,), ()])
def test_new_shape_counts_as_changed(make, shape):
    """Pins that a new firmware with other channels is compared with nothing, not even by broadcasting."""
    detector = make(1e9)
    detector.should_upload(np.zeros((4,), np.float32), 0.0)
    assert detector.should_upload(np.zeros(shape, np.float32), 1.0)
    assert not detector.should_upload(np.zeros(shape, np.float32), 2.0)


@pytest.mark.parametrize("make", EVERY_KIND)
def test_memory_is_not_the_buffer_of_the_source(make):
    """Pins that a source which reads into one array again and again is not compared with itself."""
    detector = make(0.5)
    buffer = np.zeros(1, np.float64)
    detector.should_upload(buffer, 0.0)
    buffer[0] = 5.0
    assert detector.should_upload(buffer, 1.0)


@pytest.mark.parametrize("size", [2, 40])
@pytest.mark.parametrize("make", [DeadBand, lambda threshold: Rate(threshold, per_second=False)])
def test_each_channel_has_its_own_threshold(make, size):
    """Pins thresholds by place in the last axis, in windows too, for few values and for many."""
    detector = make([1.0] * (size - 1) + [10.0])
    window = np.zeros((3, size), np.float32)
    detector.should_upload(window)
    for channel, value, expected in ((0, 1.25, True), (size - 1, 9.75, False), (size - 1, 11.0, True)):
        detector.should_upload(window * 0)
        window[1, channel] = value
        assert detector.should_upload(window) is expected
        window[1, channel] = 0.0


@pytest.mark.parametrize("make", [DeadBand, Ewma, lambda threshold: Rate(threshold, per_second=False)])
def test_thresholds_that_fit_no_channel_are_not_silence(make):
    """Pins that a sensor with other channels than the settings know is looked at, not muted by accident."""
    detector = make([1e9, 1e9, 1e9])
    assert [detector.should_upload(f32(1.0, 2.0)) for _ in range(3)] == [True] * 3


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=20), st.floats(0, 1e6, width=32))
def test_few_values_and_many_are_compared_alike(values, threshold):
    """Pins that the loop for small readings and the array code for large ones agree."""
    few, many = DeadBand(threshold), DeadBand(threshold)
    for value in values:
        assert few.should_upload(f32(value)) is many.should_upload(np.full(50, value, np.float32))


def test_unsigned_pictures_do_not_wrap_round():
    """Pins that a pixel one darker is a difference of 1, not of 255."""
    detector = DeadBand(threshold=2.0)
    detector.should_upload(np.full((8, 8), 9, np.uint8))
    assert not detector.should_upload(np.full((8, 8), 8, np.uint8))


@given(values=st.lists(STEPS, min_size=1, max_size=40), threshold=st.integers(0, 16).map(lambda step: step / 8))
def test_fixed_baseline_is_the_last_change(values, threshold):
    """Pins the dead band: unchanged up to and with the threshold, measured from the last reading that changed."""
    detector = DeadBand(threshold)
    baseline = None
    for value in values:
        expected = baseline is None or abs(value - baseline) > threshold
        baseline = value if expected else baseline
        assert detector.should_upload(f32(value)) is expected


def test_one_value_outside_the_band_is_enough():
    """Pins that channels do not average out."""
    detector = DeadBand(threshold=1.0)
    detector.should_upload(f32(0.0, 0.0, 0.0))
    assert not detector.should_upload(f32(1.0, -1.0, 0.5))
    assert detector.should_upload(f32(0.0, -1.25, 0.0))


def test_fixed_baseline_cannot_be_crept_away_from():
    """Pins that a slow drift is reported as soon as it adds up to the threshold."""
    detector = DeadBand(threshold=1.0)
    changed = [detector.should_upload(f32(step * 0.25)) for step in range(11)]
    assert [step for step, is_changed in enumerate(changed) if is_changed] == [0, 5, 10]


def test_adaptive_baseline_follows_slow_drift_and_reports_a_jump():
    """Pins `adapt`: the baseline moves by that share of the way with each unchanged reading."""
    detector = DeadBand(threshold=1.0, adapt=0.5)
    assert [detector.should_upload(f32(step * 0.25)) for step in range(200)] == [True] + [False] * 199
    assert detector.should_upload(f32(199 * 0.25 + 1.25))


@pytest.mark.parametrize(("value", "is_changed"), [(1.25, False), (1.375, True), (-0.75, False), (-0.875, True)])
def test_adaptive_baseline_moves_by_exactly_its_share(value, is_changed):
    """Pins the arithmetic: from 0, a reading of 1 at a share of a quarter makes 0.25 the baseline."""
    detector = DeadBand(threshold=1.0, adapt=0.25)
    detector.should_upload(f32(0.0))
    assert not detector.should_upload(f32(1.0))
    assert detector.should_upload(f32(value)) is is_changed


@given(values=st.lists(st.just(float("nan")) | STEPS, min_size=1, max_size=20), adapt=st.sampled_from([0.0, 0.5]))
def test_nan_always_counts_as_changed(values, adapt):
    """Pins that a broken sensor is never silent, and that the first good reading after it is no silence either."""
    detector = DeadBand(threshold=1e9, adapt=adapt)
    before = float("nan")
    for value in values:
        expected = bool(np.isnan(value) or np.isnan(before))
        assert detector.should_upload(f32(7.0, value)) is expected
        before = value


@pytest.mark.parametrize("extreme", [float("inf"), float("-inf")])
def test_infinite_reading_counts_as_changed(extreme):
    """Pins that infinity is no quiet baseline: infinity less infinity is no number, and no warning either."""
    detector = DeadBand(threshold=1e9)
    assert [detector.should_upload(f32(value)) for value in (0.0, extreme, extreme, 0.0)] == [True] * 4


def test_band_holds_at_the_ends_of_float32():
    """Pins that a difference beyond float32 is a change and no warning."""
    detector = DeadBand(threshold=1.0)
    detector.should_upload(f32(3e38))
    assert detector.should_upload(f32(-3e38))


# -- mean and deviation ----------------------------------------------------------------------------------------------


def settled(rng, *, count=400, **settings):
    """An Ewma that has seen a channel of deviation 1 and one of deviation 100, both around 5."""
    detector = Ewma(**settings)
    changed = [detector.should_upload(rng.normal(5.0, [1.0, 100.0])) for _ in range(count)]
    return detector, changed


def test_ewma_measures_each_channel_by_its_own_deviation():
    """Pins that 10 is a step for the quiet channel and nothing for the noisy one."""
    rng = np.random.default_rng(1)
    assert settled(rng, threshold=6.0)[0].should_upload([15.0, 5.0])
    assert not settled(rng, threshold=6.0)[0].should_upload([5.0, 15.0])


@pytest.mark.parametrize(("threshold", "share"), [(1.0, 0.317), (2.0, 0.0455)])
def test_ewma_reports_what_the_normal_distribution_says(threshold, share):
    """Pins the arithmetic: noise leaves k deviations as often as it should, from early on."""
    detector = Ewma(threshold, adapt=0.01)
    rng = np.random.default_rng(2)
    changed = [detector.should_upload(value) for value in rng.normal(-3.0, 0.01, 20_000)]
    assert np.mean(changed[20:]) == pytest.approx(share, rel=0.1)
    assert np.mean(changed[5:60]) < 3 * share


def test_ewma_gets_used_to_a_step():
    """Pins the length of the news: a step is reported at once, and no more once it is the rule."""
    detector, _ = settled(np.random.default_rng(3), threshold=4.0)
    stepped = [detector.should_upload([40.0, 5.0]) for _ in range(100)]
    assert stepped[0]
    assert not any(stepped[60:])


def test_ewma_learns_nothing_from_a_broken_reading():
    """Pins that one glitch neither hides the next step nor spoils the mean."""
    detector, _ = settled(np.random.default_rng(4), threshold=6.0)
    assert detector.should_upload([float("inf"), 5.0])
    assert not detector.should_upload([5.0, 5.0])
    assert detector.should_upload([15.0, 5.0])


# -- rate of change ----------------------------------------------------------------------------------------------------


@given(steps=st.lists(st.tuples(STEPS, st.sampled_from([0.0, 0.5, 4.0])), max_size=30), threshold=STEPS.map(abs))
def test_rate_is_the_difference_to_the_reading_before_over_its_time(steps, threshold):
    """Pins units per second, compared with the last reading whether it was reported or not."""
    detector = Rate(threshold)
    now, before = 50.0, 0.0
    detector.should_upload(f32(before), now)
    for value, gap in steps:
        now += gap
        assert detector.should_upload(f32(value), now) is (abs(value - before) > threshold * gap)
        before = value


def test_rate_per_reading_needs_no_clock():
    """Pins that time plays no part where the threshold is per reading."""
    detector = Rate(1.0, per_second=False)
    assert [detector.should_upload(value) for value in (0.0, 1.0, 2.5, 3.5)] == [True, False, True, False]


def test_rate_per_second_wants_the_time():
    """Pins that a forgotten clock is an error, and not a rate over no time."""
    with pytest.raises(ValueError, match="time of each reading"):
        Rate(1.0).should_upload(1.0)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "readings", "expected"),
    [
        (DeadBandSettings(), (0.0, 0.0, 0.1), [True, False, True]),
        (DeadBandSettings(threshold=1.0), (0.0, 0.75, 1.5), [True, False, True]),
        (DeadBandSettings(threshold=1.0, adapt=1.0), (0.0, 0.75, 1.5), [True, False, False]),
        (DeadBandSettings(threshold=(1.0,)), (0.0, 0.75, 1.5), [True, False, True]),
        (EwmaSettings(threshold=1.0, adapt=1.0), (0.0, 0.75, 1.5), [True, True, True]),
        (EwmaSettings(threshold=2.0, adapt=0.5), (0.0, 1.0, 0.5, 9.0), [True, True, False, True]),
        (RateSettings(threshold=1.0), (0.0, 1.5, 3.0), [True, False, False]),
        (RateSettings(threshold=1.0, per="reading"), (0.0, 1.5, 2.0), [True, True, False]),
    ],
)
def test_settings_make_their_detector(settings, readings, expected):
    """Pins that each setting reaches its detector; readings are two seconds apart."""
    detector = make_change(settings)
    assert [detector.should_upload([value], 2.0 * index) for index, value in enumerate(readings)] == expected


@pytest.mark.parametrize("make", [DeadBand, Ewma, Rate])
@pytest.mark.parametrize("threshold", [-0.1, float("nan"), [1.0, -1.0], [], [[1.0]]])
def test_threshold_that_cannot_be_is_refused(make, threshold):
    """Pins that a band that cannot be is a mistake of the caller's."""
    with pytest.raises(ValueError, match=r"threshold .* must not be negative"):
        make(threshold)


@pytest.mark.parametrize(("make", "adapt"), [(DeadBand, -0.1), (DeadBand, 1.1), (Ewma, 0.0), (Ewma, float("nan"))])
def test_adapt_out_of_range_is_refused(make, adapt):
    """Pins that a weight is a share."""
    with pytest.raises(ValueError, match=f"adapt {adapt} must"):
        make(1.0, adapt)
