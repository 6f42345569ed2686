"""Which answered readings the cloud wants to see."""

from edge_gateway.inference import Scored, ServedModel
from edge_gateway.requests import Row
from shoal.delivery.outbox import Item, Key
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sample_pb2 import Sample

# Drawn by lot, or wanted by somebody: their scores say nothing about their worth.
_ALWAYS_WANTED = frozenset({pb.ASK_REASON_AUDIT, pb.ASK_REASON_COMMAND})


def sample_of(row: Row, served: ServedModel, scored: Scored) -> Item | None:
    """The sample of a reading that exceeds the threshold or belongs to the audit; None where none is owed."""
    question = row.question
    wanted = scored.score > served.threshold or question.reason in _ALWAYS_WANTED
    request = row.request
    if not wanted or request.answer_only:
        return None
    sample = Sample(
        reading=question.reading,
        reason=question.reason,
        device_answer=question.device_answer if question.HasField("device_answer") else None,
        gateway_answer=pb.Answer(release=served.release, score=scored.score, label=scored.label),
    )
    sample.reading.ClearField("device")
    sample.reading.ClearField("epoch")
    return Item(Key(request.device, request.epoch, row.seq), request.model, sample.SerializeToString())
