"""Which topics the broker still has to be told of, and in which packets. Pure.

Invariants:
- the book changes at once, the broker hears of it when `take` is called: a connection that is made in between asks
  for exactly what is wanted then;
- a retained topic that the broker may hold already is unsubscribed before it is subscribed again.
"""

from dataclasses import dataclass

from shoal.routes import ROUTES, Route

# AWS IoT Core takes no more topics in one SUBSCRIBE or UNSUBSCRIBE.
TOPICS_IN_PACKET = 8


@dataclass(frozen=True, slots=True)
class Packets:
    """The topics of each packet, in the order of sending."""

    unsubscribe: list[list[str]]
    subscribe: list[list[str]]


class Subscriptions:
    """One link's filters, over all its connections."""

    def __init__(self) -> None:
        self._wanted: dict[str, Route] = {}
        self._to_subscribe: dict[str, None] = {}
        self._to_unsubscribe: dict[str, None] = {}
        # What the broker has from us; None while an older session may have left it anything.
        self._held: set[str] | None = None

    def add(self, pattern: str, route: Route) -> None:
        self._wanted[pattern] = route
        self._to_subscribe[pattern] = None

    def remove(self, pattern: str) -> None:
        if self._wanted.pop(pattern, None) is not None:
            self._to_subscribe.pop(pattern, None)
            self._to_unsubscribe[pattern] = None

    def connect(self, *, session_present: bool) -> None:
        """A new connection: all that is wanted must be asked for, and nothing else is known."""
        self._held = None if session_present else set()
        self._to_subscribe = dict.fromkeys(self._wanted)
        if not session_present:
            self._to_unsubscribe.clear()

    def take(self) -> Packets:
        """What to send now, as if it was sent."""
        subscribe, unsubscribe = list(self._to_subscribe), self._to_unsubscribe
        self._to_subscribe, self._to_unsubscribe = {}, {}
        for pattern in subscribe:
            # iotcore sends retained messages only for a subscription that it does not have yet.
            if ROUTES[self._wanted[pattern]].retain and (self._held is None or pattern in self._held):
                unsubscribe[pattern] = None
        if self._held is not None:
            self._held.difference_update(unsubscribe)
            self._held.update(subscribe)
        return Packets(_packets(list(unsubscribe)), _packets(subscribe))


def _packets(patterns: list[str]) -> list[list[str]]:
    return [patterns[at : at + TOPICS_IN_PACKET] for at in range(0, len(patterns), TOPICS_IN_PACKET)]
