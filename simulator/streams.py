"""What each simulated device reads, reading by reading.

A reading is a function of (seed, device, ordinal, drifted) alone: a stream that was killed and opened again at the
same ordinal goes on as if nothing had happened, and a test can reconcile what arrived against what was produced.
"""

import enum
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import PayloadError
from simulator.datasets import DataSet
from simulator.drift import Drift

_REFERENCE = re.compile(r"([a-z]{1,16})/(0|[1-9][0-9]{0,8})(?:/(?:0|[1-9][0-9]{0,17}))?")


class FleetKind(enum.Enum):
    """What a simulated device carries."""

    SENSORS = "sensors"
    CAMERAS = "cameras"


@dataclass(frozen=True, slots=True, eq=False)
class SimReading:
    """One reading and the truth about it, which never leaves the simulator with it.

    Attributes:
        row: of the data set.
        reference: names the row to people and to the annotator, once in a device's stream.
        values: (9,) or (8, 8, 1) float32, in the sensor's own units.
        label: the class, or 1 for an anomaly.
        held_out: never labelled, so that no release is trained on it.
        drifted: the values went through the drift.
    """

    row: int
    reference: str
    values: NDArray[np.float32]
    label: int
    held_out: bool
    drifted: bool


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part of its fleet's rows: every `devices`-th, from the `index`-th."""

    index: int
    devices: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.devices:
            raise ValueError(f"share {self.index} of {self.devices}, expected 0 to {self.devices - 1}")


class Stream(Protocol):
    """The readings of one device."""

    def next(self, *, drifted: bool = False) -> SimReading | None:
        """Return the next reading, None when there are no more."""


class SensorStream:
    """One device's share of a recorded flight, in order, once. Sensors do not drift: `drifted` changes nothing."""

    def __init__(self, data: DataSet, share: Share, *, max_rows: int | None = None, start: int = 0) -> None:
        """Store what to read.

        Args:
            data: the flight.
            share: every row of the fleet's part goes to exactly one share.
            max_rows: how much of the flight the whole fleet reads; None for all.
            start: how many readings this device has had already.
        """
        self._data = data
        self._rows = data.stream[:max_rows][share.index :: share.devices]
        self._ordinal = start

    def __len__(self) -> int:
        """Return how many readings the device has in all."""
        return len(self._rows)

    def next(self, *, drifted: bool = False) -> SimReading | None:  # noqa: ARG002 - the protocol's
        if self._ordinal >= len(self._rows):
            return None
        row = int(self._rows[self._ordinal])
        self._ordinal += 1
        return _reading(self._data, row, f"{self._data.name}/{row}", self._data.values[row], drifted=False)


class CameraStream:
    """Endless shuffles of all streamed images, another order in every round and on every device."""

    def __init__(self, data: DataSet, *, seed: int, device: str, drift: Drift | None = None, start: int = 0) -> None:
        """Store what to read.

        Args:
            data: the images.
            seed: of the whole run.
            device: its node id.
            drift: what happens to a reading that is asked for drifted; None for the default.
            start: how many readings this device has had already.
        """
        self._data = data
        self._key = (seed, int.from_bytes(hashlib.sha256(device.encode()).digest()[:8]))
        self._drift = drift or Drift()
        self._ordinal = start
        self._round = -1
        self._order = data.stream

    def next(self, *, drifted: bool = False) -> SimReading:
        ordinal, self._ordinal = self._ordinal, self._ordinal + 1
        row = self._row(ordinal)
        values = self._data.values[row]
        if drifted:
            values = self._drift.apply(values, np.random.default_rng((*self._key, 1, ordinal)))
        return _reading(self._data, row, f"{self._data.name}/{row}/{ordinal}", values, drifted=drifted)

    def _row(self, ordinal: int) -> int:
        number, place = divmod(ordinal, len(self._data.stream))
        if number != self._round:
            self._order = np.random.default_rng((*self._key, 0, number)).permutation(self._data.stream)
            self._round = number
        return int(self._order[place])


def open_stream(
    kind: FleetKind,
    data: DataSet,
    *,
    seed: int,
    device: str,
    share: Share,
    max_rows: int | None = None,
    drift: Drift | None = None,
    start: int = 0,
) -> Stream:
    """Return what a device of this kind reads; arguments that its kind has no use for are ignored."""
    if kind is FleetKind.SENSORS:
        return SensorStream(data, share, max_rows=max_rows, start=start)
    return CameraStream(data, seed=seed, device=device, drift=drift, start=start)


class Truth:
    """What an annotator would find out by looking: the labels of references, from the data sets themselves."""

    def __init__(self, data_sets: Iterable[DataSet]) -> None:
        self._data_sets = {data.name: data for data in data_sets}

    def label_of(self, reference: str) -> int:
        """Return the class, or 1 for an anomaly.

        Raises:
            PayloadError: the reference names no row of the data sets.
        """
        data, row = self._locate(reference)
        return int(data.labels[row])

    def is_held_out(self, reference: str) -> bool:
        """Say whether the row must never be labelled.

        Raises:
            PayloadError: the reference names no row of the data sets.
        """
        data, row = self._locate(reference)
        return bool(data.held_out[row])

    def _locate(self, reference: str) -> tuple[DataSet, int]:
        match = _REFERENCE.fullmatch(reference)
        data = self._data_sets.get(match[1]) if match else None
        if match is None or data is None or int(match[2]) >= len(data.labels):
            raise PayloadError(f"{reference[:64]!r} names no row of {sorted(self._data_sets)}", field="reference")
        return data, int(match[2])


def _reading(data: DataSet, row: int, reference: str, values: NDArray[np.float32], *, drifted: bool) -> SimReading:
    return SimReading(
        row=row,
        reference=reference,
        values=values,
        label=int(data.labels[row]),
        held_out=bool(data.held_out[row]),
        drifted=drifted,
    )
