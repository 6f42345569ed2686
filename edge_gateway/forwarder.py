"""Carries promised samples to the cloud: out of the outbox, again until acknowledged."""

import logging
from collections import Counter

from shoal.delivery.outbox import Item, Key, Outbox
from shoal.errors import LinkError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import Route
from shoal.v1.sample_pb2 import Sample, SampleAck, SampleBatch, SampleGroup

log = logging.getLogger(__name__)

_MAX_SAMPLES = 128
# Well below what one message may carry, so that one more sample always fits.
_MAX_BATCH_BYTES = 256 * 1024


class Forwarder:
    """Sends what waits in the gateway's outbox, oldest first; only the cloud's ack lets a sample go.

    Args:
        linger_s: samples wait this long for company in one message.
        retry_after_s: without an ack a sample is sent again after this.
    """

    def __init__(
        self, link: Link, outbox: Outbox, site: str, node: str, *, linger_s: float = 0.5, retry_after_s: float = 10.0
    ) -> None:
        self._link = link
        self._outbox = outbox
        self._site = site
        self._node = node
        self._linger_s = linger_s
        self._retry_after_s = retry_after_s
        self._next_at = 0.0
        link.subscribe(Route.ACK, self._on_ack, site=site, node=node)

    def tick(self, now: float) -> None:
        """Send what is due, at most once in `linger_s`."""
        if now < self._next_at or not self._link.connected:
            return
        self._next_at = now + self._linger_s
        while self._link.room() > 0:
            taken = [item for item, _ in self._outbox.take(now, _MAX_SAMPLES, self._retry_after_s)]
            sent = [self._send(items, now) for items in _split(taken)]
            if not all(sent) or len(taken) < _MAX_SAMPLES:
                return

    def _send(self, items: list[Item], now: float) -> bool:
        keys = [item.key for item in items]

        def done(error: LinkError | None) -> None:
            if error is not None and not error.permanent:
                self._outbox.make_due(keys, now)
            elif error is not None:
                # Kept: a promise is a promise. An operator mends the right, and the retry delivers.
                log.error("samples refused node=%s samples=%d error=%s", self._node, len(keys), error)

        batch = SampleBatch(gateway=self._node, groups=_grouped(items))
        sent = self._link.publish(Route.SAMPLE, batch, on_done=done, site=self._site, node=self._node)
        if not sent:
            self._outbox.make_due(keys, now)
        return sent

    def _on_ack(self, delivery: Delivery) -> None:
        ack = delivery.message
        if not isinstance(ack, SampleAck):
            return
        for group in ack.groups:
            for seqs, outcome in ((group.stored, "samples.stored"), (group.quarantined, "samples.quarantined")):
                for seq in seqs:
                    self._outbox.settle(Key(group.device, group.epoch, seq), outcome)


def sample_counters(outbox: Outbox) -> Counter[str]:
    """The outbox's counters under the names that NodeState carries."""
    counters = outbox.counters()
    counters["samples.promised"] = counters.pop("accepted", 0)
    counters["samples.waiting"] = outbox.in_flight
    return counters


def _split(items: list[Item]) -> list[list[Item]]:
    """Cut a list so that no part is larger than a message should be."""
    parts: list[list[Item]] = []
    size = _MAX_BATCH_BYTES
    for item in items:
        if size + len(item.payload) > _MAX_BATCH_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += len(item.payload)
    return parts


def _grouped(items: list[Item]) -> list[SampleGroup]:
    groups: dict[tuple[str, bytes, str], SampleGroup] = {}
    for item in items:
        owner = (item.key.device, item.key.epoch, item.model)
        group = groups.setdefault(owner, SampleGroup(device=owner[0], epoch=owner[1], model=owner[2]))
        group.samples.append(Sample.FromString(item.payload))
    return list(groups.values())
