"""When each boot of a device began, and so when the readings were taken that it dated by a clock that was wrong.

A device whose clock nobody keeps says with each reading which boot of its machine it runs in and how long ago that
began; its state says the same, and once the clock is right, what the time is. Both together date the reading.
"""

import sqlite3
from collections import OrderedDict

from shoal.v1.node_pb2 import NodeState
from shoal.v1.sensor_pb2 import TimeQuality

# Boots whose beginning need not be written again; a fleet's, many times over.
_REMEMBERED = 65_536
_BOOT_ID_BYTES = 16
# Sums of two of these are integers to SQLite still.
_LATEST_US = 1 << 61
_NOTE = """
INSERT INTO boots VALUES (?, ?, ?) ON CONFLICT (boot_id) DO UPDATE
  SET began_at_us = excluded.began_at_us, is_exact = excluded.is_exact
  WHERE excluded.is_exact > is_exact OR (NOT is_exact AND excluded.began_at_us < began_at_us)
"""


def is_boot(boot_id: bytes, since_us: int) -> bool:
    """Whether a peer's bytes and number can be a boot and the time since."""
    return len(boot_id) == _BOOT_ID_BYTES and since_us <= _LATEST_US


class Boots:
    """The table `boots` and the view `dated_samples`, whose `dated_at_us` is the best that is known.

    From a state whose clock is right a boot is dated exactly. Until there is one, the earliest arrival counts: the
    message cannot have left before the boot began, and the quickest one was on its way for the shortest time.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._known: OrderedDict[bytes, tuple[bool, int]] = OrderedDict()

    def note(self, state: NodeState, received_at_us: int, *, retained: bool) -> None:
        """Learn from a device's state; one that is retained says nothing by when it arrives."""
        is_exact = state.time_quality == TimeQuality.TIME_QUALITY_SYNCED
        if not is_boot(state.boot_id, state.since_boot_us) or (retained and not is_exact):
            return
        began_at_us = (state.at_us if is_exact else received_at_us) - state.since_boot_us
        if abs(began_at_us) > _LATEST_US:
            return
        was_exact, known_at_us = self._known.get(state.boot_id, (False, None))
        if was_exact or (known_at_us is not None and not is_exact and began_at_us >= known_at_us):
            return
        self._known[state.boot_id] = is_exact, began_at_us
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        self._db.execute(_NOTE, (state.boot_id, began_at_us, is_exact))
