"""A witness on the wire: counts and remembers what devices asked, gateways answered and promised, and nodes say."""

from collections import Counter
from dataclasses import dataclass, field

from shoal.delivery.ledger import Row
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import Route
from shoal.v1.inference_pb2 import STATUS_INVALID_ARGUMENT, STATUS_OK, InferenceReply, InferenceRequest
from shoal.v1.node_pb2 import ModelState, NodeState, Presence
from shoal.v1.sample_pb2 import SampleBatch


@dataclass(slots=True)
class Seen:
    """What one fleet's messages were, by the model that they name.

    Attributes:
        infer_bytes, sample_bytes: application payload, every repetition included.
    """

    infer_bytes: int = 0
    sample_bytes: float = 0.0
    asked: set[Row] = field(default_factory=set)
    answered: set[Row] = field(default_factory=set)
    refused: set[Row] = field(default_factory=set)
    promised: set[Row] = field(default_factory=set)


class Observer:
    """Subscribes as an operator may; changes nothing."""

    def __init__(self, link: Link) -> None:
        self.models: dict[str, Seen] = {}
        self.online: dict[str, bool] = {}
        self.states: dict[str, NodeState] = {}
        self.messages: Counter[str] = Counter()
        self._sessions: dict[str, bytes] = {}
        for route, handler in (
            (Route.INFER, self._on_infer),
            (Route.REPLY, self._on_reply),
            (Route.SAMPLE, self._on_sample),
            (Route.PRESENCE, self._on_presence),
            (Route.CLOUD_PRESENCE, self._on_presence),
            (Route.STATE, self._on_state),
            (Route.CLOUD_STATE, self._on_state),
        ):
            link.subscribe(route, handler)

    def seen(self, model: str) -> Seen:
        return self.models.setdefault(model, Seen())

    def model_states(self, role: str) -> list[ModelState]:
        """What each node of a role runs."""
        return [model for state in self.states.values() if state.role == role for model in state.models]

    def _on_infer(self, delivery: Delivery) -> None:
        self._count(delivery)
        request = delivery.message
        if isinstance(request, InferenceRequest):
            seen = self.seen(request.model)
            seen.infer_bytes += len(delivery.payload)
            seen.asked.update(Row(request.device, row.reading.seq) for row in request.rows)

    def _on_reply(self, delivery: Delivery) -> None:
        self._count(delivery)
        reply = delivery.message
        if not isinstance(reply, InferenceReply):
            return
        seen = self.seen(reply.model)
        for row in reply.rows:
            key = Row(delivery.address.node, row.seq)
            if row.status == STATUS_OK:
                seen.answered.add(key)
            elif row.status == STATUS_INVALID_ARGUMENT:
                seen.refused.add(key)
            if row.sample_promised:
                seen.promised.add(key)

    def _on_sample(self, delivery: Delivery) -> None:
        self._count(delivery)
        batch = delivery.message
        if not isinstance(batch, SampleBatch) or not batch.groups:
            return
        # One message may carry samples of several models: each pays for its own groups and its share of the rest.
        sizes = [max(1, group.ByteSize()) for group in batch.groups]
        for group, size in zip(batch.groups, sizes, strict=True):
            self.seen(group.model).sample_bytes += len(delivery.payload) * size / sum(sizes)

    def _on_presence(self, delivery: Delivery) -> None:
        presence = delivery.message
        if not isinstance(presence, Presence):
            return
        name = delivery.address.node or delivery.address.service
        if presence.online:
            self._sessions[name] = presence.session
        # The will of an earlier connection says nothing of the one that is.
        if presence.online or self._sessions.get(name, presence.session) == presence.session:
            self.online[name] = presence.online

    def _on_state(self, delivery: Delivery) -> None:
        state = delivery.message
        if isinstance(state, NodeState):
            self.states[delivery.address.node or delivery.address.service] = state

    def _count(self, delivery: Delivery) -> None:
        self.messages[delivery.address.route.value] += 1
