"""From a device's message to rows that a model can take, or to replies that say why not. Pure."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shoal.codec import MAX_ROW_BYTES
from shoal.errors import MAX_MESSAGE_CHARS, PayloadError
from shoal.ids import parse_id
from shoal.routes import Address, Route, topic
from shoal.tensors import check_epoch, check_identity, reading_values
from shoal.v1 import inference_pb2 as pb


@dataclass(slots=True)
class OpenRequest:
    """A request until each of its rows has its reply.

    Attributes:
        replies: by row, filled in any order.
    """

    site: str
    device: str
    epoch: bytes
    model: str
    correlation: bytes
    arrived: float
    deadline: float | None
    answer_only: bool
    replies: list[pb.RowReply | None] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return all(reply is not None for reply in self.replies)

    def reply(self) -> pb.InferenceReply:
        rows = [row for row in self.replies if row is not None]
        return pb.InferenceReply(epoch=self.epoch, model=self.model, rows=rows)


@dataclass(frozen=True, slots=True)
class Row:
    """One reading on its way to the model: `values` is (*shape) in the sensor's own units."""

    request: OpenRequest
    index: int
    question: pb.InferenceRow
    values: NDArray[np.float32]

    @property
    def seq(self) -> int:
        return self.question.reading.seq

    def settle(self, reply: pb.RowReply) -> None:
        self.request.replies[self.index] = reply


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
    derived = topic(Route.REPLY, site=sender.site, node=sender.node)
    if response_topic not in ("", derived):
        raise PayloadError(f"{response_topic!r}, expected {derived!r} or none", field="response_topic")


def open_request(request: pb.InferenceRequest, sender: Address, correlation: bytes, now: float) -> OpenRequest:
    """Begin to answer a checked request."""
    hurried = request.answer_within_ms > 0 and not request.replay
    return OpenRequest(
        site=sender.site,
        device=request.device,
        epoch=request.epoch,
        model=request.model,
        correlation=correlation,
        arrived=now,
        deadline=now + request.answer_within_ms / 1000 if hurried else None,
        answer_only=request.answer_only,
        replies=[None] * len(request.rows),
    )


def parse_rows(opened: OpenRequest, rows: list[pb.InferenceRow], shape: tuple[int, ...]) -> list[Row]:
    """Unpack the rows that the model can take; the others are answered INVALID_ARGUMENT on the spot."""
    good = []
    for index, question in enumerate(rows):
        where = f"rows[{index}].reading"
        try:
            _check_size(question, f"rows[{index}]")
            check_identity(opened.device, opened.epoch, question.reading, where)
            good.append(Row(opened, index, question, reading_values(question.reading, shape, where)))
        except PayloadError as exc:
            opened.replies[index] = refusal(question.reading.seq, pb.STATUS_INVALID_ARGUMENT, str(exc), exc.field)
    return good


def refuse_all(opened: OpenRequest, rows: list[pb.InferenceRow], status: pb.Status, message: str, name: str) -> None:
    """Answer every row of a request with the same error."""
    opened.replies = [refusal(row.reading.seq, status, message, name) for row in rows]


def refusal(seq: int, status: pb.Status, message: str, name: str = "") -> pb.RowReply:
    return pb.RowReply(seq=seq, status=status, field=name, message=message[:MAX_MESSAGE_CHARS])


def _check_size(question: pb.InferenceRow, field: str) -> None:
    """As a sample it must still fit one message, whatever fields of a newer schema it carries."""
    size_bytes = question.ByteSize()
    if size_bytes > MAX_ROW_BYTES:
        raise PayloadError(f"{size_bytes} bytes, at most {MAX_ROW_BYTES}", field=field)
