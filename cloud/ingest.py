"""Ingest: samples into the store, then the acknowledgement; labels beside them.

Invariants:
- an ack follows the commit, and the PUBACK follows the ack: a kill in between repeats, and repeating changes nothing;
- a sample that can never be stored is set aside and acknowledged as quarantined, so that nothing behind it waits.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from cloud.boots import is_boot
from cloud.sample_store import MAX_SEQ, Fate, SampleStore, StoredLabel, StoredSample
from shoal.commands import CommandDesk
from shoal.errors import PayloadError
from shoal.ids import parse_id
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import CLOUD_SITE, Route
from shoal.tensors import check_epoch, check_identity
from shoal.v1 import command_pb2
from shoal.v1.inference_pb2 import Answer
from shoal.v1.node_pb2 import NodeState
from shoal.v1.sample_pb2 import Sample, SampleAck, SampleAckGroup, SampleBatch, SampleGroup

log = logging.getLogger(__name__)

SERVICE = "ingest"
_GROUP = "ingest"
_MAX_SAMPLES = 4096
# Of one transaction: more would save nothing, and while it runs the gateways wait for their acks.
_ENOUGH_SAMPLES = 2048

# A sample that can never be stored, and why.
Refused = tuple[Sample, str]


@dataclass(frozen=True, slots=True)
class _Batch:
    site: str
    gateway: str
    message: SampleBatch
    ack: Callable[[], None]


class _Group(NamedTuple):
    """What a gateway sent of one device: rows to store, what can never be one, and where the gateway is told."""

    gateway: str
    answer: SampleAckGroup
    rows: list[StoredSample]
    refused: list[Refused]


class Ingest:
    """Call `flush` when the sockets are drained. Several ingest processes may share the work."""

    def __init__(self, link: Link, store: SampleStore, wall_clock: Callable[[], float] = time.time) -> None:
        self.counters: Counter[str] = Counter()
        self._link = link
        self._store = store
        self._wall_clock = wall_clock
        self._waiting: list[_Batch] = []
        self._waiting_samples = 0
        # Stored, and not yet acknowledged. No more than the link's receive-maximum, for their PUBACKs wait too.
        self._acks: deque[tuple[_Batch, SampleAck]] = deque()
        CommandDesk(link, CLOUD_SITE, SERVICE, {"add_labels": self.add_labels}, wall_clock)
        link.subscribe(Route.SAMPLE, self._on_batch, group=_GROUP, ack_late=True)
        link.subscribe(Route.STATE, self._on_state)

    def _on_batch(self, delivery: Delivery) -> None:
        message = delivery.message
        if not isinstance(message, SampleBatch) or message.gateway != delivery.address.node:
            raise PayloadError(f"not the batch of {delivery.address.node!r}", field="gateway")
        count = sum(len(group.samples) for group in message.groups)
        if count > _MAX_SAMPLES:
            raise PayloadError(f"more than {_MAX_SAMPLES} samples", field="groups")
        self._waiting.append(_Batch(delivery.address.site, message.gateway, message, delivery.ack))
        self._waiting_samples += count
        if self._waiting_samples >= _ENOUGH_SAMPLES:
            self.flush()
            self._link.flush()

    def _on_state(self, delivery: Delivery) -> None:
        if isinstance(delivery.message, NodeState):
            self._store.boots.note(delivery.message, int(self._wall_clock() * 1e6), retained=delivery.retained)

    def flush(self) -> None:
        """Store everything that has arrived in one transaction, then acknowledge it."""
        if self._waiting:
            self._store_waiting(int(self._wall_clock() * 1e6))
        self._acknowledge()

    def _store_waiting(self, now_us: int) -> None:
        groups: list[_Group] = []
        acks: list[tuple[_Batch, SampleAck]] = []
        for batch in self._waiting:
            ack = SampleAck()
            acks.append((batch, ack))
            for group in batch.message.groups:
                answer = ack.groups.add(device=group.device, epoch=group.epoch)
                groups.append(_Group(batch.gateway, answer, *read_group(batch.gateway, group, now_us)))
        fates = iter(self._store.add([row for group in groups for row in group.rows]))
        self._waiting, self._waiting_samples = [], 0
        for read in groups:
            self._judge(read, list(islice(fates, len(read.rows))), now_us)
            for sample, reason in read.refused:
                self._set_aside(read, sample, reason, now_us)
        self._acks.extend(acks)

    def _acknowledge(self) -> None:
        while self._acks:
            batch, ack = self._acks[0]
            sent = self._link.publish(Route.ACK, ack, site=batch.site, node=batch.gateway)
            if not sent and self._link.connected:
                return  # the window is full; the next PUBACK makes room
            self._acks.popleft()
            # Unsent means that the link is gone: the gateway sends again and is told that they are duplicates.
            batch.ack()

    def _judge(self, group: _Group, fates: list[Fate], now_us: int) -> None:
        """Answer for the rows of a group, whose fates are known."""
        for fate in set(fates):
            self.counters[f"samples.{fate.value}"] += fates.count(fate)
        if Fate.CONFLICT not in fates:
            group.answer.stored.extend([row.seq for row in group.rows])
            return
        for row, fate in zip(group.rows, fates, strict=True):
            if fate is Fate.CONFLICT:
                self._store.set_aside(row.gateway, "the key is stored with other bytes", row.reading, now_us)
                group.answer.quarantined.append(row.seq)
            else:
                group.answer.stored.append(row.seq)

    def _set_aside(self, group: _Group, sample: Sample, reason: str, now_us: int) -> None:
        self.counters["samples.malformed"] += 1
        log.warning("sample set aside gateway=%s seq=%d error=%s", group.gateway, sample.reading.seq, reason)
        self._store.set_aside(group.gateway, reason, sample.SerializeToString(), now_us)
        group.answer.quarantined.append(sample.reading.seq)

    def add_labels(self, action: command_pb2.AddLabels) -> str:
        """Store labels; they may come before their samples.

        Raises:
            PayloadError: no source, or a label without a proper key.
        """
        if action.source == command_pb2.LABEL_SOURCE_UNSPECIFIED:
            raise PayloadError("say where the labels come from", field="source")
        now_us = int(self._wall_clock() * 1e6)
        labels = []
        for item in action.labels:
            parse_id(item.device, "labels.device")
            check_epoch(item.epoch)
            _check_seq(item.seq, "labels.seq")
            labels.append(
                StoredLabel(item.device, item.epoch, item.seq, item.label, action.source, action.author, now_us)
            )
        count = self._store.add_labels(labels)
        self.counters["labels"] += count
        return f"{count} labels stored"


def read_group(gateway: str, group: SampleGroup, now_us: int) -> tuple[list[StoredSample], list[Refused]]:
    """Rows of the store from what a gateway sent, and what can never be one."""
    device, epoch, model = group.device, group.epoch, group.model
    try:
        parse_id(device, "groups.device")
        parse_id(model, "groups.model")
        check_epoch(epoch)
    except PayloadError as exc:
        return [], [(sample, str(exc)) for sample in group.samples]
    good: list[StoredSample] = []
    bad: list[Refused] = []
    for sample in group.samples:
        reading = sample.reading
        try:
            check_identity(device, epoch, reading)
            if reading.WhichOneof("value") is None:
                raise PayloadError("carries no value", field="reading")  # noqa: TRY301  as the check beside it does
        except PayloadError as exc:
            bad.append((sample, str(exc)))
            continue
        has_boot = is_boot(reading.boot_id, reading.since_boot_us)
        good.append(
            StoredSample(
                device,
                epoch,
                reading.seq,
                model,
                gateway,
                sample.reason,
                reading.reference,
                reading.captured_at_us,
                now_us,
                reading.SerializeToString(deterministic=True),
                *_said(sample.device_answer if sample.HasField("device_answer") else None),
                *_said(sample.gateway_answer if sample.HasField("gateway_answer") else None),
                reading.boot_id if has_boot else None,
                reading.since_boot_us if has_boot else None,
            )
        )
    return good, bad


def _check_seq(seq: int, field: str) -> None:
    if seq > MAX_SEQ:
        raise PayloadError(f"{seq}, expected at most {MAX_SEQ}", field=field)


def _said(answer: Answer | None) -> tuple[int | None, float | None, int | None]:
    """Release, score and label."""
    if answer is None:
        return None, None, None
    return answer.release, answer.score, answer.label if answer.HasField("label") else None
