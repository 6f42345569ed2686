"""A TCP proxy between clients and a broker that makes faults on command.

One thread with one selector forwards bytes; what may pass when is decided in `simulator.pipe`. Every command returns
after it has taken effect, so that a test needs no sleep. A byte is never changed, invented or reordered; only a cut
loses any. The handshake of a new connection is the kernel's, so latency does not delay it.
"""

import contextlib
import functools
import heapq
import itertools
import queue
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TypeVar

from simulator.pipe import Weather
from simulator.proxied import Cut, ProxiedConnection

__all__ = ["Cut", "FaultProxy", "ProxyCounters", "Weather"]

_CAPACITY_BYTES = 256 * 1024
_BACKLOG = 1024
_COMMAND_TIMEOUT_S = 30.0  # only a dead or starved thread takes so long
_LOOPBACK = "127.0.0.1"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ProxyCounters:
    """What the proxy has done since it started; `up` is from client to broker.

    Attributes:
        accepted: connections taken from clients.
        unreachable: of these, the ones reset because the broker did not take them.
        cut: of these, the ones ended by command.
        opened: of these, the ones that forward now.
        bytes_up, bytes_down: handed to the kernel for the other side.
        buffered_bytes: under way inside the proxy now.
    """

    accepted: int = 0
    unreachable: int = 0
    cut: int = 0
    opened: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    buffered_bytes: int = 0


class FaultProxy:
    """Forwards from a free loopback port to `(target_host, target_port)`, IPv4, while its `with` block runs.

    Methods may be called from any thread, but only inside the block. A proxy is used once.

    Attributes:
        port: where clients connect, on 127.0.0.1; 0 before the block.
    """

    def __init__(self, target_host: str, target_port: int, *, capacity_bytes: int = _CAPACITY_BYTES) -> None:
        """Store where to forward to, and how many bytes each direction of a connection may hold."""
        self.port = 0
        self._target = (target_host, target_port)
        self._capacity = capacity_bytes
        self._up, self._down = Weather(), Weather()
        self._is_stopping = False
        self._past = ProxyCounters()  # of connections that are gone, but `accepted` and `cut` of all
        self._connections: set[ProxiedConnection] = set()
        self._timers: list[tuple[float, int, ProxiedConnection]] = []
        self._order = itertools.count()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            # Bound but never listening: it keeps the port ours while connections are refused.
            reserve = undo.enter_context(_bind(0))
            self.port = reserve.getsockname()[1]
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._listener: socket.socket | None = None
            undo.callback(self._close_listener)
            self._open_listener()
            waker, wakee = socket.socketpair()
            self._waker = undo.enter_context(waker)
            self._selector.register(undo.enter_context(wakee), selectors.EVENT_READ, lambda: wakee.recv(4096))
            self._thread.start()
            self._resources = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Reset what is still open and end the thread."""
        if self._thread.is_alive():
            self._call(self._stop)
        self._thread.join()
        self._resources.close()

    def set_weather(self, *, up: Weather | None = None, down: Weather | None = None) -> None:
        """Change one direction or both, of open connections and of those to come.

        While a direction is blocked, new connections wait unanswered. One whose client gave up meanwhile is dropped
        with what it wrote: its first packet would never have got through.
        """
        self._call(lambda: self._set_weather(up or self._up, down or self._down))

    def partition(self) -> None:
        """Block both directions until `heal`; sockets stay open and see nothing."""
        self._call(lambda: self._block(is_blocked=True))

    def heal(self) -> None:
        """Lift the block of both directions; latency and rates stay as they were."""
        self._call(lambda: self._block(is_blocked=False))

    def cut(self, how: Cut) -> int:
        """End every open connection on both sides, losing what was under way; return how many there were."""
        return self._call(lambda: self._cut(how))

    def refuse(self) -> None:
        """Refuse new connections until `admit`; open ones stay."""
        self._call(self._close_listener)

    def admit(self) -> None:
        """Take new connections again, on the same port."""
        self._call(self._open_listener)

    def counters(self) -> ProxyCounters:
        """Return the counts after everything that could be read or passed on before the call has been, once."""
        return self._call(self._count)

    # What follows runs on the proxy's thread, except `_call`.

    def _call(self, command: Callable[[], _T]) -> _T:
        """Run `command` on the proxy's thread and return its result.

        Raises:
            RuntimeError: the proxy is not running.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the proxy runs only inside its `with` block")
        future: Future[_T] = Future()

        def answer() -> None:
            try:
                future.set_result(command())
            except BaseException as exc:
                future.set_exception(exc)
                raise

        self._commands.put(answer)
        self._waker.send(b"\0")
        return future.result(_COMMAND_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                # Counted before the poll, so that a command finds served whatever its caller had done before it.
                due = self._commands.qsize()
                for key, _ in self._selector.select(0.0 if due else self._patience_s()):
                    key.data()
                self._run_timers()
                for _ in range(due):
                    self._commands.get()()
        finally:
            for connection in list(self._connections):
                connection.reset()
                self._forget(connection)

    def _stop(self) -> None:
        self._is_stopping = True

    def _patience_s(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            when, _, connection = heapq.heappop(self._timers)
            if connection.wake_at == when:
                connection.wake_at = None
                self._advance(connection)

    def _open_listener(self) -> None:
        if self._listener is None:
            self._listener = _bind(self.port)
            self._listener.listen(_BACKLOG)
            self._listener.setblocking(False)
            self._watch_listener()

    def _close_listener(self) -> None:
        if self._listener is not None:
            _watch(self._selector, self._listener, 0, self._accept)
            self._listener.close()
            self._listener = None

    def _watch_listener(self) -> None:
        if self._listener is not None:
            events = 0 if self._is_blocked() else selectors.EVENT_READ
            _watch(self._selector, self._listener, events, self._accept)

    def _is_blocked(self) -> bool:
        return self._up.is_blocked or self._down.is_blocked

    def _accept(self, *, is_late: bool = False) -> None:
        """Take every connection that waits; of those that waited for a partition, only the ones still wanted."""
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except ConnectionAbortedError:
                continue
            except BlockingIOError:
                return
            if is_late and _has_hung_up(client):
                client.close()
            else:
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        connection = ProxiedConnection(client, self._target, (self._up, self._down), self._capacity)
        self._past = replace(self._past, accepted=self._past.accepted + 1)
        self._connections.add(connection)
        self._advance(connection)

    def _advance(self, connection: ProxiedConnection) -> None:
        """Forward what may pass, then wait for exactly what can make more pass."""
        now = time.monotonic()
        connection.advance(now)
        if connection.is_over:
            self._forget(connection)
            return
        for sock in (connection.client, connection.broker):
            _watch(self._selector, sock, connection.interest(sock, now), functools.partial(self._on_event, connection))
        wake_at = connection.next_at(now)
        if wake_at is not None and wake_at != connection.wake_at:
            heapq.heappush(self._timers, (wake_at, next(self._order), connection))
        connection.wake_at = wake_at

    def _on_event(self, connection: ProxiedConnection) -> None:
        # Both sockets may be in one poll's result, and the first may have ended the connection.
        if connection in self._connections:
            self._advance(connection)

    def _forget(self, connection: ProxiedConnection) -> None:
        for sock in (connection.client, connection.broker):
            _watch(self._selector, sock, 0, None)
        connection.close()
        self._connections.remove(connection)
        connection.wake_at = None
        self._past = _add(self._past, connection)

    def _set_weather(self, up: Weather, down: Weather) -> None:
        was_blocked = self._is_blocked()
        self._up, self._down = up, down
        for connection in list(self._connections):
            connection.set_weather(up, down)
            self._advance(connection)
        self._watch_listener()
        if was_blocked and not self._is_blocked():
            self._accept(is_late=True)

    def _block(self, *, is_blocked: bool) -> None:
        self._set_weather(replace(self._up, is_blocked=is_blocked), replace(self._down, is_blocked=is_blocked))

    def _cut(self, how: Cut) -> int:
        victims = [connection for connection in self._connections if not connection.is_cut]
        for connection in victims:
            connection.cut(how)
            self._advance(connection)
        self._past = replace(self._past, cut=self._past.cut + len(victims))
        return len(victims)

    def _count(self) -> ProxyCounters:
        opened = sum(not connection.is_cut for connection in self._connections)
        buffered = sum(connection.buffered_bytes for connection in self._connections)
        return replace(functools.reduce(_add, self._connections, self._past), opened=opened, buffered_bytes=buffered)


def _add(counters: ProxyCounters, connection: ProxiedConnection) -> ProxyCounters:
    return replace(
        counters,
        unreachable=counters.unreachable + connection.is_unreachable,
        bytes_up=counters.bytes_up + connection.bytes_up,
        bytes_down=counters.bytes_down + connection.bytes_down,
    )


def _bind(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((_LOOPBACK, port))
    except OSError:
        sock.close()
        raise
    return sock


def _watch(selector: selectors.BaseSelector, sock: socket.socket, events: int, data: Callable[[], None] | None) -> None:
    """Wait for `events` of a socket, for nothing when 0.

    A socket that waits for nothing leaves the selector: epoll would report its hang-up again and again.
    """
    known = selector.get_map().get(sock)
    if known is None:
        if events:
            selector.register(sock, events, data)
    elif not events:
        selector.unregister(sock)
    elif known.events != events:
        selector.modify(sock, events, data)


def _has_hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
