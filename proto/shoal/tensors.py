"""Between arrays and the wire. Shapes are checked before anything is allocated."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.codec import EPOCH_BYTES, MAX_REFERENCE_BYTES
from shoal.errors import PayloadError
from shoal.v1 import tensor_pb2 as pb
from shoal.v1.sensor_pb2 import SensorData

DTYPES: Mapping[pb.DType, np.dtype[Any]] = MappingProxyType(
    {
        pb.D_TYPE_FLOAT32: np.dtype("<f4"),
        pb.D_TYPE_INT8: np.dtype("i1"),
        pb.D_TYPE_UINT8: np.dtype("u1"),
        pb.D_TYPE_INT16: np.dtype("<i2"),
        pb.D_TYPE_INT32: np.dtype("<i4"),
        pb.D_TYPE_INT64: np.dtype("<i8"),
        pb.D_TYPE_FLOAT64: np.dtype("<f8"),
    }
)
_FLOAT32 = DTYPES[pb.D_TYPE_FLOAT32]
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_DIMENSIONS = 8
# The wire has 64 bits; SQLite, which every store is, has 63 and a sign.
_MAX_SEQ = (1 << 63) - 1


def to_tensor(array: NDArray[Any]) -> pb.Tensor:
    """Pack an array.

    Raises:
        ValueError: its dtype has no place in the contract.
    """
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _CODES:
        raise ValueError(f"dtype {array.dtype} cannot travel; one of {[str(d) for d in _CODES]}")
    return pb.Tensor(dtype=_CODES[dtype], shape=array.shape, data=array.astype(dtype, copy=False).tobytes())


def to_array(tensor: pb.Tensor, field: str = "tensor") -> NDArray[Any]:
    """Unpack a tensor as a read-only view of its bytes.

    Raises:
        PayloadError: unknown dtype, or the shape does not explain the bytes.
    """
    dtype = _dtype_of(tensor)
    if dtype is None:
        raise _error_in(tensor, field)
    shape = tuple(tensor.shape)
    try:
        return np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except ValueError as exc:  # beside a 0, dimensions that numpy cannot multiply
        raise PayloadError(f"{list(shape)} is too large", field=f"{field}.shape") from exc


def _dtype_of(tensor: pb.Tensor) -> np.dtype[Any] | None:
    """Its element type, once the bytes agree with the shape; None where something is wrong."""
    dtype = DTYPES.get(tensor.dtype)
    shape = tensor.shape
    # The number of dimensions first: the product of all that a message can hold takes seconds. And math.prod, because
    # numpy's overflows to 0 on a hostile shape.
    if dtype is None or len(shape) > _MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != len(tensor.data):
        return None
    return dtype


def _error_in(tensor: pb.Tensor, field: str) -> PayloadError:
    """What is wrong with a tensor that has no `_dtype_of`."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        return PayloadError(f"unknown element type {tensor.dtype}", field=f"{field}.dtype")
    if len(tensor.shape) > _MAX_DIMENSIONS:
        return PayloadError(f"{len(tensor.shape)} dimensions, at most {_MAX_DIMENSIONS}", field=f"{field}.shape")
    expected = math.prod(tensor.shape) * dtype.itemsize
    message = f"{list(tensor.shape)} of {dtype} needs {expected} bytes, got {len(tensor.data)}"
    return PayloadError(message, field=f"{field}.data")


def raw_reading(reading: SensorData, count: int, field: str = "reading") -> tuple[np.dtype[Any], bytes]:
    """Return a reading's element type and its `count` values as they came; whether they are finite is not looked at.

    Raises:
        PayloadError: no value, unknown dtype, or the shape does not explain the bytes or the count.
    """
    kind = reading.WhichOneof("value")
    if kind == "tensor":
        dtype = _dtype_of(reading.tensor)
        if dtype is None:
            raise _error_in(reading.tensor, f"{field}.tensor")
        data = reading.tensor.data
    elif kind == "scalars":
        dtype = _FLOAT32
        data = np.array(reading.scalars.values, dtype=dtype).tobytes()
    else:
        raise PayloadError(f"carries {kind or 'no value'}, expected scalars or tensor", field=field)
    if len(data) != count * dtype.itemsize:
        raise PayloadError(f"{len(data) // dtype.itemsize} values, expected {count}", field=f"{field}.{kind}")
    return dtype, data


def reading_values(reading: SensorData, shape: Sequence[int], field: str = "reading") -> NDArray[np.float32]:
    """Return a reading's values in its own units, shaped as a model wants them.

    Raises:
        PayloadError: no value, wrong number of values, or a value that is not finite.
    """
    dtype, data = raw_reading(reading, math.prod(shape), field)
    values = as_float32(np.frombuffer(data, dtype)).reshape(tuple(shape))
    if not np.isfinite(values).all():
        raise PayloadError("a value is not finite", field=f"{field}.{reading.WhichOneof('value')}")
    return values


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """What models compute with: a double too large becomes infinite, a signalling NaN a quiet one."""
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def check_identity(device: str, epoch: bytes, reading: SensorData, field: str = "reading") -> None:
    """Refuse a reading that names another owner than its message, or whose number or reference cannot be stored.

    Raises:
        PayloadError: naming the field.
    """
    if reading.device not in ("", device):
        raise PayloadError(f"{reading.device!r} inside a message of {device!r}", field=f"{field}.device")
    if reading.epoch not in (b"", epoch):
        raise PayloadError("differs from the message's epoch", field=f"{field}.epoch")
    if reading.seq > _MAX_SEQ:
        raise PayloadError(f"{reading.seq}, at most {_MAX_SEQ}", field=f"{field}.seq")
    # Encoded only where it may matter: a character takes up to four bytes.
    reference = reading.reference
    if 4 * len(reference) > MAX_REFERENCE_BYTES and len(reference.encode()) > MAX_REFERENCE_BYTES:
        raise PayloadError(f"longer than {MAX_REFERENCE_BYTES} bytes", field=f"{field}.reference")


def check_epoch(epoch: bytes) -> None:
    """Refuse an epoch that is not 128 bits.

    Raises:
        PayloadError: naming the field.
    """
    if len(epoch) != EPOCH_BYTES:
        raise PayloadError(f"{len(epoch)} bytes, expected {EPOCH_BYTES}", field="epoch")
