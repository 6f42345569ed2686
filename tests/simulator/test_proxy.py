import hashlib
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from simulator.pipe import Weather
from simulator.proxy import Cut, FaultProxy

QUICK_S = 10.0  # far above what a test takes, far below what a hang does


@contextmanager
def echoing(sock):
    """Echo a connection on another thread until its end."""

    def echo():
        while data := sock.recv(65536):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=echo)
    thread.start()
    yield
    thread.join()


@contextmanager
def sending(sock, data):
    """Send on another thread, then the end."""

    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def idle_sockets_that_wake(proxy):
    """Return the sockets for which the proxy's next poll would return at once, for nothing."""
    proxy.counters()

    def poll():
        # The first wakes the loop for this very command.
        return [key.fileobj for key, _ in proxy._selector.select(0) if key.fileobj.family != socket.AF_UNIX]

    return proxy._call(poll)


def test_bytes_pass_both_ways_and_are_counted(net):
    """Pins plain forwarding and which way is up."""
    with net.connected() as (client, served):
        client.sendall(b"question")
        assert net.receive(served, 8) == b"question"
        served.sendall(b"reply")
        assert net.receive(client, 5) == b"reply"
        counters = net.proxy.counters()
    assert (counters.accepted, counters.opened, counters.bytes_up, counters.bytes_down) == (1, 1, 8, 5)
    assert (counters.buffered_bytes, counters.unreachable, counters.cut) == (0, 0, 0)


@pytest.mark.parametrize("weather", [Weather(), Weather(latency_s=0.02), Weather(0.02, rate_bytes_per_s=2e6)])
def test_bytes_are_intact_through_any_weather(weather, net):
    """Pins that nothing is lost, repeated or reordered on the way to an echo server and back, nor the end."""
    data = np.random.default_rng(1).bytes(600_000)
    net.proxy.set_weather(up=weather, down=weather)
    with net.connected() as (client, served), echoing(served), sending(client, data):
        echoed = net.receive(client, len(data) + 1)
    assert hashlib.sha256(echoed).digest() == hashlib.sha256(data).digest()
    assert (net.proxy.counters().bytes_up, net.proxy.counters().bytes_down) == (len(data), len(data))


def test_latency_adds_up_over_both_ways(net):
    """Pins the unit, and that each direction has its own."""
    net.proxy.set_weather(up=Weather(latency_s=0.05), down=Weather(latency_s=0.1))
    with net.connected() as (client, served):
        begin = time.monotonic()
        client.sendall(b"x")
        served.sendall(net.receive(served, 1))
        assert time.monotonic() - begin >= 0.05
        net.receive(client, 1)
    assert 0.15 <= time.monotonic() - begin < QUICK_S


def test_bandwidth_is_limited_in_one_direction(net):
    """Pins the unit: 50 kB beyond the burst at 250 kB/s take a fifth of a second up, and no time down."""
    net.proxy.set_weather(up=Weather(rate_bytes_per_s=250_000))
    data = bytes(52_500)
    with net.connected() as (client, served):
        served.sendall(data)
        net.receive(client, len(data))
        begin = time.monotonic()
        client.sendall(data)
        assert net.receive(served, len(data)) == data
    assert 0.19 <= time.monotonic() - begin < QUICK_S


def test_half_closed_connection_still_answers(net):
    """Pins that one direction's end leaves the other open."""
    net.proxy.set_weather(up=Weather(latency_s=0.02))
    with net.connected() as (client, served):
        client.sendall(b"last")
        client.shutdown(socket.SHUT_WR)
        assert net.receive(served, 5) == b"last"
        served.sendall(b"answer")
        assert net.receive(client, 6) == b"answer"
        assert net.proxy.counters().opened == 1
        served.close()
        assert client.recv(1) == b""
    assert net.proxy.counters().opened == 0


def test_reset_of_a_peer_is_passed_on(net):
    """Pins that a crash looks like a crash from the other side."""
    with net.connected() as (client, served):
        net.reset(client)
        with pytest.raises(ConnectionResetError):
            served.recv(1)
    assert net.proxy.counters().unreachable == 0


def test_slow_reader_stops_the_writer(listener, loopback):
    """Pins back-pressure: beyond its capacity the proxy leaves bytes in the sender's kernel."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    chunk = np.random.default_rng(2).bytes(65536)
    digest, sent, stuck = hashlib.sha256(), 0, 0
    with (
        FaultProxy(*listener.getsockname(), capacity_bytes=30_000) as proxy,
        loopback(proxy, listener).connected() as (client, served),
    ):
        client.setblocking(False)
        while stuck < 5:
            try:
                count = client.send(chunk)
            except BlockingIOError:
                stuck += 1
                assert proxy.counters().buffered_bytes <= 30_000
                continue
            stuck = 0
            digest.update(chunk[:count])
            sent += count
            assert sent < 64 * 2**20, "the proxy reads although nobody takes it from it"
        assert proxy.counters().buffered_bytes == 30_000
        assert idle_sockets_that_wake(proxy) == []
        assert hashlib.sha256(loopback.receive(served, sent)).digest() == digest.digest()


def test_connections_do_not_mix(net):
    """Pins that each of many connections gets its own bytes back."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(net.connected()) for _ in range(40)]
        for number, (client, _) in enumerate(pairs):
            client.sendall(b"%04d" % number)
        for number, (client, served) in enumerate(pairs):
            assert net.receive(served, 4) == b"%04d" % number
            served.sendall(b"%04d" % -number)
            assert net.receive(client, 4) == b"%04d" % -number
        assert net.proxy.counters().opened == 40
    assert net.proxy.counters().opened == 0


def test_waiting_costs_nothing(net):
    """Pins that no state of a connection makes the loop spin: epoll reports hang-ups to all who are registered."""
    with net.connected() as (client, served), net.connected() as (other, other_served):
        assert idle_sockets_that_wake(net.proxy) == []
        client.shutdown(socket.SHUT_WR)
        assert idle_sockets_that_wake(net.proxy) == []
        net.proxy.partition()
        net.reset(other_served)
        served.close()
        assert idle_sockets_that_wake(net.proxy) == []
        net.proxy.cut(Cut.FIN)
        assert idle_sockets_that_wake(net.proxy) == []
        assert other.recv(1) == b""  # although its broker has reset
        other.sendall(b"x")
        assert idle_sockets_that_wake(net.proxy) == []


def test_leaving_resets_what_is_open(listener, loopback):
    """Pins that a proxy ends at once and leaves neither thread nor port nor connection behind."""
    with FaultProxy(*listener.getsockname()) as proxy, loopback(proxy).dial() as client:
        served, _ = listener.accept()
        proxy.__exit__(None, None, None)
        with served, pytest.raises(ConnectionResetError):
            served.recv(1)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            loopback(proxy).dial()
    assert not proxy._thread.is_alive()


def test_leaving_while_refusing_is_clean(listener):
    """Pins that the end does not need a listener."""
    with FaultProxy(*listener.getsockname()) as proxy:
        proxy.refuse()
    assert not proxy._thread.is_alive()


def test_commands_need_the_block():
    """Pins that a command to a proxy that does not run fails instead of waiting."""
    proxy = FaultProxy("127.0.0.1", 1)
    with pytest.raises(RuntimeError, match="with"):
        proxy.partition()
