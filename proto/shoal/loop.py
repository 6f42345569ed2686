"""One thread, one selector: any number of sockets, timers and idle hooks.

A gateway drives one link with it, the simulator thousands. A callback that blocks blocks everybody:
slow work belongs in a child process or a worker thread that ends with `wake()`.
"""

import heapq
import itertools
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

Callback = Callable[[float], None]

# More than any receive-maximum of ours: what a peer may send at once is still one round for the idle hooks.
_MAX_BUSY_ROUNDS = 256


class Socket(Protocol):
    """What a selector needs of a socket."""

    def fileno(self) -> int: ...


@dataclass(order=True, slots=True)
class Timer:
    """A callback that is due at `when`, seconds of the loop's clock."""

    when: float
    order: int
    callback: Callback = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(slots=True)
class _Watch:
    on_read: Callable[[], object]
    on_write: Callable[[], object]


class Loop:
    """Runs callbacks until `stop()`. `now` is handed to each, so that they need no clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._order = itertools.count()
        self._idle_hooks: list[Callback] = []
        self._soon: list[Callable[[], None]] = []
        self._stopping = False
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self.watch(self._wakee, self._drain_wakes, lambda: None)

    def watch(self, sock: Socket, on_read: Callable[[], object], on_write: Callable[[], object]) -> None:
        """Call `on_read` whenever `sock` has something to read."""
        self._selector.register(sock, selectors.EVENT_READ, _Watch(on_read, on_write))

    def want_write(self, sock: Socket, *, wanted: bool) -> None:
        """Say whether `on_write` shall be called too."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        self._selector.modify(sock, events, self._selector.get_key(sock).data)

    def unwatch(self, sock: Socket) -> None:
        self._selector.unregister(sock)

    def call_at(self, when: float, callback: Callback) -> Timer:
        timer = Timer(when, next(self._order), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def call_every(self, interval_s: float, callback: Callback) -> Timer:
        """Call again and again, the first time at once; late calls are not made up for."""
        timer = Timer(self.clock(), next(self._order), callback)

        def again(now: float) -> None:
            callback(now)
            if not timer.cancelled:
                on_time = timer.when + interval_s
                timer.when, timer.order = on_time if on_time > now else now + interval_s, next(self._order)
                heapq.heappush(self._timers, timer)

        timer.callback = again
        heapq.heappush(self._timers, timer)
        return timer

    def on_idle(self, hook: Callback) -> None:
        """Call `hook` each time every socket is drained, before the loop sleeps, and now and then in a flood."""
        self._idle_hooks.append(hook)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call once, after the callbacks of this round and before the loop sleeps."""
        self._soon.append(callback)

    def wake(self) -> None:
        """Make the loop go round once. The only method besides `stop` that other threads may call."""
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            return  # the pipe is full of wakes already

    def stop(self) -> None:
        """Leave `run()` after the current callback; safe in signal handlers and other threads."""
        self._stopping = True
        self.wake()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until `stop()` is called or `until()` is true."""
        busy_rounds = 0
        while not self._stopping and not until():
            ready = self._selector.select(0)
            busy_rounds += 1
            if not ready or busy_rounds > _MAX_BUSY_ROUNDS:
                busy_rounds = 0
                now = self.clock()
                for hook in self._idle_hooks:
                    hook(now)
            self._run_soon()
            if not ready:
                ready = self._selector.select(self._patience_s())
            for key, events in ready:
                self._serve(key, events)
            self._run_timers()

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and a terminal that hangs up end `run()` instead of the process."""

        def handler(_signal: int, _frame: FrameType | None) -> None:
            self.stop()

        wanted = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started with nohup
            wanted.append(signal.SIGHUP)
        before = {number: signal.signal(number, handler) for number in wanted}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def close(self) -> None:
        self._selector.close()
        self._waker.close()
        self._wakee.close()

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        # An earlier callback of this round may have closed the socket, and its number may be another's by now.
        current = self._selector.get_map().get(key.fd)
        if current is None or current.data is not key.data:
            return
        if events & selectors.EVENT_READ:
            key.data.on_read()
        if events & selectors.EVENT_WRITE:
            current = self._selector.get_map().get(key.fd)
            if current is not None and current.data is key.data:
                key.data.on_write()

    def _patience_s(self) -> float | None:
        while self._timers and self._timers[0].cancelled:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].when - self.clock()) if self._timers else None

    def _run_timers(self) -> None:
        now = self.clock()
        # First all of them: a callback that asks to be called at once must not keep the sockets waiting.
        due = []
        while self._timers and self._timers[0].when <= now:
            due.append(heapq.heappop(self._timers))
        for timer in due:
            if not timer.cancelled:
                timer.callback(now)

    def _run_soon(self) -> None:
        while self._soon:
            callbacks, self._soon = self._soon, []
            for callback in callbacks:
                callback()

    def _drain_wakes(self) -> None:
        try:
            while self._wakee.recv(4096):
                pass
        except BlockingIOError:
            return
