"""Drift of scores, on streams with and without it."""

import numpy as np
import pytest

from cloud.pipelines.drift import DriftWatch
from cloud.pipelines.file import Detector, DriftTrigger


def scores(rng, certain, count=1500):
    return (rng.beta(1, 9, count) if certain else rng.beta(3, 5, count)).tolist()


def feed(watch, release, values):
    for value in values:
        watch.update(release, value)
    return watch.drifted


@pytest.mark.parametrize("detector", [Detector.ADWIN, Detector.PAGE_HINKLEY])
def test_change_is_seen_and_sameness_is_not(detector):
    """On scores as devices have them before and after a camera was turned."""
    rng = np.random.default_rng(3)
    watch = DriftWatch(DriftTrigger(detector=detector))
    assert not feed(watch, 1, scores(rng, certain=True, count=3000))
    assert feed(watch, 1, scores(rng, certain=False))


@pytest.mark.parametrize("detector", list(Detector))
def test_new_release_begins_anew(detector):
    """It scores otherwise by right; what an older one says afterwards counts no more."""
    rng = np.random.default_rng(4)
    watch = DriftWatch(DriftTrigger(detector=detector))
    feed(watch, 1, scores(rng, certain=True, count=400))
    feed(watch, 1, scores(rng, certain=False))
    assert watch.drifted
    watch.update(2, 0.1)
    assert not watch.drifted
    assert not feed(watch, 1, scores(rng, certain=False))
