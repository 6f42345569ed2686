import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.change import ChangeDetector

pytestmark = pytest.mark.device

# Multiples of a power of two, so that sums and differences are exact in float32.
STEPS = st.integers(-64, 64).map(lambda step: step / 8)


def f32(*values):
    return np.array(values, dtype=np.float32)


def test_first_reading_counts_as_changed():
    """Pins that a device says something before it falls silent, however wide its band."""
    assert ChangeDetector(threshold=1e9).update(f32(0.0))


@given(values=st.lists(STEPS, min_size=1, max_size=40), threshold=st.integers(0, 16).map(lambda step: step / 8))
def test_fixed_baseline_is_the_last_change(values, threshold):
    """Pins the dead band: unchanged up to and with the threshold, measured from the last reading that changed."""
    detector = ChangeDetector(threshold)
    baseline = None
    for value in values:
        expected = baseline is None or abs(value - baseline) > threshold
        baseline = value if expected else baseline
        assert detector.update(f32(value)) is expected


def test_one_value_outside_the_band_is_enough():
    """Pins that channels do not average out."""
    detector = ChangeDetector(threshold=1.0)
    detector.update(f32(0.0, 0.0, 0.0))
    assert not detector.update(f32(1.0, -1.0, 0.5))
    assert detector.update(f32(0.0, -1.25, 0.0))


def test_fixed_baseline_cannot_be_crept_away_from():
    """Pins that a slow drift is reported as soon as it adds up to the threshold."""
    detector = ChangeDetector(threshold=1.0)
    changed = [detector.update(f32(step * 0.25)) for step in range(11)]
    assert [step for step, is_changed in enumerate(changed) if is_changed] == [0, 5, 10]


def test_adaptive_baseline_follows_slow_drift_and_reports_a_jump():
    """Pins `adapt`: the baseline moves by that share of the way with each unchanged reading."""
    detector = ChangeDetector(threshold=1.0, adapt=0.5)
    assert [detector.update(f32(step * 0.25)) for step in range(200)] == [True] + [False] * 199
    assert detector.update(f32(199 * 0.25 + 1.25))


@pytest.mark.parametrize(("value", "is_changed"), [(1.25, False), (1.375, True), (-0.75, False), (-0.875, True)])
def test_adaptive_baseline_moves_by_exactly_its_share(value, is_changed):
    """Pins the arithmetic: from 0, a reading of 1 at a share of a quarter makes 0.25 the baseline."""
    detector = ChangeDetector(threshold=1.0, adapt=0.25)
    detector.update(f32(0.0))
    assert not detector.update(f32(1.0))
    assert detector.update(f32(value)) is is_changed


@given(values=st.lists(st.just(float("nan")) | STEPS, min_size=1, max_size=20), adapt=st.sampled_from([0.0, 0.5]))
def test_nan_always_counts_as_changed(values, adapt):
    """Pins that a broken sensor is never silent, and that the first good reading after it is no silence either."""
    detector = ChangeDetector(threshold=1e9, adapt=adapt)
    before = float("nan")
    for value in values:
        expected = bool(np.isnan(value) or np.isnan(before))
        assert detector.update(f32(7.0, value)) is expected
        before = value


@pytest.mark.parametrize("extreme", [float("inf"), float("-inf")])
def test_infinite_reading_counts_as_changed(extreme):
    """Pins that infinity is no quiet baseline: infinity less infinity is no number, and no warning either."""
    detector = ChangeDetector(threshold=1e9)
    assert [detector.update(f32(value)) for value in (0.0, extreme, extreme, 0.0)] == [True] * 4


def test_band_holds_at_the_ends_of_float32():
    """Pins that a difference beyond float32 is a change and no warning."""
    detector = ChangeDetector(threshold=1.0)
    detector.update(f32(3e38))
    assert detector.update(f32(-3e38))


@pytest.mark.parametrize("shape", [(2,), (4, 1), (1,), ()])
def test_new_shape_counts_as_changed(shape):
    """Pins that a new firmware with other channels is compared with nothing, not even by broadcasting."""
    detector = ChangeDetector(threshold=1e9)
    detector.update(np.zeros((4,), np.float32))
    assert detector.update(np.zeros(shape, np.float32))
    assert not detector.update(np.zeros(shape, np.float32))


def test_baseline_is_not_the_buffer_of_the_source():
    """Pins that a source which reads into one array again and again is not compared with itself."""
    detector = ChangeDetector(threshold=0.5)
    buffer = f32(1.0)
    detector.update(buffer)
    buffer[0] = 5.0
    assert detector.update(buffer)


@pytest.mark.parametrize(("threshold", "adapt"), [(-0.1, 0.0), (float("nan"), 0.0), (0.0, -0.1), (0.0, 1.1)])
def test_settings_out_of_range_are_refused(threshold, adapt):
    """Pins that a band that cannot be is a mistake of the caller's."""
    with pytest.raises(ValueError, match=f"threshold {threshold} .* adapt {adapt} "):
        ChangeDetector(threshold, adapt)
