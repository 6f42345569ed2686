from shoal.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TimeQuality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIME_QUALITY_UNSPECIFIED: _ClassVar[TimeQuality]
    TIME_QUALITY_SYNCED: _ClassVar[TimeQuality]
    TIME_QUALITY_SUSPECT: _ClassVar[TimeQuality]
    TIME_QUALITY_UNSYNCED: _ClassVar[TimeQuality]
TIME_QUALITY_UNSPECIFIED: TimeQuality
TIME_QUALITY_SYNCED: TimeQuality
TIME_QUALITY_SUSPECT: TimeQuality
TIME_QUALITY_UNSYNCED: TimeQuality

class Scalars(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class EncodedImage(_message.Message):
    __slots__ = ("media_type", "data")
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    media_type: str
    data: bytes
    def __init__(self, media_type: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class SensorData(_message.Message):
    __slots__ = ("device", "epoch", "seq", "captured_at_us", "time_quality", "scalars", "tensor", "image", "reference", "boot_id", "since_boot_us")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_AT_US_FIELD_NUMBER: _ClassVar[int]
    TIME_QUALITY_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_BOOT_US_FIELD_NUMBER: _ClassVar[int]
    device: str
    epoch: bytes
    seq: int
    captured_at_us: int
    time_quality: TimeQuality
    scalars: Scalars
    tensor: _tensor_pb2.Tensor
    image: EncodedImage
    reference: str
    boot_id: bytes
    since_boot_us: int
    def __init__(self, device: _Optional[str] = ..., epoch: _Optional[bytes] = ..., seq: _Optional[int] = ..., captured_at_us: _Optional[int] = ..., time_quality: _Optional[_Union[TimeQuality, str]] = ..., scalars: _Optional[_Union[Scalars, _Mapping]] = ..., tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., image: _Optional[_Union[EncodedImage, _Mapping]] = ..., reference: _Optional[str] = ..., boot_id: _Optional[bytes] = ..., since_boot_us: _Optional[int] = ...) -> None: ...
