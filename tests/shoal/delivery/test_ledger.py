from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.delivery.ledger import Books, Row, reconcile

pytestmark = pytest.mark.device

# What becomes of a row, and the counter that its device counts it in.
FATES = {
    "kept": "kept.below_threshold",
    "answered": "answered",
    "promised": "answered",
    "refused": "quarantined",
    "dropped": "dropped.outbox_full",
}


@dataclass
class Story:
    """The fate of every row, as a test wrote it."""

    fates: dict[Row, str]
    finite: bool = True

    def rows(self, *fates):
        return {row for row, fate in self.fates.items() if fate in fates}

    def books(self):
        """Witnesses that agree."""
        counters = defaultdict(Counter)
        for row, fate in self.fates.items():
            counters[row.device][FATES[fate]] += 1
            counters[row.device]["accepted"] += fate != "kept"
        produced = {row: f"row/{row.seq}" for row in self.fates}
        return Books(
            produced=produced,
            wanted=self.rows("answered", "promised", "refused", "dropped"),
            counters={device: dict(counted) for device, counted in counters.items()},
            asked=self.rows("answered", "promised", "refused"),
            answered=self.rows("answered", "promised"),
            refused=self.rows("refused"),
            promised=self.rows("promised"),
            stored=[(row, produced[row]) for row in sorted(self.rows("promised"))],
            expected={(row.device, text) for row, text in produced.items()} if self.finite else frozenset(),
        )


ROWS = st.builds(Row, st.sampled_from(["a", "b", "c"]), st.integers(0, 30))
STORIES = st.builds(
    Story, st.dictionaries(ROWS, st.sampled_from(sorted(FATES)), min_size=1, max_size=40), st.booleans()
)


@given(story=STORIES)
def test_witnesses_that_agree_leave_no_hole(story):
    """Pins that balanced books have no hole and that every row stands in exactly one column."""
    account = reconcile(story.books())
    assert account.named_holes == []
    assert account.holes == account.duplicates_stored == account.in_flight == account.lost_before_accept == 0
    assert account.produced == len(story.fates) == account.kept + account.accepted
    assert account.accepted == account.answered + account.dropped + account.quarantined
    assert account.kept == len(story.rows("kept"))
    assert account.answered == len(story.rows("answered", "promised"))
    assert account.quarantined == len(story.rows("refused"))
    assert account.samples_promised == account.samples_stored == len(story.rows("promised"))


def _without(books, name, entry):
    """The books with one entry of one witness gone."""
    column = getattr(books, name)
    if isinstance(column, dict):
        return replace(books, **{name: {key: value for key, value in column.items() if key != entry}})
    return replace(books, **{name: type(column)(item for item in column if item != entry)})


@pytest.mark.parametrize("name", ["produced", "wanted", "counters", "answered", "refused", "stored"])
@given(story=STORIES, data=st.data())
def test_one_entry_less_is_a_hole(name, story, data):
    """Pins that no witness can forget anything unnoticed while the others remember."""
    books = story.books()
    # A question that the outbox dropped was never on the wire: the record of its row is the only one there is.
    entries = books.asked if name == "wanted" else getattr(books, name)
    assume(entries)
    entry = data.draw(st.sampled_from(sorted(entries)))
    assert reconcile(_without(books, name, entry)).holes > 0


@given(story=STORIES, data=st.data())
def test_row_that_the_source_holds_and_nobody_read_is_a_hole(story, data):
    """Pins finite sources: what was never produced cannot be accounted for by anyone else."""
    books = replace(story.books(), expected={(row.device, f"row/{row.seq}") for row in story.fates})
    device = data.draw(st.sampled_from(["a", "b", "c"]))
    more = replace(books, expected=books.expected | {(device, "row/99")})
    assert reconcile(more).named_holes == [f"{device} never read row/99"]


@given(story=STORIES, data=st.data(), counter=st.sampled_from(["answered", "kept.below_threshold", "accepted"]))
def test_device_that_counts_too_much_is_a_hole(story, data, counter):
    """Pins that a device cannot claim more than source and wire have seen."""
    books = story.books()
    device = data.draw(st.sampled_from(sorted(books.counters)))
    counters = {**books.counters, device: Counter(books.counters[device]) + Counter({counter: 1})}
    account = reconcile(replace(books, counters=counters))
    assert account.holes > 0


def test_sample_that_is_stored_twice_is_counted_as_such():
    """Pins that a repeated delivery is no hole and no second sample."""
    books = Story({Row("a", 1): "promised", Row("a", 2): "promised"}).books()
    account = reconcile(replace(books, stored=[*books.stored, books.stored[0]]))
    assert (account.holes, account.samples_stored, account.duplicates_stored) == (0, 2, 1)


@pytest.mark.parametrize(
    ("stored", "hole"),
    [
        ((Row("a", 1), "row/9"), "a/1 is row/1 at the source and row/9 in the store"),
        ((Row("b", 7), "row/7"), "b/7 is in the store and no source yielded it"),
    ],
)
def test_sample_that_is_not_what_was_read_is_a_hole(stored, hole):
    """Pins that the store is compared with the source by content, not by number alone."""
    books = Story({Row("a", 1): "promised"}).books()
    kept = [pair for pair in books.stored if pair[0] != stored[0]]
    assert reconcile(replace(books, stored=[*kept, stored])).named_holes == [hole]


def test_sample_without_a_promise_is_welcome():
    """Pins the order on the wire: the store may have what the reply has not yet promised."""
    books = Story({Row("a", 1): "answered"}).books()
    account = reconcile(replace(books, stored=[(Row("a", 1), "row/1")]))
    assert (account.holes, account.samples_promised, account.samples_stored) == (0, 0, 1)


def test_sample_that_the_cloud_set_aside_is_accounted_for():
    """Pins that a quarantined sample excuses one missing promise, and only one."""
    books = Story({Row("a", 1): "promised", Row("a", 2): "promised"}).books()
    assert reconcile(replace(books, stored=books.stored[1:], set_aside=1)).holes == 0
    assert reconcile(replace(books, stored=[], set_aside=1)).holes == 1


def test_question_on_the_wire_that_no_source_gave_is_a_hole():
    """Pins that rows cannot come out of nowhere."""
    books = Story({Row("a", 1): "kept"}).books()
    account = reconcile(replace(books, asked={Row("a", 5)}))
    assert account.named_holes == ["a asked about 5, which its source never gave it"]


def test_row_read_twice_is_a_hole():
    """Pins that a source deals each row once, whatever number the device gave it."""
    books = Story({Row("a", 1): "kept", Row("a", 2): "kept"}).books()
    account = reconcile(replace(books, produced={Row("a", 1): "row/1", Row("a", 2): "row/1"}, expected=frozenset()))
    assert account.named_holes == ["a was given row/1 2 times"]


def test_question_that_is_still_open_is_in_flight_and_no_hole():
    """Pins that what a device owes is counted, not called lost."""
    books = Story({Row("a", 1): "answered", Row("a", 2): "kept"}).books()
    account = reconcile(replace(books, answered=set(), counters={"a": {"accepted": 1, "kept.x": 1}}))
    assert (account.in_flight, account.holes) == (1, 0)


def test_row_that_a_kill_took_is_lost_before_accept():
    """Pins that a reading which no counter knows is counted, not hidden."""
    books = Story({Row("a", 1): "answered", Row("a", 2): "kept"}).books()
    account = reconcile(replace(books, asked=set(), answered=set(), counters={"a": {"kept.x": 1}}))
    assert (account.lost_before_accept, account.accepted, account.holes) == (1, 0, 0)


def test_only_the_first_holes_are_named():
    """Pins that the count is whole and the list is short."""
    books = Story({Row("a", seq): "promised" for seq in range(50)}).books()
    account = reconcile(replace(books, stored=[]))
    assert account.holes == 50
    assert len(account.named_holes) == 20


def test_every_column_of_the_books_is_tried_here():
    """Pins that a new witness gets its tests."""
    assert {field.name for field in fields(Books)} == {
        *("produced", "expected", "wanted", "counters", "asked", "answered", "refused", "promised", "stored"),
        "set_aside",
    }
