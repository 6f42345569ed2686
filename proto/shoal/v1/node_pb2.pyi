from shoal.v1 import sensor_pb2 as _sensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SlotPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SLOT_PHASE_UNSPECIFIED: _ClassVar[SlotPhase]
    SLOT_PHASE_EMPTY: _ClassVar[SlotPhase]
    SLOT_PHASE_WRITTEN: _ClassVar[SlotPhase]
    SLOT_PHASE_PROBATION: _ClassVar[SlotPhase]
    SLOT_PHASE_CONFIRMED: _ClassVar[SlotPhase]
    SLOT_PHASE_FAILED: _ClassVar[SlotPhase]
SLOT_PHASE_UNSPECIFIED: SlotPhase
SLOT_PHASE_EMPTY: SlotPhase
SLOT_PHASE_WRITTEN: SlotPhase
SLOT_PHASE_PROBATION: SlotPhase
SLOT_PHASE_CONFIRMED: SlotPhase
SLOT_PHASE_FAILED: SlotPhase

class Presence(_message.Message):
    __slots__ = ("session", "online", "at_us", "role", "version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    AT_US_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    online: bool
    at_us: int
    role: str
    version: str
    def __init__(self, session: _Optional[bytes] = ..., online: _Optional[bool] = ..., at_us: _Optional[int] = ..., role: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ModelState(_message.Message):
    __slots__ = ("model", "release", "phase", "sha256", "runtime", "refused_release", "refused_reason", "answers", "errors", "divergence_ppm")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_RELEASE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_REASON_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_PPM_FIELD_NUMBER: _ClassVar[int]
    model: str
    release: int
    phase: SlotPhase
    sha256: bytes
    runtime: str
    refused_release: int
    refused_reason: str
    answers: int
    errors: int
    divergence_ppm: int
    def __init__(self, model: _Optional[str] = ..., release: _Optional[int] = ..., phase: _Optional[_Union[SlotPhase, str]] = ..., sha256: _Optional[bytes] = ..., runtime: _Optional[str] = ..., refused_release: _Optional[int] = ..., refused_reason: _Optional[str] = ..., answers: _Optional[int] = ..., errors: _Optional[int] = ..., divergence_ppm: _Optional[int] = ...) -> None: ...

class UploadState(_message.Message):
    __slots__ = ("threshold", "budget_ppm", "asked_ppm")
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    BUDGET_PPM_FIELD_NUMBER: _ClassVar[int]
    ASKED_PPM_FIELD_NUMBER: _ClassVar[int]
    threshold: float
    budget_ppm: int
    asked_ppm: int
    def __init__(self, threshold: _Optional[float] = ..., budget_ppm: _Optional[int] = ..., asked_ppm: _Optional[int] = ...) -> None: ...

class NodeState(_message.Message):
    __slots__ = ("at_us", "role", "version", "counters", "models", "time_quality", "upload", "boot_id", "boot_count", "since_boot_us")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    AT_US_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TIME_QUALITY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SINCE_BOOT_US_FIELD_NUMBER: _ClassVar[int]
    at_us: int
    role: str
    version: str
    counters: _containers.ScalarMap[str, int]
    models: _containers.RepeatedCompositeFieldContainer[ModelState]
    time_quality: _sensor_pb2.TimeQuality
    upload: UploadState
    boot_id: bytes
    boot_count: int
    since_boot_us: int
    def __init__(self, at_us: _Optional[int] = ..., role: _Optional[str] = ..., version: _Optional[str] = ..., counters: _Optional[_Mapping[str, int]] = ..., models: _Optional[_Iterable[_Union[ModelState, _Mapping]]] = ..., time_quality: _Optional[_Union[_sensor_pb2.TimeQuality, str]] = ..., upload: _Optional[_Union[UploadState, _Mapping]] = ..., boot_id: _Optional[bytes] = ..., boot_count: _Optional[int] = ..., since_boot_us: _Optional[int] = ...) -> None: ...
