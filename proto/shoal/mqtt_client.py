"""paho's client with PUBLISH, PUBACK and SUBACK taken off its hands.

paho keeps connection, TLS, keep-alive, subscribing and every packet that is not the plain case. It reads a packet
byte by byte from the socket and builds half a dozen objects for each; this reads whatever the socket holds and sends
whatever a round of the loop produced, one system call each. It leans on private parts of the one paho version that the
constraints pin; tests/shoal/test_mqtt_client.py fails when they change.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from shoal.wire import (
    DISCONNECT,
    PUBACK,
    PUBLISH,
    SUBACK,
    UNSUBACK,
    MalformedPacketError,
    Puback,
    Publish,
    packet_bounds,
    parse_puback,
    parse_publish,
    parse_suback,
)

_READ_BYTES = 256 * 1024
_KIND = 0xF0


class WireClient(Client):
    """One connection's client: a fresh one for each.

    Args:
        max_packet_bytes: what the broker was told; a longer packet ends the connection.
        on_publish_received, on_puback, on_suback: for every plain packet of that kind; never called by paho.
    """

    def __init__(
        self,
        client_id: str,
        *,
        max_packet_bytes: int,
        on_publish_received: Callable[[Publish], None],
        on_puback: Callable[[Puback], None],
        on_suback: Callable[[bytes], None],
    ) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True)
        self._max_packet_bytes = max_packet_bytes
        self._on_publish_received = on_publish_received
        self._on_puback = on_puback
        self._on_suback = on_suback
        self._unread = b""
        self._for_paho = memoryview(b"")

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:  # noqa: ARG002  paho ignores it too
        """Read what the socket holds and handle every packet that is complete."""
        if self._sock is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        try:
            data = super()._sock_recv(_READ_BYTES)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError:
            data = b""
        if not data:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        self._last_bytes_received = time.monotonic()
        self._unread = self._unread + data if self._unread else data
        return self._handle_packets()

    def send_packets(self, packets: bytes) -> None:
        """Send encoded packets after whatever waits already; what the socket does not take now goes later."""
        self._out_packet.append(
            {
                # For paho one packet of a kind that it does nothing more about once it is sent.
                "command": PUBACK,
                "mid": 0,
                "qos": 0,
                "pos": 0,
                "to_process": len(packets),
                "packet": packets,
                "info": None,
            }
        )
        self.loop_write()

    def say_goodbye(self, patience_s: float) -> None:
        """Send DISCONNECT and wait until the broker has closed the connection.

        Closed from here with anything unread in it, the line is reset, and a broker that has not read the DISCONNECT
        by then publishes the will.
        """
        deadline = time.monotonic() + patience_s
        self.send_packets(DISCONNECT)
        while self._sock is not None and self.want_write() and time.monotonic() < deadline:
            self.loop_write()
        if self._sock is None or self.want_write():
            return
        sock = cast("socket.socket", self._sock)
        with suppress(OSError):  # a timeout is one too
            while (left_s := deadline - time.monotonic()) > 0:
                sock.settimeout(left_s)
                if not sock.recv(_READ_BYTES):
                    return

    def is_stuck(self, backlog_bytes: int) -> bool:
        """The socket has left more than this untaken."""
        return bool(self._out_packet) and sum(packet["to_process"] for packet in self._out_packet) > backlog_bytes

    def next_packet_id(self) -> int:
        """A packet identifier; SUBSCRIBE draws from the same row."""
        return self._mid_generate()

    def _handle_packets(self) -> MQTTErrorCode:
        data, start = self._unread, 0
        self._unread = b""
        while start < len(data):
            try:
                bounds = packet_bounds(data, start, self._max_packet_bytes)
            except MalformedPacketError:
                return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_PROTOCOL)
            if bounds is None:
                break
            body, end = bounds
            if not self._handle_plain(data, start, body, end):
                self._for_paho = memoryview(data)[start:end]
                code = self._packet_read()
                if code > 0:
                    return self._loop_rc_handle(code)
            if self._sock is None:  # a callback has closed it
                return MQTTErrorCode.MQTT_ERR_NO_CONN
            start = end
        self._unread = data[start:]
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_plain(self, data: bytes, start: int, body: int, end: int) -> bool:
        kind = data[start] & _KIND
        if kind == PUBLISH:
            publish = parse_publish(data, start, body, end)
            if publish is not None:
                self._on_publish_received(publish)
                return True
        elif kind == PUBACK:
            puback = parse_puback(data, body, end)
            if puback is not None:
                self._on_puback(puback)
                return True
        elif kind == SUBACK:
            reasons = parse_suback(data, body, end)
            if reasons is not None:
                self._on_suback(reasons)
                return True
        # Nobody waits for an UNSUBACK, and paho takes as long to say so as a small PUBLISH takes altogether.
        return kind == UNSUBACK

    def _sock_recv(self, bufsize: int) -> bytes:
        """What paho's own reader gets: the one packet that is its business."""
        part, self._for_paho = self._for_paho[:bufsize], self._for_paho[bufsize:]
        return bytes(part)
