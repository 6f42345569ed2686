"""What the fleet sent up, as the cloud's parts see it: each has a small port, and SQLite is behind them all.

Invariants of every store:
- a sample is identified by (device, epoch, seq); the same key with the same bytes is a duplicate, with other bytes it
  is a conflict, and neither changes what is stored; this outlives the sample's reading;
- what `add` returned is safe to acknowledge.
"""

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, unique
from typing import NamedTuple, Protocol

from cloud.tasks.base import LabelledSamples
from shoal.v1.node_pb2 import NodeState

# What an integer of SQLite holds; the wire's numbers are unsigned.
MAX_SEQ = (1 << 63) - 1


@unique
class Fate(Enum):
    """What became of one received sample."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class SampleKey(NamedTuple):
    """Identifies a sample for ever."""

    device: str
    epoch: bytes
    seq: int


class StoredSample(NamedTuple):
    """One row of the store, in the order of its columns. Scores and labels are None where there was no answer.

    Attributes:
        reading: a serialised `shoal.v1.SensorData`.
        reason: why the device asked, as the enum's number.
        boot_id, since_boot_us: where the device doubted its clock: which boot of its machine, and how long after that.
    """

    device: str
    epoch: bytes
    seq: int
    model: str
    gateway: str
    reason: int
    reference: str
    captured_at_us: int
    received_at_us: int
    reading: bytes
    device_release: int | None
    device_score: float | None
    device_label: int | None
    gateway_release: int | None
    gateway_score: float | None
    gateway_label: int | None
    boot_id: bytes | None = None
    since_boot_us: int | None = None

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.device, self.epoch, self.seq)

    @property
    def digest(self) -> bytes:
        """Of what identifies the content: the reading, not when or through whom it came."""
        return hashlib.sha256(self.model.encode() + b"\0" + self.reading).digest()


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """One author's word on one sample; the sample may come later than its label.

    Attributes:
        source: `shoal.v1.LabelSource` as a number.
        settles: see `cloud.labels.Word`.
    """

    device: str
    epoch: bytes
    seq: int
    label: int
    source: int
    author: str
    labelled_at_us: int
    note: str = ""
    settles: bool = False

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.device, self.epoch, self.seq)


class BootNotes(Protocol):
    """What dates the samples of devices that doubted their clocks."""

    def note(self, state: NodeState, received_at_us: int, *, retained: bool) -> None:
        """Learn from a device's state; one that is retained says nothing by when it arrives."""


class SampleStore(Protocol):
    """What ingest writes to."""

    @property
    def boots(self) -> BootNotes: ...

    def add(self, samples: Iterable[StoredSample]) -> list[Fate]:
        """Store what is new, in one transaction; say what became of each."""

    def set_aside(self, gateway: str, reason: str, payload: bytes, received_at_us: int) -> None:
        """Keep what was refused, for people."""

    def add_labels(self, labels: Iterable[StoredLabel]) -> int:
        """Keep words in one transaction, each author's newest on each sample. Returns how many were given."""


class TriggerStore(Protocol):
    """What decides when a release is due."""

    def count_labelled(self, model: str) -> int:
        """Samples of a model that came and have a label that counts, those dropped since included.

        So it does not fall when the store makes room, and the difference of two counts is what is new.
        """

    def audit_scores(self, model: str, after: int, limit: int) -> list[tuple[int, int, float]]:
        """Devices' scores of audited readings in the order in which they came: row number, release, score.

        Args:
            model: whose.
            after: the last row number seen; 0 at first.
            limit: return no more at once.
        """


class TrainingStore(Protocol):
    """What a release is made from."""

    def snapshot(self) -> AbstractContextManager[None]:
        """What is read within is of one moment, whoever labels meanwhile; nothing is written within."""

    def count_labelled(self, model: str) -> int:
        """Samples of a model that came and have a label that counts, those dropped since included.

        So it does not fall when the store makes room, and the difference of two counts is what is new.
        """

    def labelled(
        self, model: str, shape: tuple[int, ...], classes: int, *, sources: frozenset[int] | None = None
    ) -> LabelledSamples | None:
        """All samples of a model whose label counts, of these sources; None when there are none.

        Their order is that of their keys, so that `snapshot_digest` tells all of what a build gets. Readings that do
        not fit the shape (an older schema) and labels outside [0, classes) (a slip of the hand) are left out: one of
        them must not stop every build to come.
        """

    def hard(self, model: str, shape: tuple[int, ...], classes: int, limit: int) -> LabelledSamples | None:
        """The newest `limit` labelled samples that the device or the gateway answered wrongly, newest first."""

    def snapshot_digest(self, model: str) -> bytes:
        """SHA-256 of what `labelled` is made from: key, digest and label of each, in the order of their keys."""
