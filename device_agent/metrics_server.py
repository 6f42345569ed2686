"""What Prometheus reads of a device, where its settings open a port: GET /metrics, HTTP/1.0, nothing else.

On the agent's own loop, because the counters are. Never blocks; a peer that is slow, or says too much, is cut off.
"""

import logging
import socket
from collections.abc import Callable

from device_agent.metrics import CONTENT_TYPE
from shoal.errors import ConfigError
from shoal.loop import Loop

log = logging.getLogger(__name__)

_MAX_PEERS = 8
_MAX_REQUEST_BYTES = 8192
_PATIENCE_S = 5.0
_MAX_PORT = 65_535


class MetricsServer:
    """Serves from construction until `close`.

    Args:
        address: `host:port`; port 0 takes a free one.
        render: what is served, anew for each request.

    Raises:
        ConfigError: the address is none, or taken.
    """

    def __init__(self, loop: Loop, address: str, render: Callable[[], bytes]) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > _MAX_PORT:
            raise ConfigError(f"metrics_address {address!r}, expected host:port")
        try:
            self._listener = socket.create_server((host, int(port)))
        except OSError as exc:
            raise ConfigError(f"metrics_address {address}: {exc}") from exc
        self._listener.setblocking(False)
        self._loop = loop
        self._render = render
        self._peers: set[_Peer] = set()
        loop.watch(self._listener, self._accept, lambda: None)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        for peer in list(self._peers):
            peer.close()
        self._loop.unwatch(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:  # gone before it was accepted, or no descriptor is left
            log.debug("metrics: nobody accepted error=%s", exc)
            return
        if len(self._peers) >= _MAX_PEERS:
            sock.close()
            return
        self._peers.add(_Peer(self._loop, sock, self._render, self._peers.discard))


class _Peer:
    """One request and its answer."""

    def __init__(
        self, loop: Loop, sock: socket.socket, render: Callable[[], bytes], forget: Callable[["_Peer"], None]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._render = render
        self._forget = forget
        self._request = b""
        self._answer = b""
        sock.setblocking(False)
        loop.watch(sock, self._read, self._write)
        self._deadline = loop.call_at(loop.clock() + _PATIENCE_S, lambda _: self.close())

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._deadline.cancel()
            self._loop.unwatch(self._sock)
            self._sock.close()
            self._forget(self)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._request += data
        if not data or len(self._request) > _MAX_REQUEST_BYTES:
            self.close()
        elif b"\r\n\r\n" in self._request and not self._answer:
            self._answer = self._answer_to(self._request.split(b"\r\n", 1)[0])
            self._loop.want_write(self._sock, wanted=True)

    def _write(self) -> None:
        try:
            sent = self._sock.send(self._answer)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._answer = self._answer[sent:]
        if not self._answer:
            self.close()

    def _answer_to(self, line: bytes) -> bytes:
        if line.split(b" ")[:2] != [b"GET", b"/metrics"]:
            return _response(b"404 Not Found", "text/plain", b"/metrics\n")
        return _response(b"200 OK", CONTENT_TYPE, self._render())


def _response(status: bytes, content_type: str, body: bytes) -> bytes:
    head = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return b"HTTP/1.0 " + status + b"\r\n" + head.encode() + body
