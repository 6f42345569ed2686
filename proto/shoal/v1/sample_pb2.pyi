from shoal.v1 import inference_pb2 as _inference_pb2
from shoal.v1 import sensor_pb2 as _sensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sample(_message.Message):
    __slots__ = ("reading", "reason", "device_answer", "gateway_answer")
    READING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ANSWER_FIELD_NUMBER: _ClassVar[int]
    reading: _sensor_pb2.SensorData
    reason: _inference_pb2.AskReason
    device_answer: _inference_pb2.Answer
    gateway_answer: _inference_pb2.Answer
    def __init__(self, reading: _Optional[_Union[_sensor_pb2.SensorData, _Mapping]] = ..., reason: _Optional[_Union[_inference_pb2.AskReason, str]] = ..., device_answer: _Optional[_Union[_inference_pb2.Answer, _Mapping]] = ..., gateway_answer: _Optional[_Union[_inference_pb2.Answer, _Mapping]] = ...) -> None: ...

class SampleGroup(_message.Message):
    __slots__ = ("device", "epoch", "model", "samples")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    device: str
    epoch: bytes
    model: str
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, device: _Optional[str] = ..., epoch: _Optional[bytes] = ..., model: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class SampleBatch(_message.Message):
    __slots__ = ("gateway", "groups")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    groups: _containers.RepeatedCompositeFieldContainer[SampleGroup]
    def __init__(self, gateway: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[SampleGroup, _Mapping]]] = ...) -> None: ...

class SampleAckGroup(_message.Message):
    __slots__ = ("device", "epoch", "stored", "quarantined")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    device: str
    epoch: bytes
    stored: _containers.RepeatedScalarFieldContainer[int]
    quarantined: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, device: _Optional[str] = ..., epoch: _Optional[bytes] = ..., stored: _Optional[_Iterable[int]] = ..., quarantined: _Optional[_Iterable[int]] = ...) -> None: ...

class SampleAck(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[SampleAckGroup]
    def __init__(self, groups: _Optional[_Iterable[_Union[SampleAckGroup, _Mapping]]] = ...) -> None: ...
