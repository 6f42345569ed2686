"""Codec, tensors and scoring against hostile and odd inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.codec import MAX_PAYLOAD_BYTES, MAX_ROWS, decode, encode, schema_of
from shoal.errors import ModelError, PayloadError
from shoal.scoring import scale, score_rows
from shoal.tensors import DTYPES, check_epoch, check_identity, reading_values, to_array, to_tensor
from shoal.v1 import release_pb2
from shoal.v1.inference_pb2 import InferenceRequest, InferenceRow
from shoal.v1.sensor_pb2 import EncodedImage, Scalars, SensorData
from shoal.v1.tensor_pb2 import D_TYPE_FLOAT32, D_TYPE_FLOAT64, Tensor

pytestmark = pytest.mark.device

_ARRAYS = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(max_dims=4, max_side=5), elements={"allow_nan": False} if dtype.kind == "f" else None
    )
)


@given(_ARRAYS)
def test_arrays_survive_the_wire(array):
    """Every dtype of the contract, bit for bit."""
    back = to_array(Tensor.FromString(to_tensor(array).SerializeToString()))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(dtype=D_TYPE_FLOAT32, shape=[1 << 31, 1 << 31, 4], data=b""),  # the product overflows 64 bits to 0
        Tensor(dtype=D_TYPE_FLOAT32, shape=[2], data=b"1234"),
        Tensor(dtype=D_TYPE_FLOAT32, shape=[1] * 9, data=b"1234"),
        Tensor(dtype=99, shape=[1], data=b"1"),
        Tensor(shape=[1], data=b"1"),
    ],
)
def test_shapes_that_do_not_explain_their_bytes_are_refused(tensor):
    """Before anything is allocated."""
    with pytest.raises(PayloadError, match="tensor"):
        to_array(tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    """Range checks would let NaN pass."""
    with pytest.raises(PayloadError, match="finite"):
        reading_values(SensorData(scalars=Scalars(values=[1.0, value])), (2,))


def test_double_too_large_for_a_float_is_refused():
    """It would become infinite."""
    huge = to_tensor(np.array([1e300]))
    assert huge.dtype == D_TYPE_FLOAT64
    with pytest.raises(PayloadError, match="finite"):
        reading_values(SensorData(tensor=huge), (1,))


@pytest.mark.parametrize(
    ("reading", "field"),
    [
        (SensorData(), "no value"),
        (SensorData(image=EncodedImage(data=b"x")), "image"),
        (SensorData(scalars=Scalars(values=[1.0])), "1 values"),
    ],
)
def test_reading_of_another_kind_is_refused_by_name(reading, field):
    """The error says what came and what was expected."""
    with pytest.raises(PayloadError, match=field):
        reading_values(reading, (2,))


def test_size_is_checked_before_parsing():
    """Bytes over the limit are not even looked at."""
    with pytest.raises(PayloadError, match="at most"):
        decode(InferenceRequest, b"\xff" * (MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(ValueError, match="at most"):
        encode(InferenceRequest(device="x" * (MAX_PAYLOAD_BYTES + 1)))


def test_rows_are_counted_after_parsing():
    """1 MiB can hold half a million empty rows."""
    with pytest.raises(PayloadError, match="rows"):
        decode(InferenceRequest, InferenceRequest(rows=[InferenceRow()] * (MAX_ROWS + 1)).SerializeToString())
    assert (
        len(decode(InferenceRequest, InferenceRequest(rows=[InferenceRow()] * MAX_ROWS).SerializeToString()).rows)
        == MAX_ROWS
    )


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_payload_error(data):
    """No other exception comes out of the codec."""
    try:
        message = decode(InferenceRequest, data)
    except PayloadError:
        return
    assert schema_of(message) == "shoal.v1.InferenceRequest"


def test_identity_belongs_to_the_message():
    """A row cannot speak for another device or epoch, nor carry a long reference."""
    check_identity("cam", b"e" * 16, SensorData(device="cam", epoch=b"e" * 16, reference="r" * 64))
    for reading, field in (
        (SensorData(device="other"), r"\.device"),
        (SensorData(epoch=b"f" * 16), r"\.epoch"),
        (SensorData(reference="r" * 65), r"\.reference"),
    ):
        with pytest.raises(PayloadError, match=field):
            check_identity("cam", b"e" * 16, reading)
    with pytest.raises(PayloadError, match="epoch"):
        check_epoch(b"short")


def test_scores_are_what_the_release_says():
    """Worked by hand: mean square of the difference, and one minus the softmax's largest."""
    scaled = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
    errors = score_rows(release_pb2.SCORE_KIND_RECONSTRUCTION, scaled, np.array([[1.0, 4.0], [1.0, 1.0]], np.float32))
    np.testing.assert_allclose(errors.scores, [2.0, 1.0])
    assert errors.labels is None
    doubts = score_rows(
        release_pb2.SCORE_KIND_UNCERTAINTY, scaled, np.array([[0.0, np.log(3.0)], [5.0, 5.0]], np.float32)
    )
    np.testing.assert_allclose(doubts.scores, [0.25, 0.5], rtol=1e-6)
    assert doubts.labels is not None
    assert doubts.labels.tolist() == [1, 0]


def test_scaling_uses_the_releases_statistics_and_its_channels():
    """An old model on a new firmware is an error, not a broadcast."""
    schema = release_pb2.InputSchema(shape=[2], mean=[1.0, 2.0], std=[2.0, 4.0])
    np.testing.assert_allclose(scale(np.array([[3.0, 6.0]], np.float32), schema), [[1.0, 1.0]])
    with pytest.raises(ModelError, match="channels"):
        scale(np.zeros((1, 3), np.float32), schema)


def test_output_that_is_not_finite_is_the_models_fault():
    """It never becomes a score."""
    with pytest.raises(ModelError, match="finite"):
        score_rows(
            release_pb2.SCORE_KIND_UNCERTAINTY, np.zeros((1, 2), np.float32), np.array([[np.nan, 1.0]], np.float32)
        )
    with pytest.raises(ModelError, match="unknown score kind"):
        score_rows(0, np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))
