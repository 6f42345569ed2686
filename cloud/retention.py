"""Which samples the store may let go of, and in which order. Pure.

Never: what a person labelled, what a model got wrong (a gate wants to see it again), and what came within `keep_us`.
The rest goes when it is older than `max_age_us`; and while the store holds more than `max_bytes`, the least worth
first, within the same worth what came first.

A store is swept a few rows at a time: once for each worth, from the first row on. A sweep that was cut off begins anew
and finds what is left.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, unique

_DAY_US = 86_400_000_000


@unique
class Worth(IntEnum):
    """What a sample is worth, the least first."""

    ROUTINE = 0
    """Nobody labelled it, and no answer contradicts another."""
    DISPUTED = 1
    """Nobody labelled it; device and gateway differ, so that a label would teach one of them."""
    LABELLED = 2
    """By a teacher or with the sample, as the models answered."""
    KEPT = 3
    """Labelled by a person, or labelled otherwise than a model answered: never dropped."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the store may hold. 0 is no limit.

    Attributes:
        keep_us: what came within this time is never dropped.
        max_age_us: since a sample came.
        max_bytes: of the whole file, but for pages that are free.
    """

    keep_us: int
    max_age_us: int
    max_bytes: int

    @classmethod
    def in_days(cls, keep_days: float, max_age_days: float, max_bytes: int) -> "Limits":
        return cls(int(keep_days * _DAY_US), int(max_age_days * _DAY_US), max_bytes)


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of a stored sample.

    Attributes:
        number: of its row; those that came first have the lowest.
        is_labelled: somebody said something of it.
        is_by_person: a person did.
        is_hard: it has a label, and a model answered something else.
        is_disputed: device and gateway answered different things.
    """

    number: int
    received_at_us: int
    size_bytes: int
    is_labelled: bool
    is_by_person: bool
    is_hard: bool
    is_disputed: bool

    @property
    def worth(self) -> Worth:
        if self.is_by_person or self.is_hard:
            return Worth.KEPT
        if self.is_labelled:
            return Worth.LABELLED
        return Worth.DISPUTED if self.is_disputed else Worth.ROUTINE


@dataclass(frozen=True, slots=True)
class Sweep:
    """How far the store has been gone through.

    Attributes:
        worth: what is dropped now for being too much; what is too old goes with the first.
        after: the number of the row that was looked at last.
        freed_bytes: in this sweep, where dropping is only pretended.
    """

    worth: Worth = Worth.ROUTINE
    after: int = 0
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Drops:
    """Numbers of rows to drop.

    Attributes:
        freed_bytes: that their readings take.
    """

    too_old: list[int]
    too_much: list[int]
    freed_bytes: int


def is_young(row: Row, now_us: int, limits: Limits) -> bool:
    return now_us - row.received_at_us < limits.keep_us


def choose_to_drop(rows: Iterable[Row], now_us: int, limits: Limits, worth: Worth, excess_bytes: int) -> Drops:
    """Choose among rows in the order in which they came.

    Args:
        rows: some of the store.
        now_us: Unix time.
        limits: what the store may hold.
        worth: which pass of a sweep this is.
        excess_bytes: what the store holds above `max_bytes`; not positive where it does not.
    """
    too_old: list[int] = []
    too_much: list[int] = []
    freed = 0
    for row in rows:
        if row.worth is Worth.KEPT or is_young(row, now_us, limits):
            continue
        if limits.max_age_us and now_us - row.received_at_us > limits.max_age_us:
            if worth is not Worth.ROUTINE:
                continue  # the first pass had it
            too_old.append(row.number)
        elif row.worth is worth and excess_bytes > freed:
            too_much.append(row.number)
        else:
            continue
        freed += row.size_bytes
    return Drops(too_old, too_much, freed)


def next_pass(sweep: Sweep, excess_bytes: int) -> Sweep | None:
    """Where to go on at the end of the store; None where the sweep is over."""
    following = Worth(sweep.worth + 1)
    if excess_bytes <= 0 or following is Worth.KEPT:
        return None
    return Sweep(following, 0, sweep.freed_bytes)
