"""Binds a `Transfer` to a link: the only place that subscribes to blob topics."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from shoal.inbox import Delivery, Handler
from shoal.release.transfer import Action, Subscribe, Transfer
from shoal.routes import Route

OnBlob = Callable[[bytes, bytes], None]


class Subscriber(Protocol):
    """What fetching needs of a link."""

    def subscribe(
        self, route: Route, handler: Handler, *, group: str | None = None, ack_late: bool = False, **segments: str
    ) -> None: ...

    def unsubscribe(self, route: Route, *, group: str | None = None, **segments: str) -> None: ...


class BlobFetch:
    """Fetches blobs for several readers over one link."""

    def __init__(self, link: Subscriber, rng: random.Random, counters: Counter[str]) -> None:
        self._link = link
        self._transfer = Transfer(rng, counters)
        self._readers: dict[bytes, list[OnBlob]] = {}

    def want(self, lengths: Mapping[bytes, int], on_blob: OnBlob) -> None:
        """Call `on_blob(sha256, payload)` once for each of these blobs, when it is here and verified."""
        for sha256 in lengths:
            readers = self._readers.setdefault(sha256, [])
            if on_blob not in readers:
                readers.append(on_blob)
        self._do(self._transfer.want(lengths))

    def forget(self, digests: Iterable[bytes], on_blob: OnBlob) -> None:
        """Stop calling `on_blob` for these; a blob that nobody reads is no longer fetched."""
        unread = []
        for sha256 in digests:
            readers = self._readers.get(sha256, [])
            if on_blob in readers:
                readers.remove(on_blob)
            if not readers and self._readers.pop(sha256, None) is not None:
                unread.append(sha256)
        self._do(self._transfer.forget(unread))

    def tick(self, now: float) -> None:
        self._do(self._transfer.tick(now))

    def _on_delivery(self, delivery: Delivery) -> None:
        sha256 = bytes.fromhex(delivery.address.sha256)
        accepted, actions = self._transfer.receive(sha256, delivery.payload)
        self._do(actions)
        if accepted:
            for on_blob in self._readers.pop(sha256, []):
                on_blob(sha256, delivery.payload)

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Subscribe):
                self._link.subscribe(Route.BLOB, self._on_delivery, sha256=action.sha256.hex())
            else:
                self._link.unsubscribe(Route.BLOB, sha256=action.sha256.hex())
