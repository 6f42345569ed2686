from shoal.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]
    TIER_GATEWAY: _ClassVar[Tier]

class ModelFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_FORMAT_UNSPECIFIED: _ClassVar[ModelFormat]
    MODEL_FORMAT_TFLITE: _ClassVar[ModelFormat]
    MODEL_FORMAT_ONNX: _ClassVar[ModelFormat]

class ScoreKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_KIND_UNSPECIFIED: _ClassVar[ScoreKind]
    SCORE_KIND_RECONSTRUCTION: _ClassVar[ScoreKind]
    SCORE_KIND_UNCERTAINTY: _ClassVar[ScoreKind]

class Resize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIZE_UNSPECIFIED: _ClassVar[Resize]
    RESIZE_NEAREST: _ClassVar[Resize]
    RESIZE_AREA: _ClassVar[Resize]
TIER_UNSPECIFIED: Tier
TIER_DEVICE: Tier
TIER_GATEWAY: Tier
MODEL_FORMAT_UNSPECIFIED: ModelFormat
MODEL_FORMAT_TFLITE: ModelFormat
MODEL_FORMAT_ONNX: ModelFormat
SCORE_KIND_UNSPECIFIED: ScoreKind
SCORE_KIND_RECONSTRUCTION: ScoreKind
SCORE_KIND_UNCERTAINTY: ScoreKind
RESIZE_UNSPECIFIED: Resize
RESIZE_NEAREST: Resize
RESIZE_AREA: Resize

class InputSchema(_message.Message):
    __slots__ = ("shape", "mean", "std", "window", "stride", "resize")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    window: int
    stride: int
    resize: Resize
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ..., window: _Optional[int] = ..., stride: _Optional[int] = ..., resize: _Optional[_Union[Resize, str]] = ...) -> None: ...

class GoldenVectors(_message.Message):
    __slots__ = ("inputs", "outputs", "tolerance")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    inputs: _tensor_pb2.Tensor
    outputs: _tensor_pb2.Tensor
    tolerance: float
    def __init__(self, inputs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., outputs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., tolerance: _Optional[float] = ...) -> None: ...

class Baseline(_message.Message):
    __slots__ = ("score_ppm", "rows", "max_error_ppm", "max_divergence_ppm")
    SCORE_PPM_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_PPM_FIELD_NUMBER: _ClassVar[int]
    MAX_DIVERGENCE_PPM_FIELD_NUMBER: _ClassVar[int]
    score_ppm: _containers.RepeatedScalarFieldContainer[int]
    rows: int
    max_error_ppm: int
    max_divergence_ppm: int
    def __init__(self, score_ppm: _Optional[_Iterable[int]] = ..., rows: _Optional[int] = ..., max_error_ppm: _Optional[int] = ..., max_divergence_ppm: _Optional[int] = ...) -> None: ...

class Artefact(_message.Message):
    __slots__ = ("tier", "format", "int8", "path", "sha256", "length_bytes", "chunks", "chunk_bytes", "golden", "threshold", "baseline")
    TIER_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    INT8_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    format: ModelFormat
    int8: bool
    path: str
    sha256: bytes
    length_bytes: int
    chunks: _containers.RepeatedScalarFieldContainer[bytes]
    chunk_bytes: int
    golden: GoldenVectors
    threshold: float
    baseline: Baseline
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., format: _Optional[_Union[ModelFormat, str]] = ..., int8: _Optional[bool] = ..., path: _Optional[str] = ..., sha256: _Optional[bytes] = ..., length_bytes: _Optional[int] = ..., chunks: _Optional[_Iterable[bytes]] = ..., chunk_bytes: _Optional[int] = ..., golden: _Optional[_Union[GoldenVectors, _Mapping]] = ..., threshold: _Optional[float] = ..., baseline: _Optional[_Union[Baseline, _Mapping]] = ...) -> None: ...

class ReleaseSpec(_message.Message):
    __slots__ = ("model", "release", "parent", "created_at_us", "input", "score", "artefacts", "metrics_ppm")
    class MetricsPpmEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_US_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ARTEFACTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_PPM_FIELD_NUMBER: _ClassVar[int]
    model: str
    release: int
    parent: int
    created_at_us: int
    input: InputSchema
    score: ScoreKind
    artefacts: _containers.RepeatedCompositeFieldContainer[Artefact]
    metrics_ppm: _containers.ScalarMap[str, int]
    def __init__(self, model: _Optional[str] = ..., release: _Optional[int] = ..., parent: _Optional[int] = ..., created_at_us: _Optional[int] = ..., input: _Optional[_Union[InputSchema, _Mapping]] = ..., score: _Optional[_Union[ScoreKind, str]] = ..., artefacts: _Optional[_Iterable[_Union[Artefact, _Mapping]]] = ..., metrics_ppm: _Optional[_Mapping[str, int]] = ...) -> None: ...

class RolloutPlan(_message.Message):
    __slots__ = ("rollout_id", "model", "release", "spec_path", "targets", "share_permille")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SPEC_PATH_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SHARE_PERMILLE_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    model: str
    release: int
    spec_path: str
    targets: _containers.RepeatedScalarFieldContainer[str]
    share_permille: int
    def __init__(self, rollout_id: _Optional[str] = ..., model: _Optional[str] = ..., release: _Optional[int] = ..., spec_path: _Optional[str] = ..., targets: _Optional[_Iterable[str]] = ..., share_permille: _Optional[int] = ...) -> None: ...

class BundleEntry(_message.Message):
    __slots__ = ("path", "sha256", "length_bytes", "chunks")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    path: str
    sha256: bytes
    length_bytes: int
    chunks: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, path: _Optional[str] = ..., sha256: _Optional[bytes] = ..., length_bytes: _Optional[int] = ..., chunks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TrustBundle(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[BundleEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[BundleEntry, _Mapping]]] = ...) -> None: ...
