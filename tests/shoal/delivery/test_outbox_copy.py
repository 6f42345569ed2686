"""A copied outbox numbers its own readings: two devices must never give one number to two readings."""

import logging
import shutil

import pytest

from shoal.delivery import place
from shoal.delivery.outbox import Item, Key, Outbox

pytestmark = pytest.mark.device


def first_of(path):
    """A store with one reading that waits, as its device left it; returns its epoch and reserved numbers."""
    box = Outbox(path)
    epoch, numbers = box.epoch("cam"), box.reserve_seqs("cam", 10)
    box.put(Item(Key("cam", epoch, 3), "digits", b"3"))
    box.close()
    return epoch, numbers


def test_copy_numbers_in_a_new_epoch_and_owes_what_it_holds_in_the_old(tmp_path, caplog):
    """The original goes on as if nothing had happened; numbers go on too, so that the application sees none twice."""
    original, copy = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    epoch, numbers = first_of(original)
    shutil.copy(original, copy)
    box = Outbox(copy)
    assert box.epoch("cam") != epoch
    assert len(box.epoch("cam")) == 16
    assert [(one.key, attempts) for one, attempts in box.take(0.0, 9, 1.0)] == [(Key("cam", epoch, 3), 1)]
    assert box.reserve_seqs("cam", 1)[0] == numbers.stop
    assert "copy" in caplog.text
    again = Outbox(original)
    assert again.epoch("cam") == epoch
    again.close()
    new = box.epoch("cam")
    box.close()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        reopened = Outbox(copy)
    assert (reopened.epoch("cam"), caplog.text) == (new, "")
    reopened.close()


def test_each_device_of_a_copied_store_gets_an_epoch_of_its_own(tmp_path):
    """A fleet of simulated devices shares a store."""
    box = Outbox(tmp_path / "a.sqlite")
    before = {box.epoch("cam"), box.epoch("mic")}
    box.close()
    shutil.copy(tmp_path / "a.sqlite", tmp_path / "b.sqlite")
    box = Outbox(tmp_path / "b.sqlite")
    assert len(before | {box.epoch("cam"), box.epoch("mic")}) == 4
    box.close()


def test_image_of_a_whole_disk_is_known_by_its_machine(tmp_path, monkeypatch):
    """Such a copy keeps the file's number, and even the machine-id; the hardware has another serial number."""
    epoch, _ = first_of(tmp_path / "a.sqlite")
    serial = tmp_path / "serial-number"
    serial.write_bytes(b"10000000abcdef01\0")
    monkeypatch.setattr(place, "_MACHINE", (*place._MACHINE, serial))
    box = Outbox(tmp_path / "a.sqlite")
    moved = box.epoch("cam")
    assert moved != epoch
    box.close()


def test_file_that_is_renamed_or_compacted_is_no_copy(tmp_path):
    """False alarms cost an epoch each, so what happens every day must raise none."""
    epoch, _ = first_of(tmp_path / "a.sqlite")
    (tmp_path / "a.sqlite").rename(tmp_path / "b.sqlite")
    box = Outbox(tmp_path / "b.sqlite")
    assert box.epoch("cam") == epoch
    box._store.db.execute("VACUUM")
    box.close()
    box = Outbox(tmp_path / "b.sqlite")
    assert box.epoch("cam") == epoch
    box.close()


def test_store_without_a_place_keeps_its_epoch(tmp_path):
    """It was made before there were places: nothing says that it is a copy."""
    epoch, _ = first_of(tmp_path / "a.sqlite")
    box = Outbox(tmp_path / "a.sqlite")
    box._store.db.execute("DROP TABLE places")
    box.close()
    box = Outbox(tmp_path / "a.sqlite")
    assert box.epoch("cam") == epoch
    box.close()
    shutil.copy(tmp_path / "a.sqlite", tmp_path / "b.sqlite")
    box = Outbox(tmp_path / "b.sqlite")
    assert box.epoch("cam") != epoch
    box.close()


def test_machine_that_says_nothing_of_itself_is_a_place_too(tmp_path, monkeypatch):
    """A container has no machine-id, and most machines no serial number that anybody may read."""
    monkeypatch.setattr(place, "_MACHINE", (tmp_path / "nothing", tmp_path))
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    assert place.place_of(tmp_path / "a") == place.place_of(tmp_path / "a") != place.place_of(tmp_path / "b")
