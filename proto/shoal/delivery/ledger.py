"""Closes the books: every reading that a source yielded is accounted for, and every promise was kept. Pure.

The sources' rows are the measure, not what devices say of themselves: a device's counters, the messages seen on the
wire and the cloud's store are three witnesses, and where they disagree there is a hole.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

# A report names the first of them; thousands more would say nothing new.
_NAMED_HOLES = 20


class Row(NamedTuple):
    """One row of a source, as its device numbered it."""

    device: str
    seq: int


@dataclass(frozen=True, slots=True)
class Books:
    """What each witness saw.

    Attributes:
        produced: the source: every row that a device was given, with the reference it bears.
        expected: where the source is finite, every (device, reference) that it holds; empty otherwise.
        wanted: the source's record of the rows that the device decided to ask about.
        counters: what each device says of itself: kept.*, accepted, answered, dropped.*, quarantined.
        asked: the wire: rows seen in questions.
        answered: the wire: rows whose reply says OK.
        refused: the wire: rows whose reply says that they never can be answered.
        promised: the wire: rows whose reply promises a sample.
        stored: the store: (row, reference) of every sample, repeated where it is stored twice.
        set_aside: samples that the cloud quarantined.
    """

    produced: Mapping[Row, str]
    wanted: AbstractSet[Row]
    counters: Mapping[str, Mapping[str, int]]
    asked: AbstractSet[Row]
    answered: AbstractSet[Row]
    refused: AbstractSet[Row]
    promised: AbstractSet[Row]
    stored: Iterable[tuple[Row, str]]
    set_aside: int = 0
    expected: AbstractSet[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Account:
    """The closed books.

    produced = kept + lost_before_accept + accepted, and accepted = answered + dropped + quarantined + in_flight.
    """

    produced: int
    kept: int
    lost_before_accept: int
    accepted: int
    answered: int
    dropped: int
    quarantined: int
    in_flight: int
    samples_promised: int
    samples_stored: int
    samples_set_aside: int
    duplicates_stored: int
    holes: int
    named_holes: list[str] = field(default_factory=list)


def reconcile(books: Books) -> Account:
    """Compare the witnesses, row by row where rows are known."""
    totals: Counter[str] = Counter()
    for counters in books.counters.values():
        for name, value in counters.items():
            totals[name.partition(".")[0]] += value
    accepted, answered = totals["accepted"], totals["answered"]
    dropped, quarantined = totals["dropped"], totals["quarantined"]
    in_flight = accepted - answered - dropped - quarantined
    lost = len(books.produced) - totals["kept"] - accepted
    stored = list(books.stored)
    holes = [
        *_source_holes(books),
        *_counter_holes(books, lost, in_flight),
        *_row_holes(books, dropped + in_flight + max(0, lost)),
        *_sample_holes(books, dict(stored)),
    ]
    return Account(
        produced=len(books.produced),
        kept=totals["kept"],
        lost_before_accept=lost,
        accepted=accepted,
        answered=answered,
        dropped=dropped,
        quarantined=quarantined,
        in_flight=in_flight,
        samples_promised=len(books.promised),
        samples_stored=len(dict(stored)),
        samples_set_aside=books.set_aside,
        duplicates_stored=len(stored) - len({(row.device, reference) for row, reference in stored}),
        holes=len(holes),
        named_holes=holes[:_NAMED_HOLES],
    )


def _source_holes(books: Books) -> list[str]:
    """A finite source was read whole, and no row of any source twice."""
    read = Counter((row.device, reference) for row, reference in books.produced.items())
    holes = [
        f"{device} was given {reference} {times} times" for (device, reference), times in read.items() if times > 1
    ]
    if books.expected:
        holes += [f"{device} never read {reference}" for device, reference in sorted(books.expected - read.keys())]
        holes += [
            f"{device} read {reference}, which is not its own"
            for device, reference in sorted(read.keys() - books.expected)
        ]
    return holes


def _counter_holes(books: Books, lost: int, in_flight: int) -> list[str]:
    """The devices' sums agree with the source and with the wire."""
    holes = []
    if lost < 0:
        holes.append(f"devices count {-lost} readings more than the source yielded")
    if in_flight < 0:
        holes.append(f"devices count {-in_flight} answers more than they accepted")
    answered = Counter(row.device for row in books.answered)
    for device, counters in sorted(books.counters.items()):
        counted = counters.get("answered", 0)
        if counted > answered[device]:
            holes.append(f"{device} counts {counted} answers, {answered[device]} were seen on the wire")
    missing = {row.device for row in books.produced} - books.counters.keys()
    return holes + [f"{device} never reported its counters" for device in sorted(missing)]


def _row_holes(books: Books, excused: int) -> list[str]:
    """Every row that a device meant to ask about was asked and settled, but for as many as are accounted for."""
    open_rows = sorted(books.wanted - books.answered - books.refused)
    strangers = sorted(books.asked - books.wanted)
    holes = [f"{row.device} asked about {row.seq}, which its source never gave it" for row in strangers]
    unasked = sorted((books.answered | books.refused) - books.asked)
    holes += [f"{row.device}/{row.seq} was answered, and nobody saw it asked" for row in unasked]
    unexplained = open_rows[: max(0, len(open_rows) - excused)]
    return holes + [f"{row.device}/{row.seq} was meant to be asked and was never answered" for row in unexplained]


def _sample_holes(books: Books, stored: Mapping[Row, str]) -> list[str]:
    """Every promise was kept, with the row that it was about."""
    missing = sorted(books.promised - stored.keys())
    holes = [f"{row.device}/{row.seq} was promised to the cloud and is not there" for row in missing[books.set_aside :]]
    for row, reference in sorted(stored.items()):
        if row in books.produced and books.produced[row] != reference:
            holes.append(f"{row.device}/{row.seq} is {books.produced[row]} at the source and {reference} in the store")
        elif row not in books.produced:
            holes.append(f"{row.device}/{row.seq} is in the store and no source yielded it")
    return holes
