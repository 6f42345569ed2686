"""The one writer of `trust/` and `blob/`.

Invariants:
- an order is committed to disk before anything of it is published;
- blobs, then bundle, then timestamp, then the clearing of what no release names: each waits until the broker has
  confirmed all of the one before;
- what is confirmed is known for this connection only: a broker that lost its retained messages gets all of them again;
- the ledger knows every blob that may be retained, so that none is left behind;
- a release that there is no room for is refused before anything is signed, and nothing else changes.

Killed anywhere, it goes on from the disk and repeats; repeating changes nothing.
"""

import datetime as dt
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from google.protobuf.message import Message

from cloud.blob_ledger import BlobLedger
from cloud.keys import KeyStore
from cloud.release_orders import checked_files
from cloud.release_store import Order, ReleaseStore
from cloud.repository import ROLLOUT, Generation, check_signers, renew, resign
from cloud.retained import (
    RETAINED_BUDGET_BYTES,
    OverBudgetError,
    check_budget,
    live_set,
    must_clear_first,
)
from cloud.rotation_check import DELEGATORS, checked_change
from shoal.codec import encode
from shoal.errors import LinkError, ShoalError
from shoal.link import Done
from shoal.routes import Route

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_RENEW_CHECK_S = 3600.0
# Orders of these bring no release.
_UNLIMITED = DELEGATORS | {ROLLOUT}


class PublishLink(Protocol):
    """What the publisher needs of a link."""

    connected: bool

    def publish(
        self,
        route: Route,
        message: Message | bytes,
        *,
        correlation: bytes = b"",
        expiry_s: int | None = None,
        qos: int | None = None,
        on_done: Done | None = None,
        **segments: str,
    ) -> bool: ...


class Publisher:
    """See the module. Call `on_connect` after each CONNACK and `tick` a few times a second.

    Args:
        keys: need the roles `snapshot` and `timestamp` only.
        budget_bytes: how much its live set may be, see `cloud.retained`.
        wall_clock: what metadata is signed with.

    Attributes:
        counters: orders_taken, orders_refused, orders_over_budget, blobs_published, blobs_cleared, publish_errors.
    """

    def __init__(
        self,
        link: PublishLink,
        store: ReleaseStore,
        keys: KeyStore,
        *,
        counters: Counter[str],
        budget_bytes: int = RETAINED_BUDGET_BYTES,
        wall_clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.counters = counters
        self._link = link
        self._store = store
        self._keys = keys
        self._budget_bytes = budget_bytes
        self._wall_clock = wall_clock
        self._renew_at = 0.0
        self._now = 0.0

    def start(self) -> None:
        """Read what is published.

        Raises:
            ConfigError: the store was never created, another publisher runs on it, or a key to sign with is missing.
        """
        # Refuses a directory that is no store, before a lock file lies there.
        check_signers(self._store.load(), self._keys)
        self._lock = self._store.own()
        self._generation = self._store.load()
        self._ledger = BlobLedger(self._store.directory / "blobs.sqlite")
        self._go_live(self._generation)
        self._forget_connection()

    @property
    def settled(self) -> bool:
        """Whether the broker has confirmed all of the newest generation, and nothing waits."""
        busy = self._todo or self._awaited or self._stale or self._clearing or self._store.orders()
        return not busy and self._acked.get(Route.TRUST_TIMESTAMP) == self._live.timestamp

    def retained(self) -> Counter[str]:
        """How much of its budget the live set takes: no counts, but NodeState has no other place for them."""
        return Counter(retained_bytes=self._live.size_bytes, retained_budget_bytes=self._budget_bytes)

    def on_connect(self) -> None:
        """Publish everything again: this broker may be another one, or have lost what it held."""
        self._forget_connection()
        self._pump()

    def tick(self, now: float) -> None:
        """Take orders, renew what grows old, and go on publishing."""
        self._now = now
        self._flush_cleared()
        for order in self._store.orders():
            if self._must_wait(order):
                break
            self._take(order)
        if now >= self._renew_at:
            self._renew_at = now + _RENEW_CHECK_S
            renewed = renew(self._generation, self._keys, self._wall_clock())
            if renewed is not None:
                self._commit(renewed, {})
        self._pump()

    def close(self) -> None:
        self._flush_cleared()
        self._ledger.close()
        self._lock.close()

    # -- orders --------------------------------------------------------------------------------------------------

    def _must_wait(self, order: Order) -> bool:
        if order.role in _UNLIMITED:
            return False
        return must_clear_first(
            present_bytes=self._live.size_bytes,
            stale_blobs=len(self._ledger.digests() - self._live.blobs.keys()),
            brought_bytes=order.size_bytes(),
            budget_bytes=self._budget_bytes,
        )

    def _take(self, order: Order) -> None:
        if order.metadata in (self._generation.roles.get(order.role), self._generation.roots[-1]):
            self._store.finish(order)  # killed after the commit
            return
        now = self._wall_clock()
        try:
            changed, files = self._checked(order, now)
        except ShoalError as exc:
            self.counters["orders_refused"] += 1
            if isinstance(exc, OverBudgetError):
                self.counters["orders_over_budget"] += 1
            log.error("order refused name=%s reason=%s", order.name, exc)  # noqa: TRY400  the reason says it all
            self._store.refuse(order, str(exc))
            return
        self._commit(resign(changed, self._keys, now), files)
        self._store.finish(order)
        self.counters["orders_taken"] += 1
        log.info("order taken name=%s", order.name)

    def _checked(self, order: Order, now: dt.datetime) -> tuple[Generation, dict[bytes, bytes]]:
        """What an order makes of the roots and roles, and the files that it brings.

        Raises:
            ShoalError: it must not be published.
        """
        if order.role in DELEGATORS:
            return checked_change(order, self._generation, self._keys, now), {}
        files = checked_files(order, self._generation, self._store, now)
        changed = replace(self._generation, roles={**self._generation.roles, order.role: order.metadata})
        if order.role not in _UNLIMITED:
            self._check_budget(order, changed, files)
        return changed, files

    def _check_budget(self, order: Order, changed: Generation, files: Mapping[bytes, bytes]) -> None:
        # With the present snapshot and timestamp: the next are as long, but for digits of their versions.
        proposed = live_set(
            changed, self._store, lambda sha256: files.get(sha256) or self._store.unchecked_file(sha256)
        )
        check_budget(
            f"role {order.role}",
            present_bytes=self._live.size_bytes,
            next_bytes=proposed.size_bytes,
            budget_bytes=self._budget_bytes,
        )

    def _commit(self, generation: Generation, files: dict[bytes, bytes]) -> None:
        self._store.commit(generation, files)
        self._go_live(generation)
        self._todo = deque(item for item in self._live.blobs if item not in self._confirmed | self._awaited)
        self._stale.clear()

    def _go_live(self, generation: Generation) -> None:
        self._generation = generation
        self._live = live_set(generation, self._store)
        self._ledger.add(self._live.blobs)

    # -- publishing ----------------------------------------------------------------------------------------------

    def _forget_connection(self) -> None:
        self._connection = object()
        self._confirmed: set[bytes] = set()
        self._awaited: set[bytes] = set()
        self._acked: dict[Route, bytes] = {}
        self._sent: dict[Route, bytes] = {}
        self._todo = deque(self._live.blobs)
        self._stale: deque[bytes] = deque()
        self._clearing: set[bytes] = set()
        self._cleared: list[bytes] = []
        self._paused_until = 0.0

    def _pump(self) -> None:
        """Send as much of the current step as the link takes."""
        if not self._link.connected or self._now < self._paused_until:
            return
        if not self._send_blobs() or self._awaited:
            return
        if not self._send_trust(Route.TRUST_BUNDLE, self._live.bundle):
            return
        if self._send_trust(Route.TRUST_TIMESTAMP, self._live.timestamp):
            self._clear_stale()

    def _send_blobs(self) -> bool:
        while self._todo:
            sha256 = self._todo[0]
            data = self._live.blobs[sha256].load()
            if not self._publish_blob(sha256, data, self._blob_done):
                return False
            self._awaited.add(sha256)
            self._todo.popleft()
        return True

    def _publish_blob(self, sha256: bytes, data: bytes, then: Callable[[bytes, LinkError | None], None]) -> bool:
        connection = self._connection

        def done(error: LinkError | None) -> None:
            if connection is self._connection:
                then(sha256, error)

        return self._link.publish(Route.BLOB, data, on_done=done, sha256=sha256.hex())

    def _blob_done(self, sha256: bytes, error: LinkError | None) -> None:
        self._awaited.discard(sha256)
        if error is not None:
            if sha256 in self._live.blobs:
                self._todo.append(sha256)
            self._pause(error)
            return
        self._confirmed.add(sha256)
        self.counters["blobs_published"] += 1
        self._pump()

    def _send_trust(self, route: Route, message: Message | bytes) -> bool:
        """Publish one of the trust topics unless the broker has it; true once it is confirmed."""
        payload = message if isinstance(message, bytes) else encode(message)
        if self._acked.get(route) == payload:
            return True
        if route not in self._sent:
            connection = self._connection

            def done(error: LinkError | None) -> None:
                if connection is self._connection:
                    self._trust_done(route, error)

            if self._link.publish(route, message, on_done=done):
                self._sent[route] = payload
        return False

    def _trust_done(self, route: Route, error: LinkError | None) -> None:
        payload = self._sent.pop(route)
        if error is not None:
            self._pause(error)
            return
        self._acked[route] = payload
        if self._acked.get(Route.TRUST_TIMESTAMP) == self._live.timestamp:
            self._stale = deque(sorted(self._ledger.digests() - self._live.blobs.keys()))
            log.info("generation published blobs=%d stale=%d", len(self._live.blobs), len(self._stale))
        self._pump()

    def _clear_stale(self) -> None:
        while self._stale:
            if self._stale[0] in self._live.blobs:
                self._stale.popleft()
                continue
            if not self._publish_blob(self._stale[0], b"", self._clear_done):
                return
            sha256 = self._stale.popleft()
            self._clearing.add(sha256)
            self._confirmed.discard(sha256)

    def _clear_done(self, sha256: bytes, error: LinkError | None) -> None:
        self._clearing.discard(sha256)
        if error is not None:
            self._stale.append(sha256)
            self._pause(error)
        elif sha256 not in self._live.blobs:
            self._cleared.append(sha256)
            self.counters["blobs_cleared"] += 1
        self._pump()

    def _flush_cleared(self) -> None:
        """Forget what was cleared, in one transaction; what became live again meanwhile stays known."""
        cleared: Iterable[bytes] = set(self._cleared) - self._live.blobs.keys()
        self._cleared = []
        if cleared:
            self._ledger.remove(cleared)

    def _pause(self, error: LinkError) -> None:
        """A refusal may last: an operator has to mend rights or limits."""
        self.counters["publish_errors"] += 1
        if self._paused_until <= self._now:
            log.warning("publishing paused error=%s", error)
        self._paused_until = self._now + _RETRY_S
