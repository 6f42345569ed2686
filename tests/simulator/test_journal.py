from contextlib import closing
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.release.selftest import Outcome, Verdict
from shoal.v1.release_pb2 import Artefact
from simulator.journal import Entry, Journal, JournalReader
from simulator.selftest import SharedSelfTest

ENTRY = Entry(
    at=1_800_000_000.1234,
    event="read",
    device="cam-00",
    seq=1,
    reference="digits/7/1",
    phase="before_drift",
    label=3,
    held_out=1,
    reason="asked.score",
    release=2,
    score=0.125,
    predicted=3,
    latency_ms=4.5,
    bytes_json=300,
    bytes_json_compact=120,
)

TEXTS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20)
ENTRIES = st.builds(
    Entry,
    at=st.floats(0, 1e10),
    event=st.sampled_from(["read", "reply"]),
    device=TEXTS,
    seq=st.integers(0, 2**63),
    reference=TEXTS,
    phase=TEXTS,
    label=st.integers(0, 9),
    held_out=st.integers(0, 1),
    reason=TEXTS,
    release=st.integers(0, 99),
    score=st.floats(allow_nan=False),
    predicted=st.none() | st.integers(0, 9),
    latency_ms=st.floats(0, 1e6),
    bytes_json=st.integers(0, 9999),
    bytes_json_compact=st.integers(0, 9999),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cameras.csv"


def write(path, *entries):
    with closing(Journal(path)) as journal:
        for entry in entries:
            journal.write(entry)


def numbered(*seqs):
    return [replace(ENTRY, seq=seq) for seq in seqs]


@given(entries=st.lists(ENTRIES, max_size=8))
def test_what_is_written_is_read(tmp_path_factory, entries):
    """Every field of any entry comes back as it was, quotes, commas and infinities included."""
    path = tmp_path_factory.mktemp("journal") / "any.csv"
    write(path, *entries)
    assert list(JournalReader(path).new()) == entries


def test_file_is_a_table_for_people(path):
    """One line of names, one line for each entry, and an empty cell where nothing was predicted."""
    write(path, ENTRY, replace(ENTRY, predicted=None))
    header, first, second = path.read_text().splitlines()
    assert header.split(",") == [field.name for field in fields(Entry)]
    assert first.startswith("1800000000.1234,read,cam-00,1,digits/7/1,before_drift,3,1,asked.score,2,0.125,3,4.5,")
    assert ",0.125,,4.5," in second


def test_reader_sees_what_was_flushed_since_it_last_looked(path):
    """Each entry is returned once; before there is a file there is nothing."""
    reader = JournalReader(path)
    assert list(reader.new()) == []
    with closing(Journal(path)) as journal:
        journal.write(numbered(1)[0])
        journal.flush()
        assert list(reader.new()) == numbered(1)
        assert list(reader.new()) == []
        journal.write(numbered(2)[0])
        journal.flush()
        assert list(reader.new()) == numbered(2)


def test_line_arrives_whole_however_the_file_grows(path, tmp_path):
    """A buffer is flushed where it is full, in the middle of a line: the reader waits for the rest."""
    write(tmp_path / "whole.csv", *numbered(1, 2, 3))
    data = (tmp_path / "whole.csv").read_bytes()
    reader = JournalReader(path)
    found = []
    for index in range(len(data)):
        with path.open("ab") as file:
            file.write(data[index : index + 1])
        found += reader.new()
        lines = data[: index + 1].count(b"\n")
        assert found == numbered(1, 2, 3)[: max(0, lines - 1)]
    assert found == numbered(1, 2, 3)


def test_process_that_comes_back_goes_on_in_the_same_file(path):
    """The second process writes no second line of names."""
    write(path, *numbered(1))
    write(path, *numbered(2))
    assert list(JournalReader(path).new()) == numbered(1, 2)
    assert path.read_text().count("latency_ms") == 1


def test_line_that_a_kill_cut_short_costs_only_itself(path):
    """Wherever it was cut, the lines before it and those of the next process are read, also by who saw half of it."""
    write(path, *numbered(1, 2))
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        reader = JournalReader(path)
        seen = list(reader.new())
        write(path, *numbered(3, 4))
        expected = numbered(1, 3, 4)
        assert [*seen, *reader.new()] == list(JournalReader(path).new()) == expected


def test_quote_left_open_by_a_kill_swallows_nothing(path):
    """A cut within a quoted cell does not reach into the next line."""
    write(path, replace(ENTRY, reference='a,"b'))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b'"') + 2])
    write(path, *numbered(1, 2))
    assert list(JournalReader(path).new()) == numbered(1, 2)


# -- self-tests that devices share -------------------------------------------------------------------------------------


class FakeTester:
    """Starts trials that give their verdicts when a test says so."""

    def __init__(self):
        self.trials = []

    def start(self, *_):
        self.trials.append(FakeTrial())
        return self.trials[-1]


class FakeTrial:
    def __init__(self):
        self.verdict = None
        self.polls = 0
        self.is_cancelled = False

    def poll(self, _now):
        assert not self.is_cancelled
        self.polls += 1
        return self.verdict

    def cancel(self):
        self.is_cancelled = True


def test_one_self_test_speaks_for_all_devices(tmp_path):
    """An artefact is tested once, its verdict is asked for once, and another artefact is another test."""
    tester = FakeTester()
    shared = SharedSelfTest(tester)
    tickets = [shared.start(tmp_path / name, Artefact(sha256=b"a"), 0.0) for name in ("1", "2", "3")]
    shared.start(tmp_path / "1", Artefact(sha256=b"b"), 0.0)
    assert len(tester.trials) == 2
    assert [ticket.poll(1.0) for ticket in tickets] == [None] * 3
    verdict = tester.trials[0].verdict = Verdict(Outcome.FAILED, "off by 3")
    polls = tester.trials[0].polls
    assert [ticket.poll(2.0) for ticket in tickets] == [verdict] * 3
    assert shared.start(tmp_path / "4", Artefact(sha256=b"a"), 3.0).poll(3.0) == verdict
    assert tester.trials[0].polls == polls + 1


def test_device_that_gives_up_leaves_the_test_to_the_others(tmp_path):
    """Cancelling is one device's; closing ends what is under way, and only that."""
    tester = FakeTester()
    shared = SharedSelfTest(tester)
    first, second = (shared.start(tmp_path, Artefact(sha256=b"a"), 0.0) for _ in range(2))
    first.cancel()
    tester.trials[0].verdict = Verdict(Outcome.PASSED)
    assert second.poll(1.0) == Verdict(Outcome.PASSED)
    shared.start(tmp_path, Artefact(sha256=b"b"), 0.0)
    shared.close()
    assert [trial.is_cancelled for trial in tester.trials] == [False, True]
