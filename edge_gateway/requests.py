"""From a device's message to rows that a model can take, or to replies that say why not. Pure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from shoal.codec import MAX_ROW_BYTES, MAX_ROWS
from shoal.errors import MAX_MESSAGE_CHARS, PayloadError
from shoal.ids import parse_id
from shoal.routes import Address, Route, topic
from shoal.tensors import check_epoch, check_identity, raw_reading
from shoal.v1 import inference_pb2 as pb

_FIELDS = tuple(f"rows[{index}].reading" for index in range(MAX_ROWS))


class OpenRequest:
    """A request until each of its rows has its reply.

    Attributes:
        arrived: seconds of the loop's clock.
        deadline: the same; None where nobody is in a hurry.
        qos: of the question, and so of the answer.
        ack: acknowledges the question; only after the reply is on its way.
        on_complete: called once, when the last row has its reply.
        reply: filled in row by row, in any order.
        unanswered: rows that still lack their reply.
    """

    __slots__ = (
        "_outputs_bytes",
        "ack",
        "answer_only",
        "arrived",
        "correlation",
        "deadline",
        "has_refusals",
        "model",
        "on_complete",
        "qos",
        "reply",
        "sender",
        "unanswered",
        "wants_outputs",
    )

    def __init__(
        self,
        request: pb.InferenceRequest,
        sender: Address,
        now: float,
        on_complete: "Callable[[OpenRequest], None]",
        *,
        correlation: bytes = b"",
        qos: int = 1,
        ack: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to answer a checked request."""
        self.sender = sender
        self.model = request.model
        self.correlation = correlation
        self.qos = qos
        self.ack = ack
        self.on_complete = on_complete
        self.arrived = now
        hurry_ms = request.answer_within_ms
        self.deadline = now + hurry_ms / 1000 if hurry_ms and not request.replay else None
        self.answer_only = request.answer_only
        self.wants_outputs = request.wants_outputs
        self.has_refusals = False
        self._outputs_bytes = 0
        self.reply = reply = pb.InferenceReply(epoch=request.epoch, model=self.model)
        add = reply.rows.add
        for row in request.rows:
            add(seq=row.reading.seq)
        self.unanswered = len(reply.rows)

    @property
    def device(self) -> str:
        return self.sender.node

    @property
    def epoch(self) -> bytes:
        return self.reply.epoch

    def is_late(self, now: float) -> bool:
        """Nobody waits for the answer any more, and nothing else is owed."""
        return self.answer_only and self.deadline is not None and now > self.deadline

    def has_room(self, outputs_bytes: int) -> bool:
        """Whether another row's outputs fit the reply; counts them in where they do."""
        if self._outputs_bytes + outputs_bytes > MAX_ROW_BYTES // 2:
            return False
        self._outputs_bytes += outputs_bytes
        return True

    def answer(self, index: int, answer: pb.Answer, *, promised: bool) -> None:
        row = self.reply.rows[index]
        row.status = pb.STATUS_OK
        row.answer.CopyFrom(answer)
        row.sample_promised = promised
        self._settled()

    def refuse(self, index: int, status: pb.Status, message: str, field: str = "") -> None:
        self.has_refusals = True
        row = self.reply.rows[index]
        row.status = status
        row.field = field
        row.message = message[:MAX_MESSAGE_CHARS]
        self._settled()

    def refuse_all(self, status: pb.Status, message: str, field: str = "") -> None:
        for index in range(len(self.reply.rows)):
            self.refuse(index, status, message, field)

    def _settled(self) -> None:
        self.unanswered -= 1
        if not self.unanswered:
            self.on_complete(self)


class Row(NamedTuple):
    """One reading on its way to the model: its values as they came, row-major, in the sensor's own units."""

    request: OpenRequest
    place: int
    question: pb.InferenceRow
    dtype: np.dtype[Any]
    data: bytes

    @property
    def seq(self) -> int:
        return self.question.reading.seq

    @property
    def field(self) -> str:
        return _FIELDS[self.place]


def check_request(request: pb.InferenceRequest, sender: Address, response_topic: str) -> None:
    """Refuse a request that is not its sender's own. Replies go to the topic derived from the sender's.

    Raises:
        PayloadError: naming the field.
    """
    if request.device != sender.node:
        raise PayloadError(f"{request.device!r} on the topic of {sender.node!r}", field="device")
    check_epoch(request.epoch)
    parse_id(request.model, "model")
    if not request.rows:
        raise PayloadError("no rows", field="rows")
    if response_topic:
        derived = topic(Route.REPLY, site=sender.site, node=sender.node)
        if response_topic != derived:
            raise PayloadError(f"{response_topic!r}, expected {derived!r} or none", field="response_topic")


def parse_rows(opened: OpenRequest, request: pb.InferenceRequest, values: int, *, size_bytes: int) -> list[Row]:
    """Take out the rows that a model of so many values can take; the others are answered INVALID_ARGUMENT.

    `size_bytes` is the whole message's: weighing each row costs more than reading it.
    """
    good = []
    is_small = size_bytes <= MAX_ROW_BYTES
    device, epoch = opened.device, opened.epoch
    for index, question in enumerate(request.rows):
        reading = question.reading
        try:
            if not is_small:
                _check_size(question, index)
            check_identity(device, epoch, reading, _FIELDS[index])
            dtype, data = raw_reading(reading, values, _FIELDS[index])
        except PayloadError as exc:
            opened.refuse(index, pb.STATUS_INVALID_ARGUMENT, str(exc), exc.field)
        else:
            good.append(Row(opened, index, question, dtype, data))
    return good


def _check_size(question: pb.InferenceRow, index: int) -> None:
    """As a sample it must still fit one message, whatever fields of a newer schema it carries."""
    size_bytes = question.ByteSize()
    if size_bytes > MAX_ROW_BYTES:
        raise PayloadError(f"{size_bytes} bytes, at most {MAX_ROW_BYTES}", field=f"rows[{index}]")
