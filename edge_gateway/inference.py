"""A batch of rows of one model becomes an outcome for each row. No I/O but the model call."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_gateway.engine import Outputs
from edge_gateway.requests import Row
from shoal.errors import ModelError, PayloadError
from shoal.release.probation import Baseline, Watch
from shoal.scoring import Scaler, score_rows
from shoal.tensors import as_float32, to_tensor
from shoal.v1.release_pb2 import Artefact, ReleaseSpec
from shoal.v1.tensor_pb2 import Tensor


class BatchRuntime(Protocol):
    """A loaded model that takes many rows at once, from any thread."""

    def run_all(self, inputs: NDArray[np.float32]) -> Outputs:
        """Answer scaled rows (n, *shape) with every output, each (n, ...); the first is the one that is scored."""


class Scored(NamedTuple):
    """What the model said about one row. `outputs` only where they were asked for."""

    score: float
    label: int | None
    outputs: tuple[Tensor, ...] = ()
    from_cache: bool = False


class BeyondScaleError(PayloadError):
    """A finite row that the release's scale makes infinite: refused for ever, and held against the release."""


# A row's own fault, or the model's.
Outcome = Scored | PayloadError | ModelError


class ServedModel:
    """One release being served. Worker threads read its parts, which never change, but for `watch`: the loop's alone.

    Attributes:
        watch: sees what it answers and where it fails.

    Raises:
        ModelError: the release's scale cannot be.
    """

    def __init__(
        self, spec: ReleaseSpec, artefact: Artefact, runtime: BatchRuntime, watch: Watch | None = None
    ) -> None:
        self.spec = spec
        self.runtime = runtime
        self.watch = watch or Watch(Baseline())
        self.digest = artefact.sha256
        self.threshold = artefact.threshold
        self.release = spec.release
        self.shape = tuple(spec.input.shape)
        self.values = int(np.prod(self.shape, dtype=np.int64))
        self.score = spec.score
        self.scaler = Scaler(spec.input)


@dataclass(slots=True)
class Job:
    """One model call: what goes in, and once it has run, an outcome for each row."""

    model: ServedModel
    rows: list[Row]
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> None:
        """Infer; safe in any thread, for it touches nothing but the model."""
        self.outcomes = infer(self.model, self.rows)


def infer(model: ServedModel, rows: list[Row]) -> list[Outcome]:
    """Answer rows in one call; where that fails, each half for itself, down to the row at fault."""
    try:
        return _infer_together(model, rows)
    except (ModelError, PayloadError) as exc:
        if len(rows) == 1:
            return [exc]
    half = len(rows) // 2
    return [*infer(model, rows[:half]), *infer(model, rows[half:])]


def _infer_together(model: ServedModel, rows: list[Row]) -> list[Outcome]:
    values = gather(rows).reshape(len(rows), *model.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        scaled = model.scaler(values)
        if not np.isfinite(scaled).all():
            if np.isfinite(values).all():
                raise BeyondScaleError("a value is too large for the model's scale", field=rows[0].field)
            raise PayloadError("a value is not finite", field=rows[0].field)
        outputs = model.runtime.run_all(scaled)
        scores = score_rows(model.score, scaled, as_float32(outputs[0]))
    labels = [None] * len(rows) if scores.labels is None else scores.labels.tolist()
    scored = list(map(Scored, scores.scores.tolist(), labels))
    for index, row in enumerate(rows):
        if row.request.wants_outputs:
            scored[index] = scored[index]._replace(outputs=_tensors(outputs, index))
    return [*scored]


def gather(rows: list[Row]) -> NDArray[np.float32]:
    """The rows' values (n, values) as float32: one copy where all came in the same element type."""
    dtype = rows[0].dtype
    if all(row.dtype == dtype for row in rows):
        flat = np.frombuffer(b"".join([row.data for row in rows]), dtype)
        return as_float32(flat).reshape(len(rows), -1)
    return np.stack([as_float32(np.frombuffer(row.data, row.dtype)) for row in rows])


def _tensors(outputs: Outputs, index: int) -> tuple[Tensor, ...]:
    try:
        return tuple(to_tensor(output[index]) for output in outputs)
    except ValueError as exc:
        raise ModelError(f"an output cannot travel: {exc}") from exc
