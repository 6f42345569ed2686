"""Boots, and how far a clock is trusted."""

import ctypes

import pytest

from device_agent.timekeeping import BORN, Timekeeper, count_boot, is_unsynced, kernel_boot_id, since_boot_us
from shoal.routes import Route
from shoal.v1.sensor_pb2 import TIME_QUALITY_SUSPECT, TIME_QUALITY_SYNCED, TIME_QUALITY_UNSYNCED

pytestmark = pytest.mark.device

BOOT = bytes(range(16))
GOOD = BORN.timestamp() + 1


def keeper(*, wall=GOOD, unsynced=False):
    return Timekeeper(BOOT, 3, wall_clock=lambda: wall, unsynced=lambda: unsynced, boot_clock=lambda: 5_000_000)


def test_boots_are_counted_once_each(tmp_path):
    """Pins that the count survives the process, and moves with the machine's boots and not with the agent's."""
    path = tmp_path / "boots"
    assert [count_boot(path, boot) for boot in (b"a", b"a", b"b", b"b", b"c")] == [1, 1, 2, 2, 3]


def test_damaged_count_begins_anew(tmp_path, caplog):
    """Pins that a file which a power cut spoiled keeps no device from starting; one spoiled copy costs nothing."""
    path = tmp_path / "boots"
    assert [count_boot(path, boot) for boot in (b"a", b"b")] == [1, 2]
    newest = max(tmp_path.glob("boots.*"), key=lambda copy: copy.read_bytes().split(b"\n")[1])
    newest.write_bytes(b"spoiled")
    assert count_boot(path, b"c") == 2
    for copy in tmp_path.glob("boots.*"):
        copy.write_bytes(b"spoiled")
    assert [count_boot(path, boot) for boot in (b"d", b"e")] == [1, 2]
    assert "counted anew" in caplog.text


@pytest.mark.parametrize(
    ("known", "suspect", "quality"),
    [
        (keeper(), False, TIME_QUALITY_SYNCED),
        (keeper(unsynced=True), False, TIME_QUALITY_UNSYNCED),
        (keeper(unsynced=True), True, TIME_QUALITY_SUSPECT),
        (keeper(), True, TIME_QUALITY_SUSPECT),
        (keeper(wall=0.0), False, TIME_QUALITY_SUSPECT),
        (keeper(wall=BORN.timestamp() - 1, unsynced=True), False, TIME_QUALITY_SUSPECT),
    ],
)
def test_clock_is_doubted_for_a_reason(known, suspect, quality):
    """Pins the order: what is proved wrong is SUSPECT, what nobody keeps is UNSYNCED."""
    assert known.quality(clock_suspect=suspect) == quality


def test_kernel_is_asked():
    """Pins the real sources: an id of 16 bytes that stays, a clock that moves, the same verdict as adjtimex's."""
    assert len(kernel_boot_id()) == 16
    assert kernel_boot_id() == kernel_boot_id()
    assert since_boot_us() < since_boot_us()
    assert is_unsynced() == (ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024)) == 5)


def test_doubtful_reading_says_when_it_was_since_the_boot(rig):
    """Pins what dates it later; a reading of a good clock carries no more than before."""
    rig.device.timekeeper = keeper(unsynced=True)
    rig.ask()
    rig.device.timekeeper = keeper()
    rig.ask(6.0)
    doubtful, good = (question.rows[0].reading for question in rig.questions)
    assert (doubtful.time_quality, doubtful.boot_id, doubtful.since_boot_us) == (TIME_QUALITY_UNSYNCED, BOOT, 5_000_000)
    assert (good.time_quality, good.boot_id, good.since_boot_us) == (TIME_QUALITY_SYNCED, b"", 0)


def test_state_has_the_pair_of_times(rig):
    """Pins the other half: wall clock and time since the boot, of one moment, and the boots that were seen."""
    rig.device.timekeeper = keeper()
    rig.step()
    (state,) = [message for route, message, *_ in rig.link.sent if route is Route.STATE]
    assert (state.boot_id, state.boot_count, state.since_boot_us) == (BOOT, 3, 5_000_000)
    assert state.time_quality == TIME_QUALITY_SYNCED
