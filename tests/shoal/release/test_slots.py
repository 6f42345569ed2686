"""The slot state machine, driven at random, and the store that keeps it."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.errors import ModelError
from shoal.release.chunks import Assembler, digest, manifest_of
from shoal.release.slot_store import SlotStore
from shoal.release.slots import TRANSITIONS, TRIES, Content, Event, Phase, Slot, Slots

pytestmark = pytest.mark.device


def keep(store: SlotStore, artefact: bytes, spec: bytes) -> None:
    """As an install does: the artefact by its chunks, then both admitted."""
    staging = store.stage(digest(artefact), spec, Assembler(manifest_of(artefact)))
    assert staging.accept(digest(artefact), artefact)
    store.recognise(staging.sha256, store.admit(staging))


def content(number: int) -> Content:
    return Content(number, digest(b"artefact %d" % number), digest(b"spec %d" % number))


def confirmed(number: int, slots: Slots = Slots()) -> Slots:  # noqa: B008  frozen
    return slots.write(content(number)).attempt().pass_test().confirm()


def test_table_is_complete_and_literal():
    """Every pair of phase and event either is in the table or raises and changes nothing."""
    for phase in Phase:
        for event in Event:
            slot = Slot(phase)
            if (phase, event) in TRANSITIONS:
                assert slot.after(event).phase is TRANSITIONS[phase, event]
            else:
                with pytest.raises(RuntimeError, match=phase.value):
                    slot.after(event)


STEPS = ["write", "attempt", "pass_test", "confirm", "fail_0", "fail_1", "drop_0", "drop_1", "switch", "excuse"]


class SlotsMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.slots = Slots()
        self.refused: set[bytes] = set()

    @rule(step=st.sampled_from(STEPS), number=st.integers(1, 4))
    def step(self, step, number):
        before = self.slots
        try:
            if step == "write":
                self.slots = before.write(content(number))
                assert content(number).sha256 not in self.refused
                assert not before.on_probation
                assert before.running == self.slots.running
            elif step.startswith("fail"):
                index = int(step[-1])
                self.slots = before.fail(index, "why")
                self.refused.add(before.pair[index].content.sha256)
            elif step.startswith("drop"):
                self.slots = before.drop(int(step[-1]))
            else:
                self.slots = getattr(before, step)()
        except RuntimeError:
            assert self.slots is before

    @invariant()
    def what_runs_is_on_probation_or_confirmed(self):
        running = self.slots.running
        assert running is None or running.phase in (Phase.PROBATION, Phase.CONFIRMED)
        for index, slot in enumerate(self.slots.pair):
            if slot.phase is Phase.PROBATION:
                assert self.slots.active == index

    @invariant()
    def a_refused_digest_never_runs_or_waits(self):
        for slot in self.slots.pair:
            if slot.phase in (Phase.WRITTEN, Phase.PROBATION):
                assert slot.content.sha256 not in self.refused
            assert 0 <= slot.tries_left <= TRIES

    @invariant()
    def something_confirmed_is_never_left_idle_without_a_running_model(self):
        if self.slots.active is None:
            assert all(slot.phase is not Phase.CONFIRMED for slot in self.slots.pair)


TestSlotsMachine = SlotsMachine.TestCase
TestSlotsMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_failed_probation_falls_back_and_blocks_the_digest():
    """The whole point of two slots."""
    slots = confirmed(1).write(content(2)).attempt().pass_test()
    assert slots.running is not None
    assert slots.running.content == content(2)
    slots = slots.fail(slots.active, "worse")
    assert slots.running.content == content(1)
    assert slots.is_refused(content(2))
    assert slots.is_refused(Content(3, content(2).sha256, b"another spec"))
    with pytest.raises(RuntimeError, match="refused before"):
        slots.write(content(2))


def test_twin_on_probation_ends_with_the_artefact_that_is_refused():
    """The same bytes under another release are the same bytes: what is refused does not go on running on trial."""
    slots = confirmed(1)
    twin = Content(2, content(1).sha256, b"another spec")
    slots = slots.write(twin).attempt().pass_test()
    slots = slots.fail(1 - slots.active, "worse")
    assert slots.running is None
    assert slots.is_refused(twin)


def test_spare_is_not_overwritten_while_it_is_the_way_back():
    """A third release waits until the second is confirmed or gone."""
    slots = confirmed(1).write(content(2)).attempt().pass_test()
    with pytest.raises(RuntimeError, match="probation"):
        slots.write(content(3))
    slots.confirm().write(content(3))


def test_tries_run_out():
    """Counted down before the attempt, so that a crash counts."""
    slots = Slots().write(content(1))
    for _ in range(TRIES):
        slots = slots.attempt()
    with pytest.raises(RuntimeError, match="no tries"):
        slots.attempt()


def test_switch_during_probation_leaves_the_digest_unblamed():
    """A plan that goes back early says nothing against the model."""
    slots = confirmed(1).write(content(2)).attempt().pass_test().switch()
    assert slots.running.content == content(1)
    assert not slots.is_refused(content(2))


def test_store_returns_what_was_saved(tmp_path: Path):
    """Through JSON and back, refusals included."""
    store = SlotStore(tmp_path)
    slots = store.open()
    slots = confirmed(1, slots).write(content(2)).fail(1, "no: ümlaut")
    store.save(slots)
    assert SlotStore(tmp_path).open() == slots


@pytest.mark.parametrize("keep", [0, 1, 40, 100])
@pytest.mark.parametrize("copy", ["state.a", "state.b"])
def test_torn_state_copy_falls_back_to_the_other(tmp_path: Path, copy: str, keep: int):
    """Either copy may be torn by a power cut: the store opens with the newest whole one."""
    store = SlotStore(tmp_path)
    old, new = confirmed(1, store.open()), confirmed(2, confirmed(1))
    store.save(old)
    store.save(new)
    path = tmp_path / copy
    path.write_bytes(path.read_bytes()[:keep])
    assert SlotStore(tmp_path).open() == (new if copy == "state.a" else old)


def test_lost_state_starts_empty_and_says_so(tmp_path: Path, caplog):
    """Both copies damaged: the model is fetched again, nobody is stuck."""
    store = SlotStore(tmp_path)
    store.open()
    store.save(confirmed(1))
    store.save(confirmed(1))
    for name in ("state.a", "state.b"):
        (tmp_path / name).write_bytes(b"rubbish")
    assert SlotStore(tmp_path).open() == Slots()
    assert "slots are lost" in caplog.text


def test_save_sweeps_files_that_no_slot_names(tmp_path: Path):
    """Files leave only after the state has stopped naming them."""
    store = SlotStore(tmp_path)
    store.open()
    for number in (2, 1):
        keep(store, b"artefact %d" % number, b"spec %d" % number)
    store.save(confirmed(1))
    assert store.load(digest(b"artefact 1")) == b"artefact 1"
    assert store.load(digest(b"artefact 2")) is None


def test_damaged_file_is_not_loaded(tmp_path: Path):
    """A digest is asked for, so a digest is checked."""
    store = SlotStore(tmp_path)
    store.open()
    keep(store, b"data", b"spec")
    assert store.has(digest(b"data"))
    store.path(digest(b"data")).write_bytes(b"dataa")
    assert store.load(digest(b"data")) is None
    assert not store.has(digest(b"data"))
    assert not SlotStore(tmp_path).has(digest(b"data"))


def test_same_size_damage_is_seen_at_the_next_start(tmp_path: Path):
    """What was hashed in this process is looked at only; a start believes nothing."""
    store = SlotStore(tmp_path)
    store.open()
    keep(store, b"data", b"spec")
    found = store.path(digest(b"data")).stat()
    store.path(digest(b"data")).write_bytes(b"date")
    os.utime(store.path(digest(b"data")), ns=(found.st_atime_ns, found.st_mtime_ns))
    assert not SlotStore(tmp_path).has(digest(b"data"))


def test_file_that_cannot_be_synced_is_not_believed(tmp_path: Path, monkeypatch):
    """After a failed fsync the kernel takes the pages for written: only fetching again helps."""
    store = SlotStore(tmp_path)
    store.open()

    def fail(_handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        keep(store, b"data", b"spec")
    assert not store.has(digest(b"data"))


def test_first_save_that_was_cut_short_lost_nothing(tmp_path: Path, caplog):
    """Both copies are there from the first start on, so that no save makes a name, and one of them is always whole."""
    store = SlotStore(tmp_path)
    store.open()
    (tmp_path / "state.a").write_bytes(b"half a rec")
    assert SlotStore(tmp_path).open() == Slots()
    assert not caplog.records


def test_chunks_that_make_another_file_are_refused(tmp_path: Path):
    """Each chunk may be right and the whole still not what was signed."""
    store = SlotStore(tmp_path)
    store.open()
    staging = store.stage(digest(b"what was signed"), b"spec", Assembler(manifest_of(b"abcd", 2)))
    assert not staging.accept(digest(b"ab"), b"ab")
    assert staging.accept(digest(b"cd"), b"cd")
    with pytest.raises(ModelError, match="another file"):
        store.admit(staging)
    assert store.load(digest(b"abcd")) is None


def test_damaged_copy_is_the_one_that_is_written_over(tmp_path: Path):
    """However old the whole copy is, even the first of all: it stands until the new one does."""
    SlotStore(tmp_path).open()
    first = (tmp_path / "state.a").read_bytes()
    (tmp_path / "state.b").write_bytes(b"rubbish")
    store = SlotStore(tmp_path)
    store.open()
    store.save(confirmed(1))
    assert (tmp_path / "state.a").read_bytes() == first
    assert store.open() == confirmed(1)
