"""Whether the scores that come up have changed. Never reads a clock; the detectors are river's.

Only scores of the audit share count: those readings are drawn from all, others come up because of their score.
"""

from typing import TYPE_CHECKING

from cloud.pipelines.file import Detector, DriftTrigger

if TYPE_CHECKING:
    from river.base import DriftDetector

_SEED = 1


class DriftWatch:
    """Feed it a model's scores in the order in which they came.

    A new release scores otherwise by right, so that it begins anew with the first score of a newer one.

    Attributes:
        drifted: the newest release's scores have changed since it began.

    Source: Bifet and Gavaldà, "Learning from Time-Changing Data with Adaptive Windowing" (ADWIN, 2007); Raab et al.,
    "Reactive Soft Prototype Computing" (KSWIN, 2020); Page, "Continuous Inspection Schemes" (1954), as in river.
    """

    def __init__(self, trigger: DriftTrigger) -> None:
        self.drifted = False
        self._trigger = trigger
        self._release = 0
        self._detector = _detector(trigger.detector)

    def update(self, release: int, score: float) -> None:
        """Learn one score; one of an older release says nothing of the newest."""
        if release < self._release:
            return
        if release > self._release:
            self._release = release
            self.drifted = False
            self._detector = _detector(self._trigger.detector)
        self._detector.update(score)
        self.drifted = self.drifted or self._detector.drift_detected


def _detector(kind: Detector) -> "DriftDetector":
    # Takes a second, which a trainer without this trigger need not wait.
    from river import drift  # noqa: PLC0415

    if kind is Detector.ADWIN:
        return drift.ADWIN()  # type: ignore[no-untyped-call]
    return drift.KSWIN(seed=_SEED) if kind is Detector.KSWIN else drift.PageHinkley()
