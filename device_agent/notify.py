"""Tells systemd how the service is: one datagram for each thing said, to the socket that systemd names.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"
# Of the watchdog's patience: two beats may be late before a third decides.
_BEAT = 1 / 3


class Notifier:
    """Silent where nobody asked. Never raises: a deaf supervisor is no reason to end.

    Attributes:
        beat_s: how often `ALIVE` is wanted; None where no watchdog waits for it.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, pid: int | None = None) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        is_watched = environment.get("WATCHDOG_PID") in (None, str(pid or os.getpid()))
        patience_us = environment.get("WATCHDOG_USEC", "")
        self.beat_s = int(patience_us) / 1e6 * _BEAT if is_watched and patience_us.isdecimal() else None

    def tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), self._address)
        except OSError as exc:
            log.warning("systemd was not told state=%s error=%s", state, exc)
