"""From received bytes to typed handlers. No I/O: the link feeds it, tests feed it bytes."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from google.protobuf.message import Message

from shoal.codec import decode
from shoal.errors import PayloadError
from shoal.routes import ROUTES, Address, Route, RouteSpec, parse_topic

log = logging.getLogger(__name__)


class Delivery(NamedTuple):
    """One received message. `message` is None before its turn, on opaque routes and for cleared topics."""

    address: Address
    payload: bytes
    message: Message | None
    retained: bool
    qos: int
    correlation: bytes
    response_topic: str
    ack: Callable[[], None]


Handler = Callable[[Delivery], None]
BadHook = Callable[[Delivery, PayloadError], None]
PostponeHook = Callable[[Delivery], bool]


class _Entry(NamedTuple):
    handler: Handler
    ack_late: bool
    spec: RouteSpec


class Inbox:
    """One handler for each route; decodes, counts what cannot be used, and acknowledges in every case.

    A handler may raise `PayloadError`: the message is counted as bad and goes no further, so that it never
    blocks the queue behind it.
    """

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._handlers: dict[Route, _Entry] = {}
        self._bad_hooks: dict[Route, BadHook] = {}
        self._postpone_hooks: dict[Route, PostponeHook] = {}

    def register(self, route: Route, handler: Handler, *, ack_late: bool) -> None:
        """Name the handler of a route.

        Raises:
            ValueError: the route has another handler already.
        """
        entry = _Entry(handler, ack_late, ROUTES[route])
        if self._handlers.setdefault(route, entry) != entry:
            raise ValueError(f"{route} has a handler already")

    def on_bad(self, route: Route, hook: BadHook) -> None:
        self._bad_hooks[route] = hook

    def on_arrival(self, route: Route, hook: PostponeHook) -> None:
        """Ask `hook` before a message of `route` is decoded; where it says True, it calls `handle` itself, later."""
        self._postpone_hooks[route] = hook

    def receive(
        self,
        topic_text: str,
        payload: bytes,
        *,
        retained: bool,
        ack: Callable[[], None],
        qos: int = 1,
        correlation: bytes = b"",
        response_topic: str = "",
    ) -> None:
        """Hand one message to its handler."""
        try:
            address = parse_topic(topic_text)
        except PayloadError as exc:
            self._count_bad(topic_text, exc)
            ack()
            return
        route = address.route
        entry = self._handlers.get(route)
        if entry is None or (retained and not entry.spec.retain):
            # A retained command would be obeyed again by every node that ever connects.
            self._counters["ignored_messages"] += 1
            ack()
            return
        delivery = Delivery(address, payload, None, retained, qos, correlation, response_topic, ack)
        postpone = self._postpone_hooks.get(route)
        if postpone is None or not postpone(delivery):
            self._handle(entry, delivery)

    def handle(self, delivery: Delivery) -> None:
        """Decode one message that was postponed and hand it to its handler."""
        self._handle(self._handlers[delivery.address.route], delivery)

    def _handle(self, entry: _Entry, delivery: Delivery) -> None:
        address, payload, _, retained, qos, correlation, response_topic, ack = delivery
        try:
            message = _message_of(entry.spec, payload)
            entry.handler(Delivery(address, payload, message, retained, qos, correlation, response_topic, ack))
        except PayloadError as exc:
            self._count_bad(address.route.value, exc)
            if address.route in self._bad_hooks:
                self._bad_hooks[address.route](delivery, exc)
            ack()
            return
        if not entry.ack_late:
            ack()

    def _count_bad(self, where: str, error: PayloadError) -> None:
        self._counters["bad_payloads"] += 1
        log.debug("bad payload on=%s error=%s", where, error)


def _message_of(spec: RouteSpec, payload: bytes) -> Message | None:
    if spec.message is None or (spec.retain and not payload):
        return None
    return decode(spec.message, payload)
