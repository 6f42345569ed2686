"""One direction of a connection as a schedule: which bytes may pass when. Never touches a socket, a thread or a clock.

`now` is seconds of one monotonic clock. Kept at all times, whatever the weather does:
- bytes leave in the order in which they came, none lost, none twice;
- at most `capacity_bytes` are under way; a full or blocked pipe offers no room, which is the back-pressure;
- a pace never lets more pass than it allows, and the end comes after the last byte.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

_PACKET_BYTES = 1500
_TICK_S = 0.001  # what a selector's timer resolves: waking for every byte would be a busy loop
_BURST_S = 0.01  # several ticks, so that a late timer does not cost throughput


@dataclass(frozen=True, slots=True)
class Weather:
    """What one direction does to its bytes; fair by default.

    Attributes:
        latency_s: from the moment the bytes are read until they may be passed on.
        rate_bytes_per_s: of each connection; None is no limit.
        is_blocked: nothing passes and nothing is lost, as in a partition that TCP outlives.
    """

    latency_s: float = 0.0
    rate_bytes_per_s: float | None = None
    is_blocked: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"latency {self.latency_s} s, expected 0 or more")
        rate = self.rate_bytes_per_s
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate {rate} bytes/s, expected more than 0")


class Pace(Protocol):
    """How many bytes may pass when: a token bucket, or the replay of a recorded link."""

    def allowance(self, now: float) -> float:
        """Return how many bytes may pass at once; infinite where nothing limits them."""

    def spend(self, count: int, now: float) -> None:
        """Take `count` bytes off the allowance.

        Raises:
            ValueError: it is smaller than that.
        """

    def next_at(self, now: float) -> float:
        """Return when, later than `now`, it is worth asking again after an allowance of less than one byte."""


class Unlimited:
    """The pace of a link that is never the bottleneck."""

    def allowance(self, now: float) -> float:  # noqa: ARG002 - the protocol's
        return math.inf

    def spend(self, count: int, now: float) -> None:
        """Do nothing."""

    def next_at(self, now: float) -> float:
        return math.nextafter(now, math.inf)


class TokenBucket:
    """At most `burst_bytes + rate * t` bytes in any span of t seconds. Starts full.

    Source: RFC 2697's single rate, without colours.
    """

    def __init__(self, rate_bytes_per_s: float, burst_bytes: int) -> None:
        if rate_bytes_per_s <= 0 or burst_bytes < 1:
            raise ValueError(
                f"{rate_bytes_per_s} bytes/s in bursts of {burst_bytes}, expected more than 0 and 1 or more"
            )
        self._rate = rate_bytes_per_s
        self._burst = float(burst_bytes)
        self._tokens = self._burst
        self._filled_at = -math.inf

    def allowance(self, now: float) -> float:
        if now > self._filled_at:
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
        return math.floor(self._tokens)

    def spend(self, count: int, now: float) -> None:
        if count > self.allowance(now):
            raise ValueError(f"{count} bytes, only {self._tokens:.0f} may pass")
        self._tokens -= count

    def next_at(self, now: float) -> float:
        return now + max(_TICK_S, (1.0 - self._tokens) / self._rate)


def pace_of(weather: Weather) -> Pace:
    """Return a fresh pace for a direction with this weather."""
    rate = weather.rate_bytes_per_s
    if rate is None:
        return Unlimited()
    return TokenBucket(rate, max(_PACKET_BYTES, math.ceil(rate * _BURST_S)))


class Pipe:
    """The bytes under way in one direction, then its end."""

    def __init__(self, weather: Weather, capacity_bytes: int) -> None:
        self._weather = weather
        self._pace = pace_of(weather)
        self._capacity = capacity_bytes
        self._chunks: deque[tuple[float, memoryview]] = deque()
        self._size = 0
        self._ends_at: float | None = None

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def room_bytes(self) -> int:
        """How much may be pushed now; 0 while blocked, so that a partition holds bytes where they were written."""
        return 0 if self._weather.is_blocked or self._ends_at is not None else self._capacity - self._size

    def set_weather(self, weather: Weather) -> None:
        """Change what happens from now on; bytes under way keep the arrival they were given."""
        if weather.rate_bytes_per_s != self._weather.rate_bytes_per_s:
            self._pace = pace_of(weather)
        self._weather = weather

    def push(self, data: bytes, now: float) -> None:
        """Take bytes in.

        Raises:
            ValueError: more than there is room for.
        """
        if len(data) > self.room_bytes:
            raise ValueError(f"{len(data)} bytes into a pipe with room for {self.room_bytes}")
        if data:
            self._chunks.append((now + self._weather.latency_s, memoryview(data)))
            self._size += len(data)

    def end(self, now: float) -> None:
        """Take the end of the stream in; it travels as bytes do."""
        self._ends_at = now + self._weather.latency_s

    def ready(self, now: float) -> memoryview:
        """Return bytes that may pass now, without taking them out; empty when there are none."""
        if not self._chunks or self._weather.is_blocked or self._chunks[0][0] > now:
            return memoryview(b"")
        chunk = self._chunks[0][1]
        return chunk[: int(min(len(chunk), self._pace.allowance(now)))]

    def passed(self, count: int, now: float) -> None:
        """Take out the first `count` bytes of what `ready` returned."""
        self._pace.spend(count, now)
        arrival, chunk = self._chunks.popleft()
        if count < len(chunk):
            self._chunks.appendleft((arrival, chunk[count:]))
        self._size -= count

    def is_over(self, now: float) -> bool:
        """Say whether the end has arrived, after the last byte."""
        has_arrived = self._ends_at is not None and self._ends_at <= now
        return has_arrived and not self._chunks and not self._weather.is_blocked

    def next_at(self, now: float) -> float | None:
        """Return when to look again without new bytes: `now` when something may pass at once, None for never."""
        arrival = self._chunks[0][0] if self._chunks else self._ends_at
        if arrival is None or self._weather.is_blocked:
            return None
        if arrival > now:
            return arrival
        if self._chunks and self._pace.allowance(now) < 1:
            return self._pace.next_at(now)
        return now
