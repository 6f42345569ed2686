import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from simulator.pipe import Weather
from simulator.proxy import Cut, FaultProxy

PATIENCE_S = 20.0  # of a call that must not take long; no test waits for it to pass


def test_reset_cut_is_seen_by_both_peers(net):
    """Pins that a cut is a reset, at once, on every open connection."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(net.connected()) for _ in range(3)]
        assert net.proxy.cut(Cut.RST) == 3
        for sock in (sock for pair in pairs for sock in pair):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    counters = net.proxy.counters()
    assert (counters.cut, counters.opened) == (3, 0)


def test_orderly_cut_is_an_end_for_both_peers(net):
    """Pins that a FIN cut never becomes a reset, even over bytes that nobody will read."""
    with net.connected() as (client, served):
        net.proxy.partition()
        client.sendall(b"lost")
        assert net.proxy.cut(Cut.FIN) == 1
        assert net.proxy.counters().opened == 0
        for sock in (client, served):
            assert sock.recv(1) == b""
            sock.sendall(b"lost too")
            net.proxy.counters()
            assert sock.recv(1) == b""
        net.proxy.heal()
        assert net.hears_nothing(served) is False  # the end again, not the lost bytes
    assert net.proxy.counters().bytes_up == 0


@pytest.mark.parametrize("how", list(Cut))
def test_clients_reconnect_after_a_cut(how, net):
    """Pins that a cut is of connections that are open, and of each once."""
    with net.dial():
        assert net.proxy.cut(how) == 1
        assert net.proxy.cut(how) == 0
    net.listener.accept()[0].close()
    with net.connected() as (client, served):
        client.sendall(b"back")
        assert net.receive(served, 4) == b"back"


def test_command_finds_everything_its_caller_did_before(net, monkeypatch):
    """Pins the order: a connection made before a cut is cut, even when the proxy had polled before both."""
    is_busy, go_on = threading.Event(), threading.Event()
    advance = net.proxy._advance

    def busy(connection):
        is_busy.set()
        assert go_on.wait(PATIENCE_S)
        advance(connection)

    with net.connected() as (client, _), ThreadPoolExecutor() as pool:
        net.proxy.counters()  # its round that accepted the client is over
        monkeypatch.setattr(net.proxy, "_advance", busy)
        client.sendall(b"x")
        assert is_busy.wait(PATIENCE_S)
        with net.dial():
            cut = pool.submit(net.proxy.cut, Cut.RST)
            while net.proxy._commands.empty():
                time.sleep(0)
            go_on.set()
            assert cut.result(PATIENCE_S) == 2


def test_partition_holds_and_heals(net):
    """Pins that a partition passes nothing, shows nothing and loses nothing."""
    with net.connected() as (client, served):
        client.sendall(b"1")
        assert net.receive(served, 1) == b"1"
        net.proxy.partition()
        client.sendall(b"23")
        served.sendall(b"ab")
        assert net.hears_nothing(served)
        assert net.hears_nothing(client)
        net.proxy.heal()
        assert net.receive(served, 2) == b"23"
        assert net.receive(client, 2) == b"ab"


def test_block_can_be_one_way(net):
    """Pins the fault in which requests arrive and replies do not."""
    net.proxy.counters()
    with net.connected() as (client, served):
        net.proxy.set_weather(down=Weather(is_blocked=True))
        client.sendall(b"question")
        assert net.receive(served, 8) == b"question"
        served.sendall(b"reply")
        assert net.hears_nothing(client)
        net.proxy.heal()
        assert net.receive(client, 5) == b"reply"


@pytest.mark.parametrize("by_reset", [False, True])
def test_partition_hides_that_a_peer_has_gone(by_reset, net):
    """Pins that a broker which ends in a partition is noticed only after it."""
    with net.connected() as (client, served):
        net.proxy.partition()
        net.reset(served) if by_reset else served.close()
        assert net.hears_nothing(client)
        net.proxy.heal()
        if by_reset:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == b""


def test_new_connections_wait_for_a_partition_to_heal(net):
    """Pins that a client which connects in a partition reaches nobody until it heals."""
    net.proxy.partition()
    with net.dial() as client:
        client.sendall(b"hello")
        assert net.hears_nothing(client)
        assert net.proxy.counters().accepted == 0
        net.proxy.heal()
        served, _ = net.listener.accept()
        with served:
            assert net.receive(served, 5) == b"hello"


def test_connection_given_up_in_a_partition_reaches_nobody(net):
    """Pins that no stale CONNECT comes out of a partition and takes over the session of a live one."""
    net.proxy.partition()
    with net.dial() as gone:
        gone.sendall(b"stale")
    with net.dial() as client:
        client.sendall(b"fresh")
        net.proxy.heal()
        served, _ = net.listener.accept()
        with served:
            served.settimeout(PATIENCE_S)
            assert net.receive(served, 5) == b"fresh"
    assert net.proxy.counters().accepted == 1


def test_refused_clients_are_refused_and_open_ones_stay(net):
    """Pins that refusal is the kernel's, that it spares what is open, and that the port stays the same."""
    with net.connected() as (client, served):
        net.proxy.refuse()
        net.proxy.refuse()
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                net.dial()
        client.sendall(b"still here")
        assert net.receive(served, 10) == b"still here"
        net.proxy.admit()
        net.proxy.admit()
        with net.connected() as (again, served_again):
            again.sendall(b"x")
            assert net.receive(served_again, 1) == b"x"


def test_refusal_and_partition_do_not_undo_each_other(net):
    """Pins that healing does not admit, and admitting does not heal."""
    net.proxy.refuse()
    net.proxy.partition()
    net.proxy.heal()
    with pytest.raises(ConnectionRefusedError):
        net.dial()
    net.proxy.partition()
    net.proxy.admit()
    with net.dial() as client:
        assert net.hears_nothing(client)
        assert net.proxy.counters().accepted == 0


def test_absent_broker_resets_the_client_and_may_come_back(loopback):
    """Pins what a client sees while the broker restarts behind the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        address = first.getsockname()
    with FaultProxy(*address) as proxy:
        # The reset may be faster than the client's own connect.
        with pytest.raises(ConnectionResetError), loopback(proxy).dial() as client:
            client.recv(1)
        assert proxy.counters().unreachable == 1
        with socket.create_server(address) as listener, loopback(proxy, listener).connected() as (client, served):
            client.sendall(b"x")
            assert loopback.receive(served, 1) == b"x"
        assert proxy.counters().accepted == 2
