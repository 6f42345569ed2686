import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import KNeighborsClassifier

from simulator.drift import MAX_PIXEL, Drift, add_noise, blur, expose, rotate

IMAGES = arrays(np.float32, (8, 8, 1), elements=st.floats(0, MAX_PIXEL, width=32))
DRIFTS = st.builds(
    Drift,
    strength=st.floats(0, 1),
    rotation_degrees=st.floats(-360, 360),
    blur_sigma_pixels=st.floats(0, 3),
    exposure_gain=st.floats(0, 4),
    exposure_offset=st.floats(-16, 16),
    noise_std=st.floats(0, 5),
)


@given(image=IMAGES, drift=DRIFTS, seed=st.integers(0, 2**32))
def test_drifted_image_is_an_image(image, drift, seed):
    """Pins shape, type and pixel range under any drift, and that the original stays."""
    before = image.copy()
    drifted = drift.apply(image, np.random.default_rng(seed))
    assert drifted.shape == (8, 8, 1)
    assert drifted.dtype == np.float32
    assert drifted.min() >= 0
    assert drifted.max() <= MAX_PIXEL
    np.testing.assert_array_equal(image, before)


@given(image=IMAGES, seed=st.integers(0, 2**32))
def test_no_strength_changes_nothing(image, seed):
    """Pins that strength 0 is the clean camera to the bit."""
    np.testing.assert_array_equal(Drift(strength=0).apply(image, np.random.default_rng(seed)), image)


@given(image=IMAGES, drift=DRIFTS, seed=st.integers(0, 2**32))
def test_same_seed_drifts_alike(image, drift, seed):
    """Pins that all randomness is the generator's."""
    first, second = (drift.apply(image, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_two_readings_of_one_image_differ(digits_data):
    """Pins the jitter: a fleet that sees bit-identical images would measure the gateway's cache."""
    rng = np.random.default_rng(3)
    first, second = (Drift(noise_std=0).apply(digits_data.values[0], rng) for _ in range(2))
    assert 0 < np.abs(first - second).max() < 8


@given(image=IMAGES)
def test_quarter_turn_is_exact(image):
    """Pins direction and centre of the rotation."""
    np.testing.assert_allclose(rotate(image, 90), np.rot90(image, axes=(0, 1)), atol=1e-4)


@given(image=IMAGES)
def test_blur_keeps_the_light_and_lowers_the_peak(image):
    """Pins that blur moves light about and makes none."""
    blurred = blur(image, 0.7)
    assert blurred.sum() == pytest.approx(image.sum(), rel=1e-3, abs=1e-3)
    assert blurred.max() <= image.max() + 1e-4


@pytest.mark.parametrize(("pixel", "expected"), [(0.0, 2.0), (8.0, 6.0), (16.0, 10.0)])
def test_exposure_is_gain_then_offset(pixel, expected):
    """Pins the order and the units."""
    assert expose(np.full((8, 8, 1), pixel, np.float32), 0.5, 2.0)[0, 0, 0] == expected


def test_exposure_clips_at_both_ends():
    """Pins that an overexposed sensor saturates."""
    image = np.full((8, 8, 1), 10, np.float32)
    assert expose(image, 4, 0).max() == MAX_PIXEL
    assert expose(image, 1, -12).min() == 0


def test_noise_has_the_stated_width():
    """Pins that `std` is in pixel units."""
    grey = np.full((8, 8, 1), 8, np.float32)
    rng = np.random.default_rng(0)
    pixels = np.concatenate([add_noise(grey, 0.5, rng).ravel() for _ in range(200)])
    assert pixels.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_outside_its_range_is_refused(strength):
    """Pins that extrapolating a drift is a mistake, not a feature."""
    with pytest.raises(ValueError, match="strength"):
        Drift(strength=strength)


def test_default_drift_hurts_what_was_learnt_clean_and_can_be_learnt(digits_data):
    """Pins that the demo has something to lose and something to win back, with the simplest classifier there is."""
    rng = np.random.default_rng(5)
    initial = np.setdiff1d(np.arange(1797), digits_data.stream)
    is_held = digits_data.held_out[digits_data.stream]
    labelled, held = digits_data.stream[~is_held][:400], digits_data.stream[is_held]

    def drifted(rows):
        return np.stack([Drift().apply(digits_data.values[row], rng) for row in rows])

    def accuracy(train_x, train_y, test_x):
        classifier = KNeighborsClassifier(1).fit(train_x.reshape(-1, 64), train_y)
        return classifier.score(test_x.reshape(-1, 64), digits_data.labels[held])

    clean_x, clean_y = digits_data.values[initial], digits_data.labels[initial]
    drifted_x = drifted(held)
    before = accuracy(clean_x, clean_y, digits_data.values[held])
    after = accuracy(clean_x, clean_y, drifted_x)
    again = accuracy(drifted(labelled), digits_data.labels[labelled], drifted_x)
    assert before > 0.95
    assert 0.4 < after < 0.8
    assert again > 0.9
