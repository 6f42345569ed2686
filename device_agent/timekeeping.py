"""How far this machine's clock can be trusted, and what dates a reading that it dated wrongly.

A boot of the machine has an id of the kernel's and a clock that nobody sets. A reading whose time is doubtful carries
both; once the clock is right, the device's state has a pair of times of the same boot, and so the reading can be dated.
"""

import ctypes
import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from shoal.release.durable import CheckedFile, DamagedError
from shoal.state import BootTime
from shoal.v1.sensor_pb2 import TimeQuality

log = logging.getLogger(__name__)

# Older than any release of Shoal: a clock that stands before it was never set.
BORN = datetime(2026, 1, 1, tzinfo=UTC)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Source: adjtimex(2). More bytes than any `struct timex`; all zero, it asks and sets nothing.
_TIMEX_BYTES = 512
_TIME_ERROR = 5


def kernel_boot_id() -> bytes:
    """The id of this boot, 16 bytes; empty where the kernel tells none."""
    try:
        return uuid.UUID(_BOOT_ID.read_text(encoding="ascii").strip()).bytes
    except (OSError, ValueError):
        return b""


def since_boot_us() -> int:
    """Microseconds since the boot, those asleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def is_unsynced() -> bool:
    """Whether the kernel says that nobody keeps its clock; False where it cannot be asked."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    return adjtimex is not None and adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) == _TIME_ERROR


def count_boot(path: Path, boot_id: bytes) -> int:
    """How many boots of the machine this store has seen, this one included; durable before it returns.

    A store that is damaged begins anew.
    """
    file = CheckedFile(path)
    try:
        body = file.load()
    except DamagedError as exc:
        log.warning("boots are counted anew: %s", exc)
        body = None
    known_id, _, known_count = (body or b" 0").decode().partition(" ")
    if known_id == boot_id.hex():
        return int(known_count)
    count = int(known_count) + 1
    entry = f"{boot_id.hex()} {count}".encode()
    if body is None:
        file.begin(entry)
    else:
        file.save(entry)
    return count


class Timekeeper:
    """Judges the clock each time that it is asked.

    Args:
        boot_id: of this boot.
        count: `count_boot` of it.
    """

    def __init__(
        self,
        boot_id: bytes,
        count: int,
        *,
        wall_clock: Callable[[], float] = time.time,
        unsynced: Callable[[], bool] = is_unsynced,
        boot_clock: Callable[[], int] = since_boot_us,
    ) -> None:
        self._boot_id = boot_id
        self._count = count
        self._wall_clock = wall_clock
        self._unsynced = unsynced
        self._boot_clock = boot_clock

    def quality(self, *, clock_suspect: bool) -> TimeQuality:
        """`clock_suspect`: signed metadata proves that the clock stands in the past."""
        if clock_suspect or self._wall_clock() < BORN.timestamp():
            return TimeQuality.TIME_QUALITY_SUSPECT
        return TimeQuality.TIME_QUALITY_UNSYNCED if self._unsynced() else TimeQuality.TIME_QUALITY_SYNCED

    def now(self) -> BootTime:
        return BootTime(self._boot_id, self._count, self._boot_clock())
