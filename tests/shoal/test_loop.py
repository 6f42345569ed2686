"""The loop that drives every process."""

import itertools
import os
import signal
import socket
import threading

import pytest

from shoal.loop import Loop

pytestmark = pytest.mark.device


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_timers_run_in_order_of_their_time(loop):
    """Cancelled ones never."""
    order = []
    now = loop.clock()
    for delay in (0.03, 0.01, 0.02):
        loop.call_at(now + delay, lambda _now, delay=delay: order.append(delay))
    loop.call_at(now + 0.015, lambda _now: order.append("cancelled")).cancel()
    loop.call_at(now + 0.04, lambda _now: loop.stop())
    loop.run()
    assert order == [0.01, 0.02, 0.03]


def test_late_repetitions_are_not_made_up_for():
    """A stall of ten periods leads to one call, not ten."""
    clock = Clock()
    loop = Loop(clock)
    calls = []

    def step(now):
        calls.append(now)
        clock.now += 10.0 if len(calls) == 1 else 1.0

    timer = loop.call_every(1.0, step)
    loop.run(until=lambda: len(calls) == 3)
    assert calls == [100.0, 110.0, 111.0]
    timer.cancel()
    loop.close()


def test_idle_hook_runs_once_sockets_are_drained(loop):
    """What has arrived is batched; nothing waits for a timer."""
    left, right = socket.socketpair()
    events = []
    loop.watch(right, lambda: events.append(right.recv(1)), lambda: None)
    loop.on_idle(lambda _now: (events.append("idle"), loop.stop()))
    left.send(b"ab")
    loop.run()
    assert events == [b"a", b"b", "idle"]
    loop.unwatch(right)
    left.close()
    right.close()


def test_flood_does_not_starve_the_idle_hook(loop):
    """A peer that always has more to say must not keep the batch before it from being answered, nor the timers."""
    left, right = socket.socketpair()
    left.send(b"x")
    reads, hooks, timers = [], [], []
    loop.watch(right, lambda: reads.append(left.send(right.recv(1))), lambda: None)
    loop.on_idle(lambda _now: (hooks.append(len(reads)), len(hooks) == 3 and loop.stop()))
    loop.call_every(0.0, lambda _now: timers.append(len(reads)))
    loop.run()
    assert hooks[0] > 200
    assert len({later - earlier for earlier, later in itertools.pairwise(hooks)}) == 1
    assert len(timers) >= len(reads) - 1
    loop.unwatch(right)
    left.close()
    right.close()


def test_socket_closed_by_a_callback_of_the_same_round_is_left_alone(loop):
    """Its descriptor may be another socket's by then."""
    pairs = [socket.socketpair() for _ in range(2)]
    served = []

    def close_the_other(mine, other):
        served.append(mine.recv(1))
        loop.unwatch(other)
        other.close()

    first, second = pairs[0][1], pairs[1][1]
    loop.watch(first, lambda: close_the_other(first, second), lambda: None)
    loop.watch(second, lambda: close_the_other(second, first), lambda: None)
    for left, _ in pairs:
        left.send(b"x")
    loop.call_at(loop.clock() + 0.05, lambda _now: loop.stop())
    loop.run()
    assert served == [b"x"]
    for pair in pairs:
        for end in pair:
            end.close()


def test_other_threads_wake_it(loop):
    """The one thing that they may do."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (done.set(), loop.wake()))
    thread.start()
    loop.run(until=done.is_set)
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_and_are_given_back(loop, number):
    """A service leaves its loop and says goodbye."""
    before = signal.getsignal(number)
    with loop.stopping_on_signals():
        loop.call_at(loop.clock(), lambda _now: os.kill(os.getpid(), number))
        loop.run()
    assert signal.getsignal(number) is before


def test_nohup_is_respected(loop):
    """Who ignores the terminal's end when we start means it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.stopping_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
