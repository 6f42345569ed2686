"""Differential upload, the third part: caps that hold in any minute and any day. Time is passed in."""

import math

_SLOTS = 60
# How often the pace is looked at, and how long it is remembered: an hour tells day from night and outlives a burst.
_LOOK_S = 10.0
_MEMORY_S = 3600.0


class Cap:
    """At most `limit` in any span of `period_s`, as a sum over slots: a sixtieth of the period each.

    A token bucket of this size would let almost twice as much through a period that begins when it is full. What
    was spent leaves the sum when the slot's last moment is a whole period ago, so what can be kept up is
    `lasting` a second, a little less than limit / period.
    """

    def __init__(self, limit: int, period_s: float) -> None:
        self._limit = limit
        self._slot_s = period_s / _SLOTS
        self._slots = [0] * (_SLOTS + 1)
        self._spent = 0
        self._slot: int | None = None

    @property
    def lasting(self) -> float:
        return self._limit / (self._slot_s * (_SLOTS + 1))

    def fits(self, cost: int, now: float) -> bool:
        """Whether `cost` may be spent now. A clock that stands still or steps back frees nothing."""
        slot = math.floor(now / self._slot_s)
        if self._slot is None or slot > self._slot:
            self._free(slot)
        return self._spent + cost <= self._limit

    def spend(self, cost: int) -> None:
        """Book what `fits` has just allowed."""
        if self._slot is None:
            raise RuntimeError("nothing was asked to fit yet")
        self._slots[self._slot % len(self._slots)] += cost
        self._spent += cost

    def _free(self, slot: int) -> None:
        passed = len(self._slots) if self._slot is None else min(slot - self._slot, len(self._slots))
        for number in range(slot - passed + 1, slot + 1):
            place = number % len(self._slots)
            self._spent -= self._slots[place]
            self._slots[place] = 0
        self._slot = slot


class Pace:
    """How many readings come and how many are asked, lately: both are forgotten over an hour."""

    def __init__(self) -> None:
        self._readings = 0.0
        self._asked = 0.0
        self._seconds = 0.0
        self._untimed = 0
        self._since: float | None = None

    def count(self, now: float) -> bool:
        """Take note of a reading. True a few times a minute: `per_second` is new."""
        self._untimed += 1
        since = self._since
        if since is None:
            self._since = now
            return False
        if now - since < _LOOK_S:
            return False
        keep = math.exp(-(now - since) / _MEMORY_S)
        self._seconds = self._seconds * keep + now - since
        self._readings = self._readings * keep + self._untimed
        self._asked *= keep
        self._untimed = 0
        self._since = now
        return True

    def count_asked(self) -> None:
        self._asked += 1.0

    @property
    def per_second(self) -> float:
        """Readings a second; 0 while too little time has passed to tell."""
        return self._readings / self._seconds if self._seconds else 0.0

    @property
    def asked_share(self) -> float:
        """Of the readings of the last hour or so."""
        readings = self._readings + self._untimed
        return min(1.0, self._asked / readings) if readings else 0.0
