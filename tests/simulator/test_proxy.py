import hashlib
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from simulator.pipe import Weather
from simulator.proxy import Cut, FaultProxy

PATIENCE_S = 20.0  # of a call that must not take long; no test waits for it to pass


@pytest.fixture
def listener():
    """A server's listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(PATIENCE_S)
        yield sock


@pytest.fixture
def proxy(listener):
    with FaultProxy(*listener.getsockname()) as running:
        yield running


@contextmanager
def connected(proxy, listener):
    """A client and what the server accepted of it."""
    with dial(proxy) as client:
        served, _ = listener.accept()
        with served:
            served.settimeout(PATIENCE_S)
            yield client, served


def dial(proxy):
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S)


def receive(sock, size):
    """Read exactly `size` bytes, or all there are before the end."""
    received = bytearray()
    while len(received) < size and (data := sock.recv(min(65536, size - len(received)))):
        received += data
    return bytes(received)


def hears_nothing(proxy, sock):
    """Say that nothing came, after the proxy has served everything that is ready now."""
    proxy.counters()
    sock.setblocking(False)
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(PATIENCE_S)
    return False


def send_reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


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


def test_bytes_pass_both_ways_and_are_counted(proxy, listener):
    """Pins plain forwarding and which way is up."""
    with connected(proxy, listener) as (client, served):
        client.sendall(b"question")
        assert receive(served, 8) == b"question"
        served.sendall(b"reply")
        assert receive(client, 5) == b"reply"
        counters = proxy.counters()
    assert (counters.accepted, counters.opened, counters.bytes_up, counters.bytes_down) == (1, 1, 8, 5)
    assert (counters.buffered_bytes, counters.unreachable, counters.cut) == (0, 0, 0)


@pytest.mark.parametrize("weather", [Weather(), Weather(latency_s=0.02), Weather(0.02, rate_bytes_per_s=2e6)])
def test_bytes_are_intact_through_any_weather(weather, proxy, listener):
    """Pins that nothing is lost, repeated or reordered on the way to an echo server and back, nor the end."""
    data = np.random.default_rng(1).bytes(600_000)
    proxy.set_weather(up=weather, down=weather)
    with connected(proxy, listener) as (client, served), echoing(served), sending(client, data):
        echoed = receive(client, len(data) + 1)
    assert hashlib.sha256(echoed).digest() == hashlib.sha256(data).digest()
    assert (proxy.counters().bytes_up, proxy.counters().bytes_down) == (len(data), len(data))


def test_latency_adds_up_over_both_ways(proxy, listener):
    """Pins the unit, and that each direction has its own."""
    proxy.set_weather(up=Weather(latency_s=0.05), down=Weather(latency_s=0.1))
    with connected(proxy, listener) as (client, served):
        begin = time.monotonic()
        client.sendall(b"x")
        served.sendall(receive(served, 1))
        assert time.monotonic() - begin >= 0.05
        receive(client, 1)
    assert 0.15 <= time.monotonic() - begin < PATIENCE_S / 2


def test_bandwidth_is_limited_in_one_direction(proxy, listener):
    """Pins the unit: 50 kB beyond the burst at 250 kB/s take a fifth of a second up, and no time down."""
    proxy.set_weather(up=Weather(rate_bytes_per_s=250_000))
    data = bytes(52_500)
    with connected(proxy, listener) as (client, served):
        served.sendall(data)
        receive(client, len(data))
        begin = time.monotonic()
        client.sendall(data)
        assert receive(served, len(data)) == data
    assert 0.19 <= time.monotonic() - begin < PATIENCE_S / 2


def test_reset_cut_is_seen_by_both_peers(proxy, listener):
    """Pins that a cut is a reset, at once, on every open connection."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(connected(proxy, listener)) for _ in range(3)]
        assert proxy.cut(Cut.RST) == 3
        for sock in (sock for pair in pairs for sock in pair):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    counters = proxy.counters()
    assert (counters.cut, counters.opened) == (3, 0)


def test_orderly_cut_is_an_end_for_both_peers(proxy, listener):
    """Pins that a FIN cut never becomes a reset, even over bytes that nobody will read."""
    with connected(proxy, listener) as (client, served):
        proxy.partition()
        client.sendall(b"lost")
        assert proxy.cut(Cut.FIN) == 1
        for sock in (client, served):
            assert sock.recv(1) == b""
            sock.sendall(b"lost too")
            proxy.counters()
            assert sock.recv(1) == b""
        proxy.heal()
        assert hears_nothing(proxy, served) is False  # the end again, not the lost bytes
    assert proxy.counters().bytes_up == 0


@pytest.mark.parametrize("how", list(Cut))
def test_clients_reconnect_after_a_cut(how, proxy, listener):
    """Pins that a cut is of open connections only, those that the proxy has not accepted yet included."""
    with dial(proxy):
        assert proxy.cut(how) == 1
        assert proxy.cut(how) == 0
    listener.accept()[0].close()
    with connected(proxy, listener) as (client, served):
        client.sendall(b"back")
        assert receive(served, 4) == b"back"


def test_partition_holds_and_heals(proxy, listener):
    """Pins that a partition passes nothing, shows nothing and loses nothing."""
    with connected(proxy, listener) as (client, served):
        client.sendall(b"1")
        assert receive(served, 1) == b"1"
        proxy.partition()
        client.sendall(b"23")
        served.sendall(b"ab")
        assert hears_nothing(proxy, served)
        assert hears_nothing(proxy, client)
        proxy.heal()
        assert receive(served, 2) == b"23"
        assert receive(client, 2) == b"ab"


def test_partition_keeps_what_was_under_way(proxy, listener):
    """Pins that bytes whose latency passes during a partition arrive after it, not in it."""
    proxy.set_weather(up=Weather(latency_s=0.05))
    with connected(proxy, listener) as (client, served):
        client.sendall(b"x")
        while proxy.counters().buffered_bytes == 0:
            pass
        proxy.partition()
        begin = time.monotonic()
        while time.monotonic() - begin < 0.1:
            assert hears_nothing(proxy, served)
        proxy.heal()
        assert receive(served, 1) == b"x"


def test_block_can_be_one_way(proxy, listener):
    """Pins the fault in which requests arrive and replies do not."""
    proxy.counters()
    with connected(proxy, listener) as (client, served):
        proxy.set_weather(down=Weather(is_blocked=True))
        client.sendall(b"question")
        assert receive(served, 8) == b"question"
        served.sendall(b"reply")
        assert hears_nothing(proxy, client)
        proxy.heal()
        assert receive(client, 5) == b"reply"


@pytest.mark.parametrize("by_reset", [False, True])
def test_partition_hides_that_a_peer_has_gone(by_reset, proxy, listener):
    """Pins that a broker which ends in a partition is noticed only after it."""
    with connected(proxy, listener) as (client, served):
        proxy.partition()
        send_reset(served) if by_reset else served.close()
        assert hears_nothing(proxy, client)
        proxy.heal()
        if by_reset:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == b""


def test_new_connections_wait_for_a_partition_to_heal(proxy, listener):
    """Pins that a client which connects in a partition reaches nobody until it heals."""
    proxy.partition()
    with dial(proxy) as client:
        client.sendall(b"hello")
        assert hears_nothing(proxy, client)
        assert proxy.counters().accepted == 0
        proxy.heal()
        served, _ = listener.accept()
        with served:
            assert receive(served, 5) == b"hello"


def test_connection_given_up_in_a_partition_reaches_nobody(proxy, listener):
    """Pins that no stale CONNECT comes out of a partition and takes over the session of a live one."""
    proxy.partition()
    with dial(proxy) as gone:
        gone.sendall(b"stale")
    with dial(proxy) as client:
        client.sendall(b"fresh")
        proxy.heal()
        served, _ = listener.accept()
        with served:
            served.settimeout(PATIENCE_S)
            assert receive(served, 5) == b"fresh"
    assert proxy.counters().accepted == 1


def test_refused_clients_are_refused_and_open_ones_stay(proxy, listener):
    """Pins that refusal is the kernel's, that it spares what is open, and that the port stays the same."""
    with connected(proxy, listener) as (client, served):
        proxy.refuse()
        proxy.refuse()
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                dial(proxy)
        client.sendall(b"still here")
        assert receive(served, 10) == b"still here"
        proxy.admit()
        proxy.admit()
        with connected(proxy, listener) as (again, served_again):
            again.sendall(b"x")
            assert receive(served_again, 1) == b"x"


def test_refusal_and_partition_do_not_undo_each_other(proxy):
    """Pins that healing does not admit, and admitting does not heal."""
    proxy.refuse()
    proxy.partition()
    proxy.heal()
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    proxy.partition()
    proxy.admit()
    with dial(proxy) as client:
        assert hears_nothing(proxy, client)
        assert proxy.counters().accepted == 0


def test_absent_broker_resets_the_client_and_may_come_back():
    """Pins what a client sees while the broker restarts behind the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        address = first.getsockname()
    with FaultProxy(*address) as proxy:
        # The reset may be faster than the client's own connect.
        with pytest.raises(ConnectionResetError), dial(proxy) as client:
            client.recv(1)
        assert proxy.counters().unreachable == 1
        with socket.create_server(address) as listener, connected(proxy, listener) as (client, served):
            client.sendall(b"x")
            assert receive(served, 1) == b"x"
        assert proxy.counters().accepted == 2


def test_half_closed_connection_still_answers(proxy, listener):
    """Pins that one direction's end leaves the other open."""
    proxy.set_weather(up=Weather(latency_s=0.02))
    with connected(proxy, listener) as (client, served):
        client.sendall(b"last")
        client.shutdown(socket.SHUT_WR)
        assert receive(served, 5) == b"last"
        served.sendall(b"answer")
        assert receive(client, 6) == b"answer"
        assert proxy.counters().opened == 1
        served.close()
        assert client.recv(1) == b""
    assert proxy.counters().opened == 0


def test_reset_of_a_peer_is_passed_on(proxy, listener):
    """Pins that a crash looks like a crash from the other side."""
    with connected(proxy, listener) as (client, served):
        send_reset(client)
        with pytest.raises(ConnectionResetError):
            served.recv(1)
    assert proxy.counters().unreachable == 0


def test_slow_reader_stops_the_writer(listener):
    """Pins back-pressure: beyond its capacity the proxy leaves bytes in the sender's kernel."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    chunk = np.random.default_rng(2).bytes(65536)
    digest, sent, stuck = hashlib.sha256(), 0, 0
    with (
        FaultProxy(*listener.getsockname(), capacity_bytes=30_000) as proxy,
        connected(proxy, listener) as (client, served),
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
        assert hashlib.sha256(receive(served, sent)).digest() == digest.digest()


def test_connections_do_not_mix(proxy, listener):
    """Pins that each of many connections gets its own bytes back."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(connected(proxy, listener)) for _ in range(40)]
        for number, (client, _) in enumerate(pairs):
            client.sendall(b"%04d" % number)
        for number, (client, served) in enumerate(pairs):
            assert receive(served, 4) == b"%04d" % number
            served.sendall(b"%04d" % -number)
            assert receive(client, 4) == b"%04d" % -number
        assert proxy.counters().opened == 40
    assert proxy.counters().opened == 0


def test_waiting_costs_nothing(proxy, listener):
    """Pins that no state of a connection makes the loop spin: epoll reports hang-ups to all who are registered."""
    with connected(proxy, listener) as (client, served), connected(proxy, listener) as (other, other_served):
        assert idle_sockets_that_wake(proxy) == []
        client.shutdown(socket.SHUT_WR)
        assert idle_sockets_that_wake(proxy) == []
        proxy.partition()
        send_reset(other_served)
        served.close()
        assert idle_sockets_that_wake(proxy) == []
        proxy.cut(Cut.FIN)
        assert idle_sockets_that_wake(proxy) == []
        assert other.recv(1) == b""  # although its broker has reset
        other.sendall(b"x")
        assert idle_sockets_that_wake(proxy) == []


def test_leaving_resets_what_is_open(listener):
    """Pins that a proxy ends at once and leaves neither thread nor port nor connection behind."""
    with FaultProxy(*listener.getsockname()) as proxy, dial(proxy) as client:
        served, _ = listener.accept()
        proxy.__exit__(None, None, None)
        with served, pytest.raises(ConnectionResetError):
            served.recv(1)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
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
