"""The pipeline file: YAML in, a checked pipeline out, errors with the line that they are about.

Invariants of a `Pipeline`:
- every input of a step is one of the `SOURCES` or an output of a step before it, and of a kind that the step takes;
- no two outputs have the same name.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum, unique
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec
import yaml
from msgspec import UNSET, Meta, UnsetType

from cloud.compute import Device, Precision
from shoal.errors import ConfigError, PayloadError
from shoal.ids import parse_id

_Share = Annotated[float, Meta(gt=0, lt=1)]
_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]
_Names: TypeAlias = str | list[str]
_MAX_DEPTH = 32


@unique
class Kind(StrEnum):
    """What passes between steps."""

    SAMPLES = "samples"
    FIELD = "field"
    MODULES = "modules"
    ARTEFACTS = "artefacts"
    RELEASE = "release"
    DEPLOYMENT = "deployment"


# What a run starts with: the labelled samples of this moment, and the release that the fleet has.
SOURCES: Mapping[str, Kind] = MappingProxyType({"samples": Kind.SAMPLES, "field": Kind.FIELD})


class _Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ByTier(_Checked, frozen=True):
    """A share for each tier that is to be changed."""

    device: _Share | None = None
    gateway: _Share | None = None


class TrainParameters(_Checked, frozen=True):
    """Where and how precisely; how long and how hard is the task's to say.

    Attributes:
        device: auto is the GPU where there is one.
        precision: auto is bfloat16 on a GPU, and float32 on a CPU.
        processes: more than one train together by torchrun, each on a part of every batch.
    """

    device: Device = Device.AUTO
    precision: Precision = Precision.AUTO
    processes: Annotated[int, Meta(ge=1, le=64)] = 1


@unique
class Pruning(StrEnum):
    CHANNELS = "channels"
    WEIGHTS = "weights"


class PruneParameters(_Checked, frozen=True):
    """What goes, and how the rest learns to do without it.

    Attributes:
        ratio: share of all channels (or weights), for both tiers or for each.
        kind: channels make a model smaller and faster; single weights only make its file pack better.
        rounds: take the channels in so many equal parts, with fine-tuning after each.
        steps: of fine-tuning, of both tiers; by default as many as the task trains.
        learning_rate: of fine-tuning.
    """

    ratio: _Share | ByTier
    kind: Pruning = Pruning.CHANNELS
    rounds: _Count = 1
    steps: _Count | None = None
    learning_rate: _Positive = 1e-3

    def ratio_of(self, tier: str) -> float | None:
        """Return the share for "device" or "gateway"; None where nothing goes."""
        found: float | None = getattr(self.ratio, tier) if isinstance(self.ratio, ByTier) else self.ratio
        return found


class QuantizeParameters(_Checked, frozen=True):
    """How int8 artefacts are made.

    Attributes:
        calibration_rows: drawn from the training rows.
        torch_dynamic: also TorchScript with int8 linear layers, for users of torch on a CPU; no node runs it.
        mixed_tries: where int8 costs too much, so many of the most sensitive nodes are tried in float; 0 for none.
    """

    calibration_rows: Annotated[int, Meta(ge=8, le=4096)] = 256
    torch_dynamic: bool = False
    mixed_tries: Annotated[int, Meta(ge=0, le=32)] = 4


class TierLimits(_Checked, frozen=True):
    """Takes the place of the task's limits, see `cloud.tasks.base.GateLimits`; what is left out stays the task's."""

    min_metric: float | UnsetType = UNSET
    max_drop_from_float: Annotated[float, Meta(ge=0)] | UnsetType = UNSET
    max_drop_from_parent: Annotated[float, Meta(ge=0)] | UnsetType = UNSET
    max_slowdown: Annotated[float, Meta(ge=1)] | UnsetType = UNSET
    latency_rows: _Count | UnsetType = UNSET
    max_bytes: _Count | UnsetType = UNSET


class EvaluateParameters(_Checked, frozen=True):
    """What a release must keep to.

    Attributes:
        device, gateway: limits of each tier's artefact.
        max_drop_on_hard: how much worse than the release in the field an artefact may score on the hard samples.
    """

    device: TierLimits = TierLimits()
    gateway: TierLimits = TierLimits()
    max_drop_on_hard: Annotated[float, Meta(ge=0)] = 0.02


class _Step(_Checked, frozen=True, kw_only=True, tag_field="name"):
    """What all steps have: one input of each kind that a step `takes`, and perhaps of those that it `may_take`."""

    takes: ClassVar[frozenset[Kind]]
    may_take: ClassVar[frozenset[Kind]] = frozenset()
    makes: ClassVar[Kind]

    inputs: _Names
    outputs: _Names = msgspec.field(default_factory=list)

    @property
    def input_names(self) -> list[str]:
        return _listed(self.inputs)

    @property
    def output(self) -> str:
        """Return the name of what it makes; its own, where the file gives none."""
        return next(iter(_listed(self.outputs)), self.step_name)

    @property
    def step_name(self) -> str:
        return str(self.__struct_config__.tag)


class TrainModel(_Step, frozen=True, tag="train_model"):
    takes = frozenset({Kind.SAMPLES})
    makes = Kind.MODULES
    parameters: TrainParameters = TrainParameters()


class PruneModel(_Step, frozen=True, tag="prune_model"):
    takes = frozenset({Kind.MODULES, Kind.SAMPLES})
    makes = Kind.MODULES
    parameters: PruneParameters


class QuantizeModel(_Step, frozen=True, tag="quantize_model"):
    takes = frozenset({Kind.MODULES, Kind.SAMPLES})
    makes = Kind.ARTEFACTS
    parameters: QuantizeParameters = QuantizeParameters()


class EvaluateModel(_Step, frozen=True, tag="evaluate_model"):
    takes = frozenset({Kind.ARTEFACTS, Kind.SAMPLES})
    may_take = frozenset({Kind.FIELD})
    makes = Kind.RELEASE
    parameters: EvaluateParameters = EvaluateParameters()


class DeployToEdge(_Step, frozen=True, tag="deploy_to_edge"):
    """Attributes: targets: patterns of the nodes that get the release."""

    takes = frozenset({Kind.RELEASE})
    makes = Kind.DEPLOYMENT
    targets: _Names = "*"

    @property
    def target_patterns(self) -> list[str]:
        return _listed(self.targets)


Step: TypeAlias = TrainModel | PruneModel | QuantizeModel | EvaluateModel | DeployToEdge


@unique
class Detector(StrEnum):
    ADWIN = "adwin"
    KSWIN = "kswin"
    PAGE_HINKLEY = "page_hinkley"


class DriftTrigger(_Checked, frozen=True):
    """Fewer labels are enough once the devices' scores have changed.

    Attributes:
        detector: of the package river, over the scores of the audit share, which is drawn from all readings.
        new_labels: enough for a run once drift was found.
    """

    detector: Detector = Detector.ADWIN
    new_labels: _Count = 50


class Triggers(_Checked, frozen=True):
    """When `watch` starts a run; by hand works always.

    Attributes:
        new_labels: samples labelled since the last run.
        drift: see there.
        hours: UTC, such as "22:00-06:00": a run that labels or drift ask for waits for them, the first does not.
        max_releases: none after this; 0 is no limit.
    """

    new_labels: _Count = 200
    drift: DriftTrigger | None = None
    hours: list[Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]] = msgspec.field(
        default_factory=list
    )
    max_releases: Annotated[int, Meta(ge=0)] = 0


class Pipeline(_Checked, frozen=True):
    """How one model's releases are made.

    Attributes:
        model: the name that releases carry.
        task: of the entry points `shoal.tasks`, or `file.py:Class`.
        parameters: the task's own.
        seed: decides weights, order, augmentation and calibration.
        steps: in an order in which they can run.
    """

    model: str
    task: str
    steps: Annotated[list[Step], Meta(min_length=1)]
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    triggers: Triggers = Triggers()


def load_pipeline(path: Path) -> Pipeline:
    """Read and check a pipeline file.

    Raises:
        ConfigError: it cannot be read, or is not a pipeline; with file, line and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return parse_pipeline(text, str(path))


def file_digest(pipeline: Pipeline) -> str:
    """Name a pipeline by what it says, whatever its layout and comments."""
    return hashlib.sha256(msgspec.json.encode(pipeline, order="deterministic")).hexdigest()


def parse_pipeline(text: str, name: str) -> Pipeline:
    """Check a pipeline file's text; `name` begins every error.

    Raises:
        ConfigError: see `load_pipeline`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = _Lines(root, name)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark is not None else 1
        raise ConfigError(f"{name}:{line}: {exc.problem}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    try:
        pipeline = msgspec.convert(content, Pipeline)
    except msgspec.ValidationError as exc:
        problem, _, place = str(exc).partition(" - at `")
        place = place.removesuffix("`") or "$"
        raise ConfigError(f"{name}:{lines.of(place, problem)}: {problem} at {place}") from exc
    for place, problem in _problems(pipeline):
        raise ConfigError(f"{name}:{lines.of(place, '')}: {problem}")
    return pipeline


class _Lines:
    """Where each value of a YAML document stands, by msgspec's paths: `$.steps[0].inputs`."""

    def __init__(self, root: yaml.Node | None, name: str) -> None:
        self._lines = dict(_walk(root, "$", name)) if root is not None else {}

    def of(self, place: str, problem: str) -> int:
        """Return the line of a place, or of the unknown field in it that the problem names."""
        unknown = re.search(r"unknown field `([^`]*)`", problem)
        if unknown is not None and f"{place}.{unknown[1]}" in self._lines:
            return self._lines[f"{place}.{unknown[1]}"]
        while place not in self._lines and place != "$":
            # A key's path is not in the document where the key itself is what is wrong.
            place = re.sub(r"(\.[^.\[]*|\[[^\]]*\])$", "", place) if place.startswith("$") else "$"
        return self._lines.get(place, 1)


def _walk(node: yaml.Node, path: str, name: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield each value's path and line.

    Raises:
        ConfigError: a key is there twice, of which YAML's own reader would drop one, or the document holds itself.
    """
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{name}:{_line(node)}: nested too deep")
    yield path, _line(node)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise ConfigError(f"{name}:{_line(key)}: {key.value!r} is there twice")
            seen.add(key.value)
            place = f"{path}.{key.value}"
            yield from _walk(value, place, name, depth + 1)
            # The key's line, where the value begins on a later one.
            yield place, _line(key)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _walk(value, f"{path}[{index}]", name, depth + 1)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _problems(pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """What types cannot say: places and problems, in the file's order."""
    try:
        parse_id(pipeline.model, "model")
    except PayloadError as exc:
        yield "$.model", str(exc)
    known = dict(SOURCES)
    for index, step in enumerate(pipeline.steps):
        place = f"$.steps[{index}]"
        yield from ((f"{place}.inputs", problem) for problem in _wrong_inputs(step, known))
        outputs = _listed(step.outputs)
        if len(outputs) > 1:
            yield f"{place}.outputs", f"{step.step_name} makes one output, {len(outputs)} are named"
        if step.output in known:
            yield f"{place}.outputs", f"there is a {step.output!r} already: outputs need names of their own"
        known[step.output] = step.makes


def _wrong_inputs(step: Step, known: Mapping[str, Kind]) -> Iterator[str]:
    names = step.input_names
    for name in names:
        if name not in known:
            yield f"{step.step_name} needs {name!r}, which no step before it makes: there is {', '.join(known)}"
            return
    kinds, taken = [known[name] for name in names], step.takes | step.may_take
    for name, kind in zip(names, kinds, strict=True):
        if kind not in taken:
            yield f"{step.step_name} does not take {name!r} (a {kind}), only {', '.join(sorted(taken))}"
        elif kinds.count(kind) > 1:
            yield f"{step.step_name} takes one {kind}, not {kinds.count(kind)}"
    for kind in sorted(step.takes - set(kinds)):
        yield f"{step.step_name} needs an input of kind {kind}"


def _listed(names: _Names) -> list[str]:
    return [names] if isinstance(names, str) else names
