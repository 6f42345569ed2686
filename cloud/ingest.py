"""Ingest: samples into the store, then the acknowledgement; labels beside them.

Invariants:
- an ack follows the commit, and the PUBACK follows the ack: a kill in between repeats, and repeating changes nothing;
- a sample that can never be stored is set aside and acknowledged as quarantined, so that nothing behind it waits.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

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
from shoal.v1.sample_pb2 import Sample, SampleAck, SampleAckGroup, SampleBatch, SampleGroup

log = logging.getLogger(__name__)

SERVICE = "ingest"
_GROUP = "ingest"
_MAX_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class _Batch:
    site: str
    gateway: str
    message: SampleBatch
    ack: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Malformed:
    """A sample that can never be stored, and where its gateway is told so."""

    gateway: str
    sample: Sample
    reason: str
    answer: SampleAckGroup


class Ingest:
    """Call `flush` when the sockets are drained. Several ingest processes may share the work."""

    def __init__(self, link: Link, store: SampleStore, wall_clock: Callable[[], float] = time.time) -> None:
        self.counters: Counter[str] = Counter()
        self._link = link
        self._store = store
        self._wall_clock = wall_clock
        self._waiting: list[_Batch] = []
        CommandDesk(link, CLOUD_SITE, SERVICE, {"add_labels": self.add_labels}, wall_clock)
        link.subscribe(Route.SAMPLE, self._on_batch, group=_GROUP, ack_late=True)

    def _on_batch(self, delivery: Delivery) -> None:
        message = delivery.message
        if not isinstance(message, SampleBatch) or message.gateway != delivery.address.node:
            raise PayloadError(f"not the batch of {delivery.address.node!r}", field="gateway")
        if sum(len(group.samples) for group in message.groups) > _MAX_SAMPLES:
            raise PayloadError(f"more than {_MAX_SAMPLES} samples", field="groups")
        self._waiting.append(_Batch(delivery.address.site, message.gateway, message, delivery.ack))

    def flush(self) -> None:
        """Store everything that has arrived in one transaction, then acknowledge it."""
        if not self._waiting:
            return
        now_us = int(self._wall_clock() * 1e6)
        acks = [SampleAck() for _ in self._waiting]
        good: list[tuple[StoredSample, SampleAckGroup]] = []
        bad: list[_Malformed] = []
        for batch, ack in zip(self._waiting, acks, strict=True):
            for group in batch.message.groups:
                answer = ack.groups.add(device=group.device, epoch=group.epoch)
                for sample in group.samples:
                    try:
                        good.append((_stored(batch.gateway, group, sample, now_us), answer))
                    except PayloadError as exc:
                        bad.append(_Malformed(batch.gateway, sample, str(exc), answer))
        fates = self._store.add(sample for sample, _ in good)
        batches, self._waiting = self._waiting, []
        self._judge(good, fates, now_us)
        for malformed in bad:
            self._set_aside(malformed, now_us)
        for batch, ack in zip(batches, acks, strict=True):
            # Unsent, the gateway sends again and is told that they are duplicates.
            self._link.publish(Route.ACK, ack, site=batch.site, node=batch.gateway)
            batch.ack()

    def _judge(self, good: list[tuple[StoredSample, SampleAckGroup]], fates: list[Fate], now_us: int) -> None:
        for (sample, answer), fate in zip(good, fates, strict=True):
            self.counters[f"samples.{fate.value}"] += 1
            if fate is Fate.CONFLICT:
                self._store.set_aside(sample.gateway, "the key is stored with other bytes", sample.reading, now_us)
                answer.quarantined.append(sample.seq)
            else:
                answer.stored.append(sample.seq)

    def _set_aside(self, malformed: _Malformed, now_us: int) -> None:
        gateway, seq = malformed.gateway, malformed.sample.reading.seq
        self.counters["samples.malformed"] += 1
        log.warning("sample set aside gateway=%s seq=%d error=%s", gateway, seq, malformed.reason)
        self._store.set_aside(gateway, malformed.reason, malformed.sample.SerializeToString(), now_us)
        malformed.answer.quarantined.append(seq)

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


def _stored(gateway: str, group: SampleGroup, sample: Sample, now_us: int) -> StoredSample:
    parse_id(group.device, "groups.device")
    parse_id(group.model, "groups.model")
    check_epoch(group.epoch)
    check_identity(group.device, group.epoch, sample.reading)
    _check_seq(sample.reading.seq, "reading.seq")
    if sample.reading.WhichOneof("value") is None:
        raise PayloadError("carries no value", field="reading")
    device = sample.device_answer if sample.HasField("device_answer") else None
    served = sample.gateway_answer if sample.HasField("gateway_answer") else None
    return StoredSample(
        device=group.device,
        epoch=group.epoch,
        seq=sample.reading.seq,
        model=group.model,
        gateway=gateway,
        reason=sample.reason,
        reference=sample.reading.reference,
        captured_at_us=sample.reading.captured_at_us,
        received_at_us=now_us,
        reading=sample.reading.SerializeToString(deterministic=True),
        device_release=device.release if device else None,
        device_score=device.score if device else None,
        device_label=_label(device),
        gateway_release=served.release if served else None,
        gateway_score=served.score if served else None,
        gateway_label=_label(served),
    )


def _check_seq(seq: int, field: str) -> None:
    if seq > MAX_SEQ:
        raise PayloadError(f"{seq}, expected at most {MAX_SEQ}", field=field)


def _label(answer: Answer | None) -> int | None:
    return answer.label if answer is not None and answer.HasField("label") else None
