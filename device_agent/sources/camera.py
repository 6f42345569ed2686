"""Cameras, through OpenCV."""

import logging
import threading
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from device_agent.readings import Reading
from device_agent.sources.feed import Feed, call_at_pace, now_us
from device_agent.sources.images import Framing, load_opencv
from shoal.errors import PayloadError
from shoal.loop import Timer

log = logging.getLogger(__name__)

_REOPEN_S = 5.0
# What a thread that hangs in a driver may hold up of the agent's end.
_JOIN_S = 1.0

Shot = tuple[NDArray[np.uint8], int]


class CameraSettings(Framing, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="camera", kw_only=True):
    """`kind = "camera"`: a camera's number, or a device, stream or video file that OpenCV can open."""

    device: int | str = 0
    rate_hz: Annotated[float, Meta(gt=0, le=100)] = 1.0


class CameraSource:
    """Takes the newest picture of a camera at its own pace; pictures in between are never seen.

    A thread of its own waits for the camera, because drivers and streams block for as long as they like.
    A camera that fails is opened again and again. `reference` is `camera:number`.
    """

    def __init__(self, settings: CameraSettings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._newest: list[Shot] = []
        self._thread: threading.Thread | None = None
        self._timer: Timer | None = None
        self._failures = 0
        self._told = 0
        self._count = 0

    def start(self, feed: Feed) -> None:
        cv2 = load_opencv("source camera")
        self._thread = threading.Thread(target=self._capture, args=(cv2,), name="camera", daemon=True)
        self._thread.start()
        self._timer = call_at_pace(feed, self._settings.rate_hz, lambda: self._poll(feed))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _poll(self, feed: Feed) -> None:
        if self._failures > self._told:
            self._told += 1
            raise PayloadError("it gives no picture", field=f"camera {self._settings.device}")
        if self._newest:
            pixels, at_us = self._newest.pop()
            self._count += 1
            feed.take(Reading(self._settings.frame(pixels), at_us, f"camera:{self._count}"))

    def _capture(self, cv2: Any) -> None:  # noqa: ANN401  loaded late
        """Keep the newest picture until told to stop; runs in the thread."""
        while not self._stopping.is_set():
            capture = cv2.VideoCapture(self._settings.device)
            try:
                while not self._stopping.is_set():
                    is_there, pixels = capture.read()
                    if not is_there:
                        break
                    self._newest[:] = [(np.atleast_3d(pixels)[:, :, ::-1], now_us())]  # it has blue first
            finally:
                capture.release()
            if not self._stopping.is_set():
                self._failures += 1
                log.warning("no picture camera=%s", self._settings.device)
                self._stopping.wait(_REOPEN_S)
