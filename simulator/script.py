"""When a simulated device reads, when its world drifts, and when it has seen enough. Pure."""

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Phase(Enum):
    """Where a device is in its story."""

    # No model has arrived yet.
    WAITING = "waiting"
    BEFORE_DRIFT = "before_drift"
    AFTER_DRIFT = "after_drift"
    # A release newer than the one that the drift met is answering.
    AFTER_UPDATE = "after_update"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class ScriptConfig:
    """The story of one device, in readings.

    Attributes:
        readings_before: until the drift begins; without `drifts`, all there are.
        readings_after: with the newer release, until it is done.
        max_readings: a story that does not come to its end stops here.
    """

    readings_before: int
    drifts: bool = False
    readings_after: int = 0
    max_readings: int = 100_000


class Script:
    """Advances by what the device itself knows: how many readings it made, and which release is active."""

    def __init__(self, config: ScriptConfig) -> None:
        self._config = config
        self._readings = 0
        self._phase_readings = 0
        self._met_release = 0
        self.phase = Phase.WAITING

    def next(self, release: int) -> Phase:
        """The phase of the reading that is made now; DONE means make none."""
        before = self.phase
        self.phase = self._advance(release)
        if self.phase is not before:
            self._phase_readings = 0
        if self.phase not in (Phase.WAITING, Phase.DONE):
            self._readings += 1
            self._phase_readings += 1
        return self.phase

    def _advance(self, release: int) -> Phase:
        config, phase = self._config, self.phase
        if phase is Phase.WAITING:
            return Phase.BEFORE_DRIFT if release else phase
        if phase is Phase.DONE or self._readings >= config.max_readings:
            return Phase.DONE
        if phase is Phase.BEFORE_DRIFT and self._phase_readings >= config.readings_before:
            self._met_release = release
            return Phase.AFTER_DRIFT if config.drifts else Phase.DONE
        if phase is Phase.AFTER_DRIFT and release > self._met_release:
            return Phase.AFTER_UPDATE
        if phase is Phase.AFTER_UPDATE and self._phase_readings >= config.readings_after:
            return Phase.DONE
        return phase
