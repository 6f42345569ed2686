"""A batch of rows of one model: answers, and the samples worth keeping. No I/O but the model call."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_gateway.cache import AnswerCache
from edge_gateway.requests import Row, refusal
from shoal.delivery.outbox import Item, Key
from shoal.errors import ModelError, PayloadError
from shoal.release.selftest import Runtime
from shoal.scoring import scale, score_rows
from shoal.v1 import inference_pb2 as pb
from shoal.v1.release_pb2 import Artefact, ReleaseSpec
from shoal.v1.sample_pb2 import Sample


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One release being served."""

    spec: ReleaseSpec
    artefact: Artefact
    runtime: Runtime

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.spec.input.shape)


@dataclass(frozen=True, slots=True)
class Answered:
    """A row with the model's answer; `sample` is set when it exceeds the threshold or is an audit reading."""

    row: Row
    answer: pb.Answer
    sample: Item | None


def run_batch(model: ServedModel, rows: list[Row], cache: AnswerCache, counters: Counter[str]) -> list[Answered]:
    """Answer rows, from the cache where it can, the others in one model call.

    A row that the model cannot answer is settled here and is not in the result; it spoils no other row's answer.
    """
    rows = [row for row in rows if _fits(model, row)]
    answers: dict[int, pb.Answer] = {}
    missing: list[int] = []
    digest = model.artefact.sha256
    keys = [b"" if cache.is_bypassed else row.values.tobytes() for row in rows]
    for index, key in enumerate(keys):
        found = cache.get(digest, key)
        if found is None:
            missing.append(index)
        else:
            answers[index] = pb.Answer(release=model.spec.release, score=found.score, label=found.label)
    if missing:
        fresh = _infer_apart(model, [rows[index] for index in missing], counters)
        for index, answer in zip(missing, fresh, strict=True):
            if answer is None:
                continue
            answers[index] = answer
            counters["rows.inferred"] += 1
            if keys[index]:
                label = answer.label if answer.HasField("label") else None
                cache.put(digest, keys[index], answer.score, label)
    return [Answered(rows[index], answer, _sample(model, rows[index], answer)) for index, answer in answers.items()]


def _fits(model: ServedModel, row: Row) -> bool:
    """False, and settled, where the row was unpacked for a release that has been replaced by one of another shape."""
    if row.values.shape == model.shape:
        return True
    row.settle(refusal(row.seq, pb.STATUS_INTERNAL, "the model was replaced while this waited: ask again"))
    return False


def _infer_apart(model: ServedModel, rows: list[Row], counters: Counter[str]) -> list[pb.Answer | None]:
    """Answer rows in one call; where that fails, each half for itself, down to the row at fault."""
    try:
        return [*_infer(model, np.stack([row.values for row in rows]))]
    except (ModelError, PayloadError) as exc:
        if len(rows) > 1:
            half = len(rows) // 2
            return [*_infer_apart(model, rows[:half], counters), *_infer_apart(model, rows[half:], counters)]
        counters["model_errors"] += 1
        status = pb.STATUS_INTERNAL
        name = ""
        if isinstance(exc, PayloadError):
            status, name = pb.STATUS_INVALID_ARGUMENT, f"rows[{rows[0].index}].reading"
        rows[0].settle(refusal(rows[0].seq, status, str(exc), name))
        return [None]


def _infer(model: ServedModel, values: NDArray[np.float32]) -> list[pb.Answer]:
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        scaled = scale(values, model.spec.input)
        if not np.isfinite(scaled).all():
            raise PayloadError("a value is too large for the model's scale")
        scores = score_rows(model.spec.score, scaled, model.runtime.run(scaled))
    labels = [None] * len(values) if scores.labels is None else scores.labels.tolist()
    return [
        pb.Answer(release=model.spec.release, score=score, label=label)
        for score, label in zip(scores.scores.tolist(), labels, strict=True)
    ]


def _sample(model: ServedModel, row: Row, answer: pb.Answer) -> Item | None:
    """What the cloud wants to see: scores above the threshold, and every audit reading."""
    wanted = answer.score > model.artefact.threshold or row.question.reason == pb.ASK_REASON_AUDIT
    if not wanted or row.request.answer_only:
        return None
    sample = Sample(
        reading=row.question.reading,
        reason=row.question.reason,
        device_answer=row.question.device_answer if row.question.HasField("device_answer") else None,
        gateway_answer=answer,
    )
    sample.reading.ClearField("device")
    sample.reading.ClearField("epoch")
    key = Key(row.request.device, row.request.epoch, row.seq)
    return Item(key, row.request.model, sample.SerializeToString())
