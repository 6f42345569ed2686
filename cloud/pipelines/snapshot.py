"""What a run begins with, as trees of files: a killed run goes on with the samples and the field that it began with."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud.tasks.base import LabelledSamples, TrainingData
from shoal.codec import decode
from shoal.v1.release_pb2 import ReleaseSpec

_SPEC = "spec.pb"


@dataclass(frozen=True, slots=True)
class PublishedRelease:
    """A release with its artefacts.

    Attributes:
        files: artefacts by the path that the spec gives them.
    """

    spec: ReleaseSpec
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class FieldSamples:
    """What came back from the field with a label; None where there is nothing.

    Attributes:
        trusted: labelled by people, or with the sample.
        taught: labelled by a teacher model.
        hard: of the trusted ones, those that a model in the field got wrong.
    """

    trusted: LabelledSamples | None = None
    taught: LabelledSamples | None = None
    hard: LabelledSamples | None = None

    def labelled(self) -> LabelledSamples | None:
        """Return all that a task may learn from."""
        parts = [part for part in (self.trusted, self.taught) if part is not None]
        if not parts:
            return None
        flags = [np.full(len(part), part is self.taught) for part in parts]
        x, y = (np.concatenate(arrays) for arrays in zip(*((part.x, part.y) for part in parts), strict=True))
        return LabelledSamples(x, y, np.concatenate(flags))


_PARTS = ("trusted", "taught", "hard")


def samples_tree(samples: FieldSamples) -> dict[str, bytes]:
    """Freeze the labelled samples of the field."""
    tree: dict[str, bytes] = {}
    for name in _PARTS:
        part: LabelledSamples | None = getattr(samples, name)
        if part is not None:
            tree |= {f"{name}.x.npy": array_bytes(part.x), f"{name}.y.npy": array_bytes(part.y)}
    return tree


def read_samples(tree: Mapping[str, bytes]) -> FieldSamples:
    found = {
        name: LabelledSamples(_array(tree[f"{name}.x.npy"]), _array(tree[f"{name}.y.npy"]))
        for name in _PARTS
        if f"{name}.x.npy" in tree
    }
    return FieldSamples(**found)


def field_tree(published: PublishedRelease | None) -> dict[str, bytes]:
    """Freeze the release that the fleet has; None is an empty tree."""
    if published is None:
        return {}
    return {_SPEC: published.spec.SerializeToString(deterministic=True)} | dict(published.files)


def read_field(tree: Mapping[str, bytes]) -> PublishedRelease | None:
    if not tree:
        return None
    return PublishedRelease(
        decode(ReleaseSpec, tree[_SPEC]), {path: data for path, data in tree.items() if path != _SPEC}
    )


def data_digest(data: TrainingData) -> str:
    """Name everything that a task made of its own data and the field's: what a step's key holds for `samples`."""
    found = hashlib.sha256()
    for array in (data.train.x, data.train.y, data.holdout.x, data.holdout.y, data.mean, data.std):
        found.update(repr((array.dtype.str, array.shape)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def array_bytes(array: NDArray[np.float32] | NDArray[np.int64]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _array(data: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array
