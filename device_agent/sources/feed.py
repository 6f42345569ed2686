"""The protocol between sources and the agent, and the pace of those that are asked for readings."""

import time
from collections.abc import Callable
from typing import Protocol

from device_agent.readings import Reading
from shoal.errors import PayloadError
from shoal.loop import Loop, Timer

# What is left of a reference's 64 bytes holds a separator and any row number.
_NAME_BYTES = 40
# Above this the loop is not woken for each reading; and what one round may take, so that the sockets get their turn.
_MAX_ROUNDS_HZ = 100.0
_MAX_BURST = 256


class Feed(Protocol):
    """Where a source puts what it has; called on the loop's thread alone."""

    @property
    def loop(self) -> Loop: ...

    def take(self, reading: Reading) -> None: ...

    def refuse(self, error: PayloadError) -> None:
        """What came makes no reading: it is counted and left out, and no window spans it."""

    def gap(self) -> None:
        """What comes next does not follow what came before."""

    def end(self) -> None:
        """Nothing more will come."""


class Source(Protocol):
    """Feeds readings for as long as it has any. Never blocks the loop."""

    def start(self, feed: Feed) -> None:
        """Begin.

        Raises:
            ConfigError: what the settings name is not there. Later too, out of the loop.
        """

    def close(self) -> None: ...


def call_at_pace(feed: Feed, rate_hz: float, poll: Callable[[], None]) -> Timer:
    """Call `poll` so many times a second; what was missed is not made up for.

    `PayloadError` out of it is refused, anything else ends the loop. Beyond 25,600 Hz it is that.
    """
    rounds_hz = min(rate_hz, _MAX_ROUNDS_HZ)
    burst = min(_MAX_BURST, max(1, round(rate_hz / rounds_hz)))

    def go_round(_now: float) -> None:
        for _ in range(burst):
            if timer.cancelled:
                return
            try:
                poll()
            except PayloadError as exc:
                feed.refuse(exc)

    timer = feed.loop.call_every(1.0 / rounds_hz, go_round)
    return timer


def now_us() -> int:
    """The moment of capture, for sources whose readings name none."""
    return int(time.time() * 1e6)


def short_name(name: str) -> str:
    """The start of a name, cut in bytes, because that is what a reference is limited by."""
    return name.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")
