"""What a source yields and what the application hears back."""

from dataclasses import dataclass
from enum import Enum, unique

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading, in the sensor's own units.

    Attributes:
        values: any shape; a model's input schema says how it is laid out.
        captured_at_us: Unix time.
        reference: what the source calls it, for tracing it back.
    """

    values: NDArray[np.float32]
    captured_at_us: int
    reference: str = ""


@unique
class AnsweredBy(Enum):
    DEVICE = "device"
    GATEWAY = "gateway"
    # The gateway's too, which had answered the same reading before.
    CACHE = "cache"
    # Nothing changed, or no model: there is no new answer.
    NOBODY = "nobody"

    @property
    def is_gateways(self) -> bool:
        return self in (AnsweredBy.GATEWAY, AnsweredBy.CACHE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the application learns about one reading; asked ones are heard of twice, the gateway's answer last.

    Attributes:
        latency_s: from the first question to the reply; 0 for the device's own answers.
        reason: why it was kept or asked: `unchanged`, `below_threshold`, `score`, `audit`, ...
    """

    seq: int
    reference: str
    by: AnsweredBy
    release: int
    score: float
    label: int | None
    reason: str
    latency_s: float = 0.0
