"""What a device asks its gateway: out of the outbox, into messages, and settled by what comes back.

Invariants:
- a question leaves the outbox only when the gateway's reply settles it, when a refusal that would be repeated moves it
  to the quarantine, or when an alarm needs its place;
- what the link does not take, and what the gateway cannot do now, is due again;
- of what was asked within the retry interval, no more than the gateway takes of one device is without its reply;
- a reply that names no rows refuses the message that bore its correlation data, and no other.
"""

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from google.protobuf.message import DecodeError

from device_agent.config import DeviceConfig
from shoal.codec import EPOCH_BYTES, MAX_ROW_BYTES
from shoal.delivery.outbox import Item, Key, Outbox, Priority, Refusal, group_by_model
from shoal.errors import LinkError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import Route
from shoal.v1 import inference_pb2 as pb

log = logging.getLogger(__name__)

# Of the retry interval: a gateway that answers "not yet" is there, and will be ready soon.
_PATIENCE = 0.2
# What a message holds for each row besides the row's own bytes.
_ROW_HEAD_BYTES = 8
_CORRELATION_BYTES = 8
# Rows asked and not yet replied to. A gateway takes so many of one device and has the others sent again: a backlog sent
# at once would travel many times.
_MAX_OPEN_ROWS = 64

# A reply's row, and the seconds since its question was asked.
OnAnswer = Callable[[pb.RowReply, float], None]


class Questions:
    """The questions of one device. Never blocks; `tick` sends what is due.

    Args:
        lane: the outbox's lane for this device's link.
        on_answer: hears each answer once, while its question is remembered.
    """

    def __init__(
        self,
        config: DeviceConfig,
        link: Link,
        outbox: Outbox,
        *,
        clock: Callable[[], float],
        lane: str,
        on_answer: OnAnswer,
    ) -> None:
        self._config = config
        self._link = link
        self._outbox = outbox
        self._clock = clock
        self._lane = lane
        self._on_answer = on_answer
        self._epoch = outbox.epoch(config.node)
        self._send_at: float | None = 0.0
        # Until when, and for whom, by correlation data, oldest first. Its start is random: a reply to a process before
        # this one finds nothing.
        self._open: OrderedDict[bytes, tuple[float, list[Key]]] = OrderedDict()
        self._open_rows = 0
        self._next_correlation = secrets.randbits(8 * _CORRELATION_BYTES)
        link.subscribe(Route.REPLY, self._on_reply, site=config.site, node=config.node)
        link.on_connect(self._send_at_once)

    def ask(self, row: pb.InferenceRow, now: float) -> bool:
        """Owe this question from the next commit on. False when it is accounted for and was not taken."""
        node = self._config.node
        key = Key(node, self._epoch, row.reading.seq)
        priority = Priority.ALARM if row.reason == pb.ASK_REASON_SCORE else Priority.TELEMETRY
        item = Item(key, self._config.model, row.SerializeToString(), priority)
        if _size(item) > MAX_ROW_BYTES:
            log.error("reading too large to ask node=%s seq=%d bytes=%d", node, key.seq, len(item.payload))
            self._outbox.refuse(item, Refusal("TOO_LARGE", "", f"{_size(item)} bytes, at most {MAX_ROW_BYTES}"))
            return False
        if not self._outbox.put(item, now):
            # It never was in the outbox, which counts `accepted` for those that are.
            self._count("accepted")
            self._count("dropped.full")
            return False
        if self._send_at is None:
            self._send_at = now + self._config.linger_s
        return True

    def tick(self, now: float) -> None:
        """Send what is due; call it after each commit of the outbox and a few times a second."""
        if not self._link.connected or (self._send_at is not None and now < self._send_at):
            return
        self._send_at = None
        config = self._config
        self._forget(now)
        while self._link.room() > 0 and self._open_rows < _MAX_OPEN_ROWS:
            limit = min(config.max_rows, _MAX_OPEN_ROWS - self._open_rows)
            taken = self._outbox.take(now, limit, config.retry_after_s, self._lane)
            if not self._send_all(taken, now) or len(taken) < limit:
                return

    def _send_all(self, taken: Sequence[tuple[Item, int]], now: float) -> bool:
        """Send in as few messages as may be. False when the link did not take them all; the others are due again."""
        sent = [
            self._send(model, items, replay=replay, now=now)
            for (_, _, model, replay), group in group_by_model(taken).items()
            for items in _split(group)
        ]
        return all(sent)

    def _send(self, model: str, items: list[Item], *, replay: bool, now: float) -> bool:
        rows = self._rows(items)
        if not rows:
            return True
        keys = list(rows)
        request = pb.InferenceRequest(
            device=self._config.node,
            epoch=keys[0].epoch,
            model=model,
            rows=rows.values(),
            answer_within_ms=0 if replay else self._config.answer_within_ms,
            replay=replay,
        )

        def done(error: LinkError | None) -> None:
            if error is None:
                return
            self._close(correlation)
            if error.permanent:
                log.error("question refused for ever node=%s rows=%d error=%s", self._config.node, len(keys), error)
                self._quarantine(keys, Refusal("REFUSED_BY_BROKER", "", str(error)))
            else:
                self._outbox.make_due(keys, now)

        correlation = self._remember(keys, now)
        sent = self._link.publish(
            Route.INFER,
            request,
            correlation=correlation,
            # Where the broker still holds it by then, the retry has taken its place.
            expiry_s=max(1, round(self._config.retry_after_s)),
            on_done=done,
            site=self._config.site,
            node=self._config.node,
        )
        if not sent:
            self._close(correlation)
            self._outbox.make_due(keys, now)
        return sent

    def _rows(self, items: Sequence[Item]) -> dict[Key, pb.InferenceRow]:
        """Parse what the disk kept. What it spoiled would end every agent that asks about it."""
        rows: dict[Key, pb.InferenceRow] = {}
        for item in items:
            with suppress(DecodeError):
                row = pb.InferenceRow.FromString(item.payload)
                if row.reading.seq == item.key.seq:
                    rows[item.key] = row
            if item.key not in rows:
                self._quarantine([item.key], Refusal("SPOILED", "", "not what was stored"))
                log.error("reading spoiled on disk node=%s seq=%d", item.key.device, item.key.seq)
        return rows

    def _on_reply(self, delivery: Delivery) -> None:
        reply = delivery.message
        if not isinstance(reply, pb.InferenceReply):
            return
        self._forget(self._clock())
        asked = self._close(delivery.correlation)
        if len(reply.epoch) != EPOCH_BYTES:
            if not reply.epoch and len(reply.rows) == 1:
                self._refused(asked, reply.rows[0])
            return
        for row in reply.rows:
            self._settle(Key(self._config.node, reply.epoch, row.seq), row)

    def _settle(self, key: Key, row: pb.RowReply) -> None:
        if row.status == pb.STATUS_OK:
            put_at = self._outbox.put_at(key)
            # Where it is not known it was asked by a process before this one: nobody waits for it any more.
            if self._outbox.settle(key, "answered") and put_at is not None:
                self._on_answer(row, self._clock() - put_at)
        elif row.status == pb.STATUS_INVALID_ARGUMENT:
            if self._quarantine([key], _refusal(row)):
                log.warning("reading refused node=%s seq=%d field=%s: %s", key.device, row.seq, row.field, row.message)
        else:
            # Not now: again sooner than after silence, and not at once.
            self._count(f"replies.{_status_name(row.status)}")
            self._outbox.make_due([key], self._clock() + _PATIENCE * self._config.retry_after_s)

    def _refused(self, asked: Sequence[Key], row: pb.RowReply) -> None:
        """The gateway could not use a whole message, and so could not tell whose rows it refuses."""
        if row.status == pb.STATUS_INVALID_ARGUMENT and (count := self._quarantine(asked, _refusal(row))):
            log.error("question refused node=%s rows=%d field=%s: %s", self._config.node, count, row.field, row.message)

    def _quarantine(self, keys: Iterable[Key], refusal: Refusal) -> int:
        return sum(self._outbox.quarantine(key, refusal) for key in keys)

    def _remember(self, keys: list[Key], now: float) -> bytes:
        """Make a message's correlation data."""
        self._next_correlation = (self._next_correlation + 1) % (1 << 8 * _CORRELATION_BYTES)
        correlation = self._next_correlation.to_bytes(_CORRELATION_BYTES, "big")
        self._open[correlation] = (now + self._config.retry_after_s, keys)
        self._open_rows += len(keys)
        return correlation

    def _close(self, correlation: bytes) -> list[Key]:
        _, keys = self._open.pop(correlation, (0.0, []))
        self._open_rows -= len(keys)
        return keys

    def _forget(self, now: float) -> None:
        """What is due again is asked under other correlation data."""
        while self._open:
            correlation, (until, _) = next(iter(self._open.items()))
            if until > now:
                return
            self._close(correlation)

    def _count(self, name: str) -> None:
        self._outbox.count(self._config.node, name)

    def _send_at_once(self) -> None:
        self._send_at = 0.0


def size_of(row: pb.InferenceRow) -> int:
    """Bytes of a question on its way, but for what a message's rows share."""
    return row.ByteSize() + _ROW_HEAD_BYTES


def _refusal(row: pb.RowReply) -> Refusal:
    return Refusal(_status_name(row.status).upper(), row.field, row.message)


def _status_name(status: int) -> str:
    # A newer gateway may know more of them; the schema's enums are open.
    known = pb.Status.DESCRIPTOR.values_by_number.get(status)
    return "unknown" if known is None else known.name.removeprefix("STATUS_").lower()


def _size(item: Item) -> int:
    return len(item.payload) + _ROW_HEAD_BYTES


def _split(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Split what is too large for one message; each item fits alone."""
    part: list[Item] = []
    room = MAX_ROW_BYTES
    for item in items:
        if part and _size(item) > room:
            yield part
            part, room = [], MAX_ROW_BYTES
        part.append(item)
        room -= _size(item)
    yield part
