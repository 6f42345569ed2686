"""Lines that another program prints."""

import sys
from collections.abc import Callable
from io import FileIO
from typing import Annotated

import msgspec
from msgspec import Meta

from device_agent.readings import Reading
from device_agent.sources.feed import Feed, now_us
from device_agent.sources.mapping import MAX_INPUT_BYTES, Mapping
from shoal.errors import ConfigError, PayloadError
from shoal.loop import Timer

_READ_BYTES = 64 << 10
_FILE_POLL_S = 0.01


class StdinSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="stdin"):
    """`kind = "stdin"`: one reading a line."""

    values: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["@"])


class StdinSource:
    """Reads lines as they come. `reference` is `stdin:line`; empty lines count and are no readings."""

    def __init__(self, settings: StdinSettings, descriptor: int | None = None) -> None:
        self._mapping = Mapping(settings.values)
        self._descriptor = descriptor
        self._unread = b""
        self._is_skipping = False
        self._line = 0
        self._stop_reading: Callable[[], None] = _nothing

    def start(self, feed: Feed) -> None:
        try:
            number = sys.stdin.fileno() if self._descriptor is None else self._descriptor
            stream = FileIO(number, closefd=False)
        except (OSError, ValueError, AttributeError) as exc:  # closed by whoever started the agent
            raise ConfigError("source stdin: there is no standard input") from exc
        try:
            feed.loop.watch(stream, lambda: self._read(feed, stream), lambda: None)
            self._stop_reading = lambda: feed.loop.unwatch(stream)
        except PermissionError:  # a file or /dev/null, which selectors refuse because it never makes anybody wait
            timer: Timer = feed.loop.call_every(_FILE_POLL_S, lambda _: self._read(feed, stream))
            self._stop_reading = timer.cancel

    def close(self) -> None:
        self._stop_reading()
        self._stop_reading = _nothing

    def _read(self, feed: Feed, stream: FileIO) -> None:
        data = stream.read(_READ_BYTES)
        if data is None:
            return
        *lines, self._unread = (self._unread + (data or b"\n")).split(b"\n")
        for line in lines:
            self._take(feed, line)
        if len(self._unread) > MAX_INPUT_BYTES:  # it is refused where it ends; until then only its excess is kept
            self._is_skipping, self._unread = True, b""
        if not data:
            self.close()
            feed.end()

    def _take(self, feed: Feed, line: bytes) -> None:
        self._line += 1
        is_rest, self._is_skipping = self._is_skipping, False
        if not is_rest and not line.strip():
            return
        reference = f"stdin:{self._line}"
        try:
            if is_rest:
                raise PayloadError(f"a line of more than {MAX_INPUT_BYTES} bytes")  # noqa: TRY301
            feed.take(Reading(self._mapping.values(line), now_us(), reference))
        except PayloadError as exc:
            feed.refuse(PayloadError(str(exc), field=reference))


def _nothing() -> None:
    """There is nothing to stop."""
