from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LabelSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LABEL_SOURCE_UNSPECIFIED: _ClassVar[LabelSource]
    LABEL_SOURCE_PERSON: _ClassVar[LabelSource]
    LABEL_SOURCE_TEACHER: _ClassVar[LabelSource]
    LABEL_SOURCE_WITH_SAMPLE: _ClassVar[LabelSource]

class CommandStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMAND_STATUS_UNSPECIFIED: _ClassVar[CommandStatus]
    COMMAND_STATUS_DONE: _ClassVar[CommandStatus]
    COMMAND_STATUS_REFUSED: _ClassVar[CommandStatus]
    COMMAND_STATUS_EXPIRED: _ClassVar[CommandStatus]
LABEL_SOURCE_UNSPECIFIED: LabelSource
LABEL_SOURCE_PERSON: LabelSource
LABEL_SOURCE_TEACHER: LabelSource
LABEL_SOURCE_WITH_SAMPLE: LabelSource
COMMAND_STATUS_UNSPECIFIED: CommandStatus
COMMAND_STATUS_DONE: CommandStatus
COMMAND_STATUS_REFUSED: CommandStatus
COMMAND_STATUS_EXPIRED: CommandStatus

class Label(_message.Message):
    __slots__ = ("device", "epoch", "seq", "label")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    device: str
    epoch: bytes
    seq: int
    label: int
    def __init__(self, device: _Optional[str] = ..., epoch: _Optional[bytes] = ..., seq: _Optional[int] = ..., label: _Optional[int] = ...) -> None: ...

class ReportState(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AddLabels(_message.Message):
    __slots__ = ("source", "author", "labels")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    source: LabelSource
    author: str
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    def __init__(self, source: _Optional[_Union[LabelSource, str]] = ..., author: _Optional[str] = ..., labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ...) -> None: ...

class RunPipeline(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Rebirth(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetLogLevel(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class SetPolicy(_message.Message):
    __slots__ = ("max_share", "score_threshold")
    MAX_SHARE_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    max_share: float
    score_threshold: float
    def __init__(self, max_share: _Optional[float] = ..., score_threshold: _Optional[float] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropRelease(_message.Message):
    __slots__ = ("model", "release", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    release: int
    reason: str
    def __init__(self, model: _Optional[str] = ..., release: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Restart(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportMetrics(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Command(_message.Message):
    __slots__ = ("id", "issued_at_us", "expires_at_us", "report_state", "add_labels", "run_pipeline", "rebirth", "set_log_level", "set_policy", "snapshot", "drop_release", "restart", "report_metrics")
    ID_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_US_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_US_FIELD_NUMBER: _ClassVar[int]
    REPORT_STATE_FIELD_NUMBER: _ClassVar[int]
    ADD_LABELS_FIELD_NUMBER: _ClassVar[int]
    RUN_PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REBIRTH_FIELD_NUMBER: _ClassVar[int]
    SET_LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    SET_POLICY_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DROP_RELEASE_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    REPORT_METRICS_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    issued_at_us: int
    expires_at_us: int
    report_state: ReportState
    add_labels: AddLabels
    run_pipeline: RunPipeline
    rebirth: Rebirth
    set_log_level: SetLogLevel
    set_policy: SetPolicy
    snapshot: Snapshot
    drop_release: DropRelease
    restart: Restart
    report_metrics: ReportMetrics
    def __init__(self, id: _Optional[bytes] = ..., issued_at_us: _Optional[int] = ..., expires_at_us: _Optional[int] = ..., report_state: _Optional[_Union[ReportState, _Mapping]] = ..., add_labels: _Optional[_Union[AddLabels, _Mapping]] = ..., run_pipeline: _Optional[_Union[RunPipeline, _Mapping]] = ..., rebirth: _Optional[_Union[Rebirth, _Mapping]] = ..., set_log_level: _Optional[_Union[SetLogLevel, _Mapping]] = ..., set_policy: _Optional[_Union[SetPolicy, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., drop_release: _Optional[_Union[DropRelease, _Mapping]] = ..., restart: _Optional[_Union[Restart, _Mapping]] = ..., report_metrics: _Optional[_Union[ReportMetrics, _Mapping]] = ...) -> None: ...

class CommandResult(_message.Message):
    __slots__ = ("id", "status", "message")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    status: CommandStatus
    message: str
    def __init__(self, id: _Optional[bytes] = ..., status: _Optional[_Union[CommandStatus, str]] = ..., message: _Optional[str] = ...) -> None: ...
