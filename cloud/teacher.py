"""A larger model, or several, labels what it is sure of; how sure it must be is measured on rows with known labels.

It says nothing of a sample that anybody has labelled, and a person's later word stands above its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloud.gate import Runner
from cloud.sample_store import StoredLabel, StoredSample
from cloud.tasks.base import LabelledSamples
from shoal.errors import ModelError, PayloadError
from shoal.scoring import scale
from shoal.tensors import reading_values
from shoal.v1 import release_pb2 as pb
from shoal.v1.command_pb2 import LABEL_SOURCE_TEACHER
from shoal.v1.sensor_pb2 import SensorData

# One-sided 95 %.
_Z = 1.6449
# Held-out rows are added this share at a time, from the surest on.
_STEP_SHARE = 0.05
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Opinions:
    """What a teacher takes rows for.

    Attributes:
        labels: (n,).
        certainty: (n,) 0 to 1, the mean probability of that label.
    """

    labels: NDArray[np.int64]
    certainty: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Teacher:
    """Classifiers that answer together.

    Attributes:
        name: signs its labels, such as "digits 7".
        runners: one or more; their probabilities are averaged.
        schema: how their inputs are scaled.
    """

    name: str
    runners: Sequence[Runner]
    schema: pb.InputSchema

    def opinions(self, values: NDArray[np.float32]) -> Opinions:
        """Judge readings (n, *shape) in the sensor's own units.

        Raises:
            ModelError: an output is not finite, or not the same number for each row.
        """
        rows = scale(values, self.schema)
        mean = sum(_probabilities(run(rows), len(rows)) for run in self.runners) / len(self.runners)
        probabilities = np.asarray(mean, dtype=np.float32)
        return Opinions(probabilities.argmax(axis=1), probabilities.max(axis=1))


@dataclass(frozen=True, slots=True)
class Sureness:
    """From which certainty on a teacher may speak, and what that rests on.

    Attributes:
        limit: speaks at this certainty and above.
        rows, right: held-out rows at or above the limit, and how many of them it got right.
        precision_bound: of its labels, at least; Wilson's lower bound, one-sided 95 %.
        share: of the held-out rows that it would label.
    """

    limit: float
    rows: int
    right: int
    precision_bound: float
    share: float


def wilson_lower_bound(right: int, total: int, z: float = _Z) -> float:
    """Return what a share is at least.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not total:
        return 0.0
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, (centre - spread) / (1 + z * z / total))


def rows_needed(precision: float, wrong: int = 0) -> int:
    """How many rows show this precision when so many of them are wrong.

    Raises:
        ValueError: the precision is not between 0 and 1.
    """
    if not 0 < precision < 1:
        raise ValueError(f"precision {precision}, expected more than 0 and less than 1")
    high = wrong + 1
    while wilson_lower_bound(high - wrong, high) < precision:
        high *= 2
    low = wrong
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wilson_lower_bound(middle - wrong, middle) >= precision else (middle, high)
    return high


def choose_sureness(opinions: Opinions, labels: NDArray[np.int64], precision: float) -> Sureness:
    """Choose the lowest certainty from which on labels are right this often, as far as held-out rows can show.

    More and more rows are looked at, the surest first, in steps that only the certainties decide; the first that does
    not show the precision ends it. So looking several times does not make chance look like precision.

    Source: A. Angelopoulos et al., Learn then Test (2021), fixed sequence testing; Wilson's bound at each step.

    Args:
        opinions: of the teacher on rows that it never learnt from.
        labels: of the same rows, and of no teacher's.
        precision: what is wanted, such as 0.99.

    Raises:
        ModelError: there are too few rows to show it, or the surest of them do not.
    """
    total, fewest = len(labels), rows_needed(precision)
    if total < fewest:
        raise ModelError(f"{total} held-out rows cannot show a precision of {precision:g}: {fewest} could, all right")
    order = np.argsort(-opinions.certainty, kind="stable")
    certainty = opinions.certainty[order]
    right = np.cumsum(opinions.labels[order] == labels[order])
    chosen: Sureness | None = None
    for count in _counts(certainty, min(rows_needed(precision, wrong=1), total)):
        bound = wilson_lower_bound(int(right[count - 1]), count)
        if bound < precision:
            break
        chosen = Sureness(float(certainty[count - 1]), count, int(right[count - 1]), bound, count / total)
    if chosen is None:
        raise ModelError(f"not even its surest answers on {total} held-out rows show a precision of {precision:g}")
    return chosen


def _counts(certainty: NDArray[np.float32], first: int) -> Iterator[int]:
    """So many of the surest rows; rows that are equally sure come together."""
    total = len(certainty)
    step = max(1, round(total * _STEP_SHARE))
    count = first
    while True:
        count = int(np.searchsorted(-certainty, -certainty[count - 1], side="right"))
        yield count
        if count == total:
            return
        count = min(count + step, total)


def _probabilities(outputs: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    if not np.isfinite(outputs).all():
        raise ModelError("the teacher answered with a value that is not finite")
    if outputs.size == 0 or outputs.size % rows:
        raise ModelError(f"{outputs.shape} came out, expected the same number for each of {rows} rows")
    logits = outputs.reshape(rows, -1)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


def measure_sureness(teacher: Teacher, held_out: LabelledSamples, precision: float) -> Sureness:
    """See `choose_sureness`.

    Raises:
        ModelError: as there.
    """
    return choose_sureness(teacher.opinions(held_out.x), held_out.y, precision)


class UnlabelledStore(Protocol):
    """What a teacher reads from and writes to."""

    def unlabelled(self, model: str, after: int, limit: int) -> list[tuple[int, StoredSample]]:
        """Samples of which nobody said anything, by the number of their row, above `after`."""

    def add_labels(self, labels: Sequence[StoredLabel]) -> int: ...


@dataclass(frozen=True, slots=True)
class Taught:
    """What came of it.

    Attributes:
        unsure: the teacher would not speak.
        unreadable: no readings of the model's shape.
    """

    labelled: int
    unsure: int
    unreadable: int


def label_unlabelled(
    store: UnlabelledStore,
    teacher: Teacher,
    sureness: Sureness,
    *,
    model: str,
    shape: tuple[int, ...],
    limit: int,
    now_us: Callable[[], int],
) -> Taught:
    """Label what nobody labelled and the teacher is sure of, oldest first, until `limit` samples have a label.

    Each batch is stored before the next is looked at.
    """
    labelled = unsure = unreadable = after = 0
    while labelled < limit and (batch := store.unlabelled(model, after, _BATCH_ROWS)):
        after = batch[-1][0]
        samples = [(sample, values) for _, sample in batch if (values := _values(sample, shape)) is not None]
        unreadable += len(batch) - len(samples)
        if not samples:
            continue
        opinions = teacher.opinions(np.stack([values for _, values in samples]))
        sure = np.flatnonzero(opinions.certainty >= np.float32(sureness.limit))[: limit - labelled]
        at_us = now_us()
        words = []
        for index in sure:
            key, label = samples[index][0].key, int(opinions.labels[index])
            note = f"certainty {opinions.certainty[index]:.4f}"
            words.append(
                StoredLabel(key.device, key.epoch, key.seq, label, LABEL_SOURCE_TEACHER, teacher.name, at_us, note)
            )
        store.add_labels(words)
        labelled += len(sure)
        unsure += int((opinions.certainty < np.float32(sureness.limit)).sum())
    return Taught(labelled, unsure, unreadable)


def _values(sample: StoredSample, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    try:
        return reading_values(SensorData.FromString(sample.reading), shape)
    except PayloadError:
        return None
