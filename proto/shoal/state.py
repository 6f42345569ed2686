"""Tells the fleet how a node is: at birth, when asked, and again at a jittered interval."""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.link import Link
from shoal.routes import Route
from shoal.v1.node_pb2 import ModelState, NodeState, UploadState
from shoal.v1.sensor_pb2 import TimeQuality

# DESIGN section 2: again at a jittered interval of at most 10 minutes.
MAX_INTERVAL_S = 600.0


@dataclass(frozen=True, slots=True)
class BootTime:
    """A moment on the clock that nobody sets: microseconds since a boot of the machine.

    Attributes:
        boot_id: as the kernel names it, 16 bytes.
        count: of the boots that this node's store has seen.
    """

    boot_id: bytes
    count: int
    since_boot_us: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of itself; counters are monotonic."""

    counters: Counter[str]
    models: Sequence[ModelState] = ()
    time_quality: TimeQuality = TimeQuality.TIME_QUALITY_SYNCED
    upload: UploadState | None = None
    boot: BootTime | None = None


def quality_of(*, clock_suspect: bool) -> TimeQuality:
    """The quality of a clock of which only signed metadata says anything."""
    return TimeQuality.TIME_QUALITY_SUSPECT if clock_suspect else TimeQuality.TIME_QUALITY_SYNCED


class StateReporter:
    """Publishes `NodeState` on the link's own state topic. Call `tick` at least once a second."""

    def __init__(
        self, link: Link, report: Callable[[], Report], *, interval_s: float = MAX_INTERVAL_S, rng: random.Random
    ) -> None:
        if not 0 < interval_s <= MAX_INTERVAL_S:
            raise ValueError(f"state interval {interval_s} s, expected more than 0 and at most {MAX_INTERVAL_S}")
        self._link = link
        self._report = report
        self._interval_s = interval_s
        self._rng = rng
        self._due: float | None = None
        link.on_connect(self.soon)
        self.soon()

    def soon(self) -> None:
        """Publish at the next tick."""
        self._due = None

    @property
    def is_due(self) -> bool:
        """A report was asked for and has not been published."""
        return self._due is None

    def tick(self, now: float) -> None:
        if not self._link.connected or (self._due is not None and now < self._due):
            return
        if self._publish():
            # Half to all of the interval: nodes that came back together do not stay together.
            self._due = now + self._interval_s * self._rng.uniform(0.5, 1.0)

    def _publish(self) -> bool:
        report = self._report()
        route, segments = self._link.identity.presence
        state = NodeState(
            at_us=int(time.time() * 1e6),
            role=self._link.identity.role,
            version=self._link.identity.version,
            counters=dict(report.counters),
            models=report.models,
            time_quality=report.time_quality,
            upload=report.upload,
        )
        if report.boot is not None:
            state.boot_id, state.boot_count = report.boot.boot_id, report.boot.count
            state.since_boot_us = report.boot.since_boot_us
        if route is Route.PRESENCE:
            return self._link.publish(Route.STATE, state, site=segments["site"], node=segments["node"])
        return self._link.publish(Route.CLOUD_STATE, state, service=segments["service"])
