"""Two real releases and one retrained on drifted images, built once for all tests of the tool chain."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from cloud.tasks.base import LabelledSamples, Task, TrainingPlan
from cloud.tasks.datasets import digits_images, digits_stream
from cloud.tasks.vision import VisionTask
from shoal.v1 import release_pb2 as pb
from tests.cloud.toolchain import BuiltRelease, build_release, task_of

LABELLED = 300  # the fewest that the design promises to learn from


class BriefDigitsTask(VisionTask):
    """The real task, trained for too short a time to be good."""

    plans: Mapping[pb.Tier, TrainingPlan] = MappingProxyType(
        dict.fromkeys((pb.TIER_DEVICE, pb.TIER_GATEWAY), TrainingPlan(steps=36, batch_rows=64, learning_rate=4e-3))
    )


@pytest.fixture(scope="session")
def brief_task() -> Task:
    return BriefDigitsTask("digits", {"data": "digits"}, Path())


def drift(images: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Turn a camera by about 35 degrees, blur it, darken it: (n, 8, 8, 1) to the same."""
    drifted = np.empty_like(images)
    for index, image in enumerate(images[..., 0]):
        turned = ndimage.rotate(image, 35 + rng.uniform(-5, 5), reshape=False, order=1)
        blurred = ndimage.gaussian_filter(turned, 0.5)
        drifted[index, ..., 0] = np.clip(blurred * 0.6 + 2 + rng.normal(0, 0.3, blurred.shape), 0, 16)
    return drifted


@pytest.fixture(scope="session")
def drifted() -> LabelledSamples:
    """The fleet's whole stream of digits, drifted."""
    stream = digits_images().take(digits_stream())
    return LabelledSamples(drift(stream.x, np.random.default_rng(1)), stream.y)


@pytest.fixture(scope="session")
def labelled(drifted: LabelledSamples) -> LabelledSamples:
    """What came back from the field with labels."""
    return drifted.take(slice(LABELLED))


@pytest.fixture(scope="session")
def unseen(drifted: LabelledSamples) -> LabelledSamples:
    """What no training has seen."""
    return drifted.take(slice(LABELLED, None))


@pytest.fixture(scope="session")
def shuttle(tmp_path_factory: pytest.TempPathFactory) -> BuiltRelease:
    return build_release(task_of("shuttle"), tmp_path_factory.mktemp("shuttle"))


@pytest.fixture(scope="session")
def digits_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def digits(digits_workdir: Path) -> BuiltRelease:
    return build_release(task_of("digits"), digits_workdir)


@pytest.fixture(scope="session")
def retrained(digits: BuiltRelease, digits_workdir: Path, labelled: LabelledSamples) -> BuiltRelease:
    return build_release(task_of("digits"), digits_workdir, parent=digits, extra=labelled)
