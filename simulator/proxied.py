"""One connection through the fault proxy: two sockets and a pipe for each direction.

Never waits: the proxy calls `advance` whenever something may have changed, and asks what to wait for.
"""

import enum
import errno
import os
import selectors
import socket
import struct

from simulator.pipe import Pipe, Weather

_READ_BYTES = 64 * 1024


class Cut(enum.Enum):
    """How a connection ends: as by a crash or a middlebox, or by an orderly close."""

    RST = "rst"
    FIN = "fin"


class ProxiedConnection:
    """Forwards between a client and a broker what its pipes let pass.

    Attributes:
        client, broker: the sockets; closed by `close` only, after the owner has stopped watching them.
        is_over: there is nothing left to do but `close`.
        is_cut: ended by command; a FIN cut lives on, discarding, until both peers have closed.
        is_unreachable: the broker did not take the connection.
        wake_at: kept for the owner, the time of its timer.
    """

    def __init__(
        self, client: socket.socket, target: tuple[str, int], weather: tuple[Weather, Weather], capacity_bytes: int
    ) -> None:
        self.client = client
        self.broker = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.is_over = False
        self.is_cut = False
        self.is_unreachable = False
        self.wake_at: float | None = None
        for sock in (self.client, self.broker):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._up = _Lane(self.client, self.broker, Pipe(weather[0], capacity_bytes))
        self._down = _Lane(self.broker, self.client, Pipe(weather[1], capacity_bytes))
        self._unread = {self.client, self.broker}  # after a FIN cut: whose end has not come yet
        self._is_connected = False
        if self.broker.connect_ex(target) not in (0, errno.EINPROGRESS):
            self.is_unreachable = True
            self.reset()

    @property
    def bytes_up(self) -> int:
        return self._up.passed_bytes

    @property
    def bytes_down(self) -> int:
        return self._down.passed_bytes

    @property
    def buffered_bytes(self) -> int:
        return 0 if self.is_cut else self._up.pipe.size_bytes + self._down.pipe.size_bytes

    def advance(self, now: float) -> None:
        """Read what is there and pass on what may pass."""
        if self.is_over:
            return
        if self.is_cut:
            self._discard()
            return
        try:
            self._forward(now)
        except OSError:  # a reset of one side is a reset of the other
            self.reset()

    def interest(self, sock: socket.socket, now: float) -> int:
        """Return the selector events that could make `advance` achieve something; 0 for none."""
        if self.is_cut:
            return selectors.EVENT_READ if sock in self._unread else 0
        if sock is self.broker and not self._is_connected:
            return selectors.EVENT_WRITE
        reads, writes = (self._up, self._down) if sock is self.client else (self._down, self._up)
        wants_read = selectors.EVENT_READ if reads.pipe.room_bytes else 0
        return wants_read | (selectors.EVENT_WRITE if writes.pipe.ready(now) else 0)

    def next_at(self, now: float) -> float | None:
        """Return when, later than `now`, time alone makes something pass; None for never."""
        if self.is_cut or not self._is_connected:
            return None
        times = (lane.pipe.next_at(now) for lane in (self._up, self._down))
        return min((when for when in times if when is not None and when > now), default=None)

    def set_weather(self, up: Weather, down: Weather) -> None:
        self._up.pipe.set_weather(up)
        self._down.pipe.set_weather(down)

    def cut(self, how: Cut) -> None:
        """End it on both sides and lose what is under way."""
        if how is Cut.RST or not self._is_connected:
            self.reset()
        else:
            for sock in (self.client, self.broker):
                _shut(sock)
        self.is_cut = True

    def reset(self) -> None:
        """Make `close` send both sides a reset."""
        for sock in (self.client, self.broker):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.is_over = True

    def close(self) -> None:
        self.client.close()
        self.broker.close()

    def _forward(self, now: float) -> None:
        self._up.read(now)
        if self._is_connected or self._finish_connect():
            self._down.read(now)
            self._up.write(now)
            self._down.write(now)
        self.is_over = self._up.is_shut and self._down.is_shut

    def _finish_connect(self) -> bool:
        """Say whether the broker has taken the connection.

        Raises:
            OSError: it will not.
        """
        error = self.broker.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.is_unreachable = True
            raise OSError(error, os.strerror(error))
        try:
            self.broker.getpeername()
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                raise
            return False
        self._is_connected = True
        return True

    def _discard(self) -> None:
        """Read to the end before closing: closing over unread bytes would turn the FIN into a reset."""
        for sock in tuple(self._unread):
            try:
                data = _recv(sock, _READ_BYTES)
            except OSError:  # its reset is its end, and none of the other side's business any more
                data = b""
            if data == b"":
                self._unread.discard(sock)
        self.is_over = not self._unread


class _Lane:
    """One direction: what is read from `source` goes through the pipe to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket, pipe: Pipe) -> None:
        self.pipe = pipe
        self.is_shut = False
        self.passed_bytes = 0
        self._source = source
        self._sink = sink

    def read(self, now: float) -> None:
        data = _recv(self._source, min(self.pipe.room_bytes, _READ_BYTES)) if self.pipe.room_bytes else None
        if data:
            self.pipe.push(data, now)
        elif data is not None:
            self.pipe.end(now)

    def write(self, now: float) -> None:
        while chunk := self.pipe.ready(now):
            try:
                count = self._sink.send(chunk)
            except BlockingIOError:
                return
            self.pipe.passed(count, now)
            self.passed_bytes += count
        if self.pipe.is_over(now) and not self.is_shut:
            self.is_shut = True
            _shut(self._sink)


def _recv(sock: socket.socket, limit_bytes: int) -> bytes | None:
    """Return what is there, b"" at the end of the stream, None when there is nothing yet."""
    try:
        return sock.recv(limit_bytes)
    except BlockingIOError:
        return None


def _shut(sock: socket.socket) -> None:
    """Send a FIN, unless the peer's reset was faster."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise
