"""The camera's thread, with a video file as the camera."""

import sys

import numpy as np
import pytest

from device_agent.sources.camera import CameraSettings, CameraSource
from shoal.errors import ConfigError

pytestmark = pytest.mark.device


def test_pictures_of_a_video_come_framed(tmp_path, feed):
    """Pins the way from OpenCV to a reading: red is red, size and grey as set, and who takes none is told."""
    cv2 = pytest.importorskip("cv2", reason="left out: needs shoal[camera]")
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 16))
    for _ in range(30):
        writer.write(np.full((16, 32, 3), (10, 60, 220), np.uint8))  # blue first
    writer.release()
    source = CameraSource(CameraSettings(device=str(path), rate_hz=100.0, size=(4, 8)))
    feed.serve(source, until=lambda: feed.readings and feed.refused)
    assert feed.readings[0].reference == "camera:1"
    assert feed.readings[0].values.shape == (4, 8, 3)
    assert feed.readings[0].values.mean(axis=(0, 1)) == pytest.approx([220, 60, 10], abs=8)
    assert feed.refused[0] == f"camera {path}: it gives no picture"


def test_missing_library_says_what_to_install(feed, monkeypatch):
    """Pins the extra's name."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"source camera needs OpenCV: pip install 'shoal\[camera\]'"):
        CameraSource(CameraSettings()).start(feed)
