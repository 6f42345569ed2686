"""Pictures in files: one, or a directory of them."""

import os
import sys
import time
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from device_agent import png
from device_agent.inputs import MAX_PIXELS
from device_agent.pictures import resize, with_channels
from device_agent.readings import Reading
from device_agent.sources.feed import Feed, call_at_pace, now_us, short_name
from shoal.errors import ConfigError, PayloadError
from shoal.loop import Timer

_MAX_FILE_BYTES = 16 << 20
# Names read ahead of a directory; a longer one is listed again when these are done.
_MAX_LISTED = 10_000
# A file this young is left for later: its writer may be at it, and others of the same instant may still come.
_SETTLE_NS = 200_000_000

_Pixel = Annotated[int, Meta(gt=0, le=4096)]
Place = tuple[int, str]


class Framing(msgspec.Struct, frozen=True):
    """What pictures of any origin are made into before anything else sees them.

    Attributes:
        size: height and width; none leaves them as they are.
        grey: one channel instead of red, green and blue.
    """

    size: tuple[_Pixel, _Pixel] | None = None
    grey: bool = False

    def frame(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, channels), 0 to 255."""
        if not 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS:
            raise PayloadError(f"{pixels.shape[1]}x{pixels.shape[0]}, at most {MAX_PIXELS} pixels", field="size")
        picture = pixels.astype(np.float32)
        if self.grey:
            picture = with_channels(picture, 1)
        return picture if self.size is None else resize(picture, *self.size)


class ImagesSettings(Framing, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="images", kw_only=True):
    """`kind = "images"`: a file, or the files of a directory in the order in which they came."""

    path: str
    pattern: str = "*"
    rate_hz: Annotated[float, Meta(gt=0, le=100)] = 1.0
    follow: bool = False


class ImagesSource:
    """Reads what OpenCV can where that is installed, otherwise small PNG, PGM and PPM files.

    With `follow` it waits for files to come; move them in, so that none is read half written. `reference` is the
    file's name.
    """

    def __init__(self, settings: ImagesSettings) -> None:
        self._settings = settings
        self._path = Path(settings.path)
        self._waiting: list[Place] = []
        self._last: Place = (-1, "")
        self._opencv: Any = None
        self._timer: Timer | None = None

    def start(self, feed: Feed) -> None:
        if not self._path.exists():
            raise ConfigError(f"source {self._path}: No such file or directory")
        with suppress(ConfigError):
            self._opencv = load_opencv("")
        self._timer = call_at_pace(feed, self._settings.rate_hz, lambda: self._poll(feed))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _poll(self, feed: Feed) -> None:
        if not self._waiting:
            self._waiting = self._list()
        if self._waiting:
            self._last = self._waiting.pop()
            feed.take(self._load(self._last[1]))
        elif not self._settings.follow:
            self.close()
            feed.end()

    def _list(self) -> list[Place]:
        """Name the files after the last one, newest first: what is to be read next stands at the end.

        A file came when its inode last changed, which a move into the directory does; its own time may be any.
        """
        until = (time.time_ns() - _SETTLE_NS, "") if self._settings.follow else (sys.maxsize, "")
        try:
            if not self._path.is_dir():
                found = [(self._path.stat().st_ctime_ns, self._path.name)]
            else:
                with os.scandir(self._path) as entries:
                    found = [
                        (entry.stat().st_ctime_ns, entry.name)
                        for entry in entries
                        if fnmatch(entry.name, self._settings.pattern) and entry.is_file()
                    ]
        except OSError as exc:
            raise ConfigError(f"source {self._path}: {exc.strerror}") from exc
        return list(islice(sorted(place for place in found if self._last < place < until), _MAX_LISTED))[::-1]

    def _load(self, name: str) -> Reading:
        path = self._path / name if self._path.is_dir() else self._path
        reference = short_name(name)
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise PayloadError(f"more than {_MAX_FILE_BYTES} bytes", field=reference)
            data = path.read_bytes()
        except OSError as exc:
            raise PayloadError(str(exc.strerror), field=reference) from exc
        try:
            picture = self._settings.frame(_decode(data, self._opencv))
        except PayloadError as exc:
            raise PayloadError(str(exc), field=reference) from exc
        return Reading(picture, now_us(), reference)


def load_opencv(why: str) -> Any:  # noqa: ANN401  it publishes no types that are worth their import
    """Import OpenCV.

    Raises:
        ConfigError: it is not installed; the message says how it can be.
    """
    try:
        return import_module("cv2")
    except ImportError as exc:
        raise ConfigError(f"{why} needs OpenCV: pip install 'shoal[camera]'") from exc


def _decode(data: bytes, cv2: Any) -> NDArray[np.uint8]:  # noqa: ANN401  loaded late
    if cv2 is None:
        pixels = png.decode(data)
        if pixels is None:
            raise PayloadError("neither PNG nor PNM, and without OpenCV nothing else: pip install 'shoal[camera]'")
        return pixels
    try:
        found: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYCOLOR)
    except cv2.error as exc:  # no bytes at all
        raise PayloadError("no picture that OpenCV can read") from exc
    if found is None:
        raise PayloadError("no picture that OpenCV can read")
    return np.atleast_3d(found)[:, :, ::-1]  # it has blue first
