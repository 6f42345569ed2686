"""A function of the application's own."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from device_agent.readings import Reading
from device_agent.sources.feed import Feed, call_at_pace, now_us
from shoal.errors import PayloadError
from shoal.loop import Timer

Sensor = Callable[[], Reading | NDArray[np.float32] | Sequence[float] | float | None]


class CallSource:
    """Calls a function for each reading.

    It runs on the agent's loop, so it must return soon. Its errors are the application's and end the agent.

    Args:
        sensor: returns a `Reading`, an array or numbers; None where it has nothing now. StopIteration ends the source.
        rate_hz: how often it is called.
    """

    def __init__(self, sensor: Sensor, rate_hz: float = 1.0) -> None:
        if not rate_hz > 0:
            raise ValueError(f"rate_hz {rate_hz} must be positive")
        self._sensor = sensor
        self._rate_hz = rate_hz
        self._timer: Timer | None = None

    def start(self, feed: Feed) -> None:
        def poll() -> None:
            try:
                found = self._sensor()
            except StopIteration:
                self.close()
                feed.end()
                return
            if found is not None:
                feed.take(found if isinstance(found, Reading) else Reading(_array(found), now_us()))

        self._timer = call_at_pace(feed, self._rate_hz, poll)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _array(found: object) -> NDArray[np.float32]:
    try:
        return np.atleast_1d(np.asarray(found, dtype=np.float32))
    except (ValueError, TypeError) as exc:
        raise PayloadError(str(exc), field="source") from exc
