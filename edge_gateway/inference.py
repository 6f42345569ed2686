"""A batch of rows of one model: answers, and the samples worth keeping. No I/O but the model call."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_gateway.cache import AnswerCache
from edge_gateway.requests import Row, refusal
from shoal.delivery.outbox import Item, Key
from shoal.errors import ModelError
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

    A row whose model fails is settled INTERNAL here and is not in the result.
    """
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
        try:
            fresh = _infer(model, np.stack([rows[index].values for index in missing]))
        except ModelError as exc:
            counters["model_errors"] += 1
            for index in missing:
                rows[index].settle(refusal(rows[index].seq, pb.STATUS_INTERNAL, str(exc)))
            fresh = []
        for index, answer in zip(missing, fresh, strict=False):
            answers[index] = answer
            if keys[index]:
                label = answer.label if answer.HasField("label") else None
                cache.put(digest, keys[index], answer.score, label)
        counters["rows.inferred"] += len(fresh)
    return [Answered(rows[index], answer, _sample(model, rows[index], answer)) for index, answer in answers.items()]


def _infer(model: ServedModel, values: NDArray[np.float32]) -> list[pb.Answer]:
    scaled = scale(values, model.spec.input)
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
