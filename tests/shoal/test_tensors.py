"""Hostile and odd tensors, readings and identities. Round trips are in test_payloads.py."""

import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PayloadError
from shoal.tensors import DTYPES, check_epoch, check_identity, reading_values, to_array, to_tensor
from shoal.v1.sensor_pb2 import Scalars, SensorData
from shoal.v1.tensor_pb2 import D_TYPE_FLOAT32, D_TYPE_FLOAT64, D_TYPE_INT64, DType, Tensor

pytestmark = pytest.mark.device

_EPOCH = b"e" * 16
_HUGE = 1 << 31


def test_every_element_type_of_the_contract_has_its_dtype():
    """A type added to the schema cannot be forgotten here."""
    assert set(DTYPES) == {code for code in DType.values() if code}
    assert all(dtype.byteorder in "<|=" for dtype in DTYPES.values())


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=12), st.binary(max_size=64), st.sampled_from(list(DTYPES)))
def test_any_shape_is_an_array_or_a_payload_error(shape, data, dtype):
    """Nothing that a peer can write raises anything else, and nothing is guessed."""
    try:
        array = to_array(Tensor(dtype=dtype, shape=shape, data=data))
    except PayloadError:
        return
    assert array.shape == tuple(shape)
    assert array.tobytes() == data


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ([0, _HUGE, _HUGE, _HUGE], "shape"),  # 0 elements, of a size that numpy cannot multiply
        ([(1 << 32) - 1, (1 << 32) - 1, 0], "shape"),
        ([_HUGE, _HUGE, 4], "data"),  # 2 to the 64: 0 where the product overflows
        ([1 << 16, 1 << 16, 1 << 16, 1 << 16], "data"),
    ],
)
def test_shape_whose_product_overflows_is_refused(shape, field):
    """It would explain an empty payload to whoever multiplies in 64 bits."""
    with pytest.raises(PayloadError, match=r"rows\[3\]") as caught:
        to_array(Tensor(dtype=D_TYPE_FLOAT32, shape=shape), "rows[3]")
    assert caught.value.field == f"rows[3].{field}"


def test_as_many_dimensions_as_a_message_holds_are_refused_at_once():
    """Their product would take seconds to compute, and has too many digits to be printed."""
    tensor = Tensor(dtype=D_TYPE_FLOAT32, shape=[(1 << 32) - 1] * 200_000, data=b"1234")
    before = time.process_time()
    with pytest.raises(PayloadError, match="200000 dimensions, at most 8") as caught:
        to_array(tensor)
    assert time.process_time() - before < 1.0
    assert len(str(caught.value)) < 100


def test_eight_dimensions_pass():
    """The limit itself."""
    assert to_array(Tensor(dtype=D_TYPE_FLOAT32, shape=[1] * 8, data=b"1234")).shape == (1,) * 8


def test_empty_and_scalar_tensors_pass():
    """Odd, but their bytes explain them."""
    assert to_array(Tensor(dtype=D_TYPE_FLOAT32, shape=[0, 3])).shape == (0, 3)
    assert to_array(Tensor(dtype=D_TYPE_INT64, data=b"\x07" + bytes(7))).item() == 7


def test_array_from_the_wire_is_a_read_only_view():
    """Nobody changes a message by changing what was read out of it."""
    with pytest.raises(ValueError, match="read-only"):
        to_array(to_tensor(np.ones(2, np.float32)))[0] = 5


@pytest.mark.parametrize("array", [np.arange(6, dtype=">i4").reshape(2, 3), np.arange(6, dtype="<i4").reshape(3, 2).T])
def test_wire_is_little_endian_and_row_major(array):
    """Whatever the order in memory."""
    tensor = to_tensor(array)
    assert tensor.data == struct.pack("<6i", *array.ravel().tolist())
    np.testing.assert_array_equal(to_array(tensor), array)


@pytest.mark.parametrize("dtype", ["bool", "object", "complex64", "f4,i4", "U3"])
def test_dtype_without_a_place_in_the_contract_is_our_own_mistake(dtype):
    """ValueError, never on the wire."""
    with pytest.raises(ValueError, match="cannot travel"):
        to_tensor(np.zeros(2, dtype))


@pytest.mark.parametrize(
    "bits",
    [
        "0000000000 00f87f",  # a quiet NaN
        "0100000000 00f07f",  # a signalling NaN: the cast itself would warn
        "0000000000 00f0ff",  # minus infinity
        struct.pack("<d", 1e300).hex(),  # finite, but not as a float32
        struct.pack("<d", -1e39).hex(),
    ],
)
def test_doubles_that_make_no_finite_float_are_refused(bits):
    """Without a warning, which a service would print at every peer's whim."""
    tensor = Tensor(dtype=D_TYPE_FLOAT64, shape=[1], data=bytes.fromhex(bits))
    with pytest.raises(PayloadError, match=r"r\.tensor: a value is not finite"):
        reading_values(SensorData(tensor=tensor), (1,), "r")


def test_values_take_the_shape_that_the_model_wants():
    """By their number, whatever shape the sender gave them."""
    scalars = SensorData(scalars=Scalars(values=range(6)))
    tensor = SensorData(tensor=to_tensor(np.arange(6, dtype=np.int64)))
    for reading in (scalars, tensor):
        values = reading_values(reading, (2, 3))
        assert values.dtype == np.float32
        assert values.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_identity_is_the_messages_own():
    """Absent or equal; 64 bytes of reference are counted in UTF-8, and SQLite's integers end at 2 to the 63."""
    largest = (1 << 63) - 1
    check_identity("cam", _EPOCH, SensorData(device="cam", epoch=_EPOCH, seq=largest, reference="é" * 32))
    check_identity("cam", _EPOCH, SensorData())
    for reading, field in (
        (SensorData(device="mic"), "r.device"),
        (SensorData(epoch=b"f" * 16), "r.epoch"),
        (SensorData(reference="é" * 33), "r.reference"),
        (SensorData(seq=largest + 1), "r.seq"),
    ):
        with pytest.raises(PayloadError) as caught:
            check_identity("cam", _EPOCH, reading, "r")
        assert caught.value.field == field


def test_refusal_of_an_identity_is_short():
    """It is sent back to whoever wrote a megabyte into the field."""
    with pytest.raises(PayloadError) as caught:
        check_identity("cam", _EPOCH, SensorData(device="\x01" * 1_000_000))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("size", [0, 15, 17])
def test_epoch_has_128_bits(size):
    """A shorter one could collide, a longer one costs the fleet's memory."""
    check_epoch(_EPOCH)
    with pytest.raises(PayloadError, match=f"{size} bytes, expected 16"):
        check_epoch(bytes(size))
