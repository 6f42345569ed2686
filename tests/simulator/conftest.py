import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from simulator.datasets import DataSet, load_digits, load_shuttle
from simulator.proxy import FaultProxy

PATIENCE_S = 20.0  # of a call that must not take long; no test waits for it to pass


@pytest.fixture(scope="session")
def shuttle_data() -> DataSet:
    return load_shuttle()


@pytest.fixture(scope="session")
def digits_data() -> DataSet:
    return load_digits()


class Loopback:
    """Real clients of a real server, through a proxy."""

    def __init__(self, proxy: FaultProxy, listener: socket.socket | None = None) -> None:
        self.proxy = proxy
        self.listener = listener

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.proxy.port), timeout=PATIENCE_S)

    @contextmanager
    def connected(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Yield a client and what the server accepted of it."""
        with self.dial() as client:
            served, _ = self.listener.accept()
            with served:
                served.settimeout(PATIENCE_S)
                yield client, served

    def hears_nothing(self, sock: socket.socket) -> bool:
        """Say that nothing came, after the proxy has served everything that is ready now."""
        self.proxy.counters()
        sock.setblocking(False)
        try:
            sock.recv(1)
        except BlockingIOError:
            return True
        finally:
            sock.settimeout(PATIENCE_S)
        return False

    @staticmethod
    def receive(sock: socket.socket, size: int) -> bytes:
        """Read exactly `size` bytes, or all there are before the end."""
        received = bytearray()
        while len(received) < size and (data := sock.recv(min(65536, size - len(received)))):
            received += data
        return bytes(received)

    @staticmethod
    def reset(sock: socket.socket) -> None:
        """Close with a reset instead of a FIN."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


@pytest.fixture
def loopback() -> type[Loopback]:
    return Loopback


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server's listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(PATIENCE_S)
        yield sock


@pytest.fixture
def net(listener: socket.socket) -> Iterator[Loopback]:
    with FaultProxy(*listener.getsockname()) as proxy:
        yield Loopback(proxy, listener)
