"""Obeys commands: one handler for each action, an answer to every command, each command once.

An answer that the link does not take, or that a connection loses, is kept and sent when there is room.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from shoal.errors import LinkError, PayloadError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import Route
from shoal.v1 import command_pb2 as pb

# A command repeated by QoS 1 is answered from memory; older ones have expired by any sane expiry.
_REMEMBERED = 256
_MAX_ID_BYTES = 64
# Answers that wait for the link; beyond it the oldest goes, whose sender has long given up.
_MAX_KEPT = 64

# Does what the action asks and returns a sentence about it; raises PayloadError to refuse.
Action = Callable[[Any], str]


class CommandDesk:
    """Takes a node's commands. `actions` maps the names of `Command.action` to what does them.

    Call `tick` now and then, so that kept answers leave.
    """

    def __init__(
        self,
        link: Link,
        site: str,
        node: str,
        actions: Mapping[str, Action],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._site = site
        self._node = node
        self._actions = actions
        self._wall_clock = wall_clock
        self._done: OrderedDict[bytes, pb.CommandResult] = OrderedDict()
        self._kept: deque[tuple[bytes, pb.CommandResult]] = deque(maxlen=_MAX_KEPT)
        link.on_connect(self.tick)
        link.subscribe(Route.COMMAND, self._on_command, site=site, node=node)

    def _on_command(self, delivery: Delivery) -> None:
        command = delivery.message
        if not isinstance(command, pb.Command) or not 0 < len(command.id) <= _MAX_ID_BYTES:
            raise PayloadError(f"a command without an id of 1 to {_MAX_ID_BYTES} bytes cannot be answered", field="id")
        if command.id not in self._done:
            self._done[command.id] = self.obey(command)
            if len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
        self._kept.append((delivery.correlation, self._done[command.id]))
        self.tick()

    def tick(self) -> None:
        """Send the answers that were kept, as far as the link takes them."""
        while self._kept and self._send(*self._kept[0]):
            self._kept.popleft()

    def _send(self, correlation: bytes, result: pb.CommandResult) -> bool:
        return self._link.publish(
            Route.RESULT,
            result,
            correlation=correlation,
            on_done=partial(self._settle, correlation, result),
            site=self._site,
            node=self._node,
        )

    def _settle(self, correlation: bytes, result: pb.CommandResult, error: LinkError | None) -> None:
        if error is not None and not error.permanent:
            self._kept.append((correlation, result))

    def obey(self, command: pb.Command) -> pb.CommandResult:
        """Do one command, whatever came before."""
        result = pb.CommandResult(id=command.id)
        name = command.WhichOneof("action")
        action = self._actions.get(name or "")
        if command.expires_at_us <= self._wall_clock() * 1e6:
            result.status = pb.COMMAND_STATUS_EXPIRED
            result.message = "it came after its expiry" if command.expires_at_us else "expires_at_us is required"
        elif action is None:
            result.status, result.message = pb.COMMAND_STATUS_REFUSED, f"{name or 'no action'} is not done here"
        else:
            try:
                result.message = action(getattr(command, name or ""))
                result.status = pb.COMMAND_STATUS_DONE
            except PayloadError as exc:
                result.status, result.message = pb.COMMAND_STATUS_REFUSED, str(exc)
        return result
