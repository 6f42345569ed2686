"""PUBACKs leave in the order in which the messages came, however late each is ready. Pure.

MQTT 5, section 4.6: PUBACKs go out in the order in which the PUBLISH packets came in; rumqttd ends the connection of a
client that does otherwise.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Received:
    packet_id: int
    is_ready: bool = False


class AckQueue:
    """One connection's unacknowledged messages; bounded by our own receive-maximum, which the broker keeps to."""

    def __init__(self, send: Callable[[int], object]) -> None:
        """Store how one acknowledgement is sent, by packet id."""
        self._send = send
        self._received: deque[_Received] = deque()

    def __len__(self) -> int:
        return len(self._received)

    def expect(self, packet_id: int) -> Callable[[], None]:
        """Take down a message; call what is returned, once or more often, when it may be acknowledged."""
        entry = _Received(packet_id)
        self._received.append(entry)

        def ready() -> None:
            entry.is_ready = True
            self._flush()

        return ready

    def _flush(self) -> None:
        while self._received and self._received[0].is_ready:
            self._send(self._received.popleft().packet_id)
