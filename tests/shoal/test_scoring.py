"""From a model's output to a score: what is refused, and what is absurd but answered. More in test_payloads.py."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import ModelError
from shoal.scoring import scale, score_rows
from shoal.v1.release_pb2 import SCORE_KIND_RECONSTRUCTION, SCORE_KIND_UNCERTAINTY, InputSchema

pytestmark = pytest.mark.device

_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=_FLOATS)


def floats(*values):
    return np.array(values, np.float32)


@given(_ROWS)
@example(floats([3e38, -3e38]))
def test_uncertainty_is_a_share_and_names_the_largest(logits):
    """For every finite output, without a warning."""
    result = score_rows(SCORE_KIND_UNCERTAINTY, logits, logits)
    assert result.scores.dtype == np.float32
    assert ((result.scores >= 0) & (result.scores < 1)).all()
    assert result.labels.tolist() == logits.argmax(axis=1).tolist()


@given(_ROWS)
def test_reconstruction_is_zero_for_what_came_back_unchanged(rows):
    """And does not depend on how the model shapes its output."""
    result = score_rows(SCORE_KIND_RECONSTRUCTION, rows, rows.reshape(-1))
    assert result.scores.tolist() == [0.0] * len(rows)
    assert result.labels is None


def test_reconstruction_averages_over_time_and_channels_of_a_row():
    """One score a row, whatever its rank; other rows do not matter."""
    scaled = np.zeros((2, 2, 2), np.float32)
    outputs = np.stack([np.full((2, 2), 2.0, np.float32), floats([4, 0], [0, 0])])
    assert score_rows(SCORE_KIND_RECONSTRUCTION, scaled, outputs).scores.tolist() == [4.0, 4.0]


def test_absurd_reading_scores_infinite():
    """A finite reading is answered, as far from normal as can be, without a warning."""
    far = scale(floats([3e38]), InputSchema(mean=[0.0], std=[0.1]))
    assert far.tolist() == [[float("inf")]]
    assert score_rows(SCORE_KIND_RECONSTRUCTION, floats([1e30]), floats([0.0])).scores.tolist() == [float("inf")]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [SCORE_KIND_RECONSTRUCTION, SCORE_KIND_UNCERTAINTY])
def test_output_that_is_not_finite_is_refused(kind, value):
    """It would compare false with every threshold."""
    with pytest.raises(ModelError, match="not finite"):
        score_rows(kind, floats([1.0, 2.0]), floats([0.0, value]))


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (SCORE_KIND_RECONSTRUCTION, floats([1, 2, 3])),
        (SCORE_KIND_RECONSTRUCTION, floats([1])),
        (SCORE_KIND_UNCERTAINTY, np.zeros((2, 0), np.float32)),
        (SCORE_KIND_UNCERTAINTY, floats([1, 2, 3])),
    ],
)
def test_output_of_another_size_is_the_models_fault(kind, outputs):
    """A release with the wrong kind of score is refused, and ends no process."""
    with pytest.raises(ModelError, match="came out, expected"):
        score_rows(kind, floats([1, 2], [3, 4]), outputs)


@pytest.mark.parametrize(
    ("mean", "std"), [([], []), ([0.0], []), ([0.0], [1.0, 1.0]), ([0.0] * 3, [1.0] * 3), ([0.0, 0.0], [1.0])]
)
def test_statistics_of_other_channels_are_refused(mean, std):
    """One for each channel or one for all; never broadcast by chance."""
    with pytest.raises(ModelError, match=r"2 channels|means and"):
        scale(floats([1, 2]), InputSchema(mean=mean, std=std))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_deviation_that_is_not_positive_is_refused(std):
    """Division by it would say nothing about the reading."""
    with pytest.raises(ModelError, match="not positive"):
        scale(floats([1, 2]), InputSchema(mean=[0.0, 0.0], std=[1.0, std]))


def test_one_statistic_serves_all_channels():
    """Images have one for all pixels."""
    assert scale(floats([3, 5]), InputSchema(mean=[1.0], std=[2.0])).tolist() == [[1.0, 2.0]]
