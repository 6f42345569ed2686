"""Obeys commands: one handler for each action, an answer to every command, each command once."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from shoal.errors import PayloadError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import Route
from shoal.v1 import command_pb2 as pb

# A command repeated by QoS 1 is answered from memory; older ones have expired by any sane expiry.
_REMEMBERED = 256
_MAX_ID_BYTES = 64

# Does what the action asks and returns a sentence about it; raises PayloadError to refuse.
Action = Callable[[Any], str]


class CommandDesk:
    """Takes a node's commands. `actions` maps the names of `Command.action` to what does them."""

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
        link.subscribe(Route.COMMAND, self._on_command, site=site, node=node)

    def _on_command(self, delivery: Delivery) -> None:
        command = delivery.message
        if not isinstance(command, pb.Command) or not 0 < len(command.id) <= _MAX_ID_BYTES:
            raise PayloadError(f"a command without an id of 1 to {_MAX_ID_BYTES} bytes cannot be answered", field="id")
        if command.id not in self._done:
            self._done[command.id] = self.obey(command)
            if len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
        result = self._done[command.id]
        self._link.publish(Route.RESULT, result, correlation=delivery.correlation, site=self._site, node=self._node)

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
