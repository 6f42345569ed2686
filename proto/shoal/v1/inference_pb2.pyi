from shoal.v1 import sensor_pb2 as _sensor_pb2
from shoal.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AskReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASK_REASON_UNSPECIFIED: _ClassVar[AskReason]
    ASK_REASON_SCORE: _ClassVar[AskReason]
    ASK_REASON_NO_MODEL: _ClassVar[AskReason]
    ASK_REASON_AUDIT: _ClassVar[AskReason]
    ASK_REASON_COMMAND: _ClassVar[AskReason]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_OK: _ClassVar[Status]
    STATUS_INVALID_ARGUMENT: _ClassVar[Status]
    STATUS_NOT_FOUND: _ClassVar[Status]
    STATUS_RESOURCE_EXHAUSTED: _ClassVar[Status]
    STATUS_DEADLINE_EXCEEDED: _ClassVar[Status]
    STATUS_INTERNAL: _ClassVar[Status]
ASK_REASON_UNSPECIFIED: AskReason
ASK_REASON_SCORE: AskReason
ASK_REASON_NO_MODEL: AskReason
ASK_REASON_AUDIT: AskReason
ASK_REASON_COMMAND: AskReason
STATUS_UNSPECIFIED: Status
STATUS_OK: Status
STATUS_INVALID_ARGUMENT: Status
STATUS_NOT_FOUND: Status
STATUS_RESOURCE_EXHAUSTED: Status
STATUS_DEADLINE_EXCEEDED: Status
STATUS_INTERNAL: Status

class Answer(_message.Message):
    __slots__ = ("release", "score", "label", "outputs", "from_cache")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    FROM_CACHE_FIELD_NUMBER: _ClassVar[int]
    release: int
    score: float
    label: int
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    from_cache: bool
    def __init__(self, release: _Optional[int] = ..., score: _Optional[float] = ..., label: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., from_cache: _Optional[bool] = ...) -> None: ...

class InferenceRow(_message.Message):
    __slots__ = ("reading", "reason", "device_answer")
    READING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    reading: _sensor_pb2.SensorData
    reason: AskReason
    device_answer: Answer
    def __init__(self, reading: _Optional[_Union[_sensor_pb2.SensorData, _Mapping]] = ..., reason: _Optional[_Union[AskReason, str]] = ..., device_answer: _Optional[_Union[Answer, _Mapping]] = ...) -> None: ...

class InferenceRequest(_message.Message):
    __slots__ = ("device", "epoch", "model", "rows", "answer_within_ms", "answer_only", "replay", "wants_outputs")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_ONLY_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    WANTS_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    device: str
    epoch: bytes
    model: str
    rows: _containers.RepeatedCompositeFieldContainer[InferenceRow]
    answer_within_ms: int
    answer_only: bool
    replay: bool
    wants_outputs: bool
    def __init__(self, device: _Optional[str] = ..., epoch: _Optional[bytes] = ..., model: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[InferenceRow, _Mapping]]] = ..., answer_within_ms: _Optional[int] = ..., answer_only: _Optional[bool] = ..., replay: _Optional[bool] = ..., wants_outputs: _Optional[bool] = ...) -> None: ...

class RowReply(_message.Message):
    __slots__ = ("seq", "status", "answer", "sample_promised", "field", "message")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_PROMISED_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    status: Status
    answer: Answer
    sample_promised: bool
    field: str
    message: str
    def __init__(self, seq: _Optional[int] = ..., status: _Optional[_Union[Status, str]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., sample_promised: _Optional[bool] = ..., field: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class InferenceReply(_message.Message):
    __slots__ = ("epoch", "model", "rows")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    epoch: bytes
    model: str
    rows: _containers.RepeatedCompositeFieldContainer[RowReply]
    def __init__(self, epoch: _Optional[bytes] = ..., model: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[RowReply, _Mapping]]] = ...) -> None: ...
