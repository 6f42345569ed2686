"""The gateway: requests in, batches through the model, replies out, samples into the outbox before they are promised.

Data flows one way: link -> requests -> batcher -> inference -> outbox.commit -> replies -> PUBACK.
Invariants:
- a reply that promises a sample follows the commit that holds it;
- a request's PUBACK follows its reply, so that receive-maximum is back-pressure and a crash loses no question;
- a swap of models happens between batches: no row is answered by two releases, none is dropped.
"""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_gateway import engine
from edge_gateway.batcher import Batcher
from edge_gateway.cache import AnswerCache, CacheConfig
from edge_gateway.forwarder import Forwarder, sample_counters
from edge_gateway.inference import Answered, ServedModel, run_batch
from edge_gateway.requests import OpenRequest, Row, check_request, open_request, parse_rows, refusal, refuse_all
from shoal.commands import CommandDesk
from shoal.delivery.outbox import Outbox
from shoal.errors import ModelError, PayloadError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.routes import Route
from shoal.state import Report, StateReporter
from shoal.v1 import inference_pb2 as pb
from shoal.v1.node_pb2 import ModelState
from shoal.v1.release_pb2 import ReleaseSpec, Tier

log = logging.getLogger(__name__)

MAX_WAITING_ROWS = 4096


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway's settings; see docs/gateway.md.

    Attributes:
        models: what it serves.
        devices: whom it serves; empty means every device of the site, shared with the gateways that serve the same.
        max_batch_size: rows of one model call.
        max_delay_s: how long a first row may wait for company; 0 runs whatever the socket has drained.
        max_waiting: rows in all queues of one model; above it the answer is RESOURCE_EXHAUSTED. Requests without their
            reply too; above it they are dropped and counted.
    """

    site: str
    node: str
    models: Sequence[str]
    devices: Sequence[str] = ()
    max_batch_size: int = 32
    max_delay_s: float = 0.0
    max_waiting: int = MAX_WAITING_ROWS
    cache: CacheConfig = field(default_factory=CacheConfig)
    state_interval_s: float = 60.0
    sample_linger_s: float = 0.5
    retry_after_s: float = 10.0


@dataclass(slots=True)
class _Lane:
    """One model: what serves it and what waits for it."""

    batcher: Batcher[Row]
    served: ServedModel | None = None


class Gateway:
    """Everything of a gateway but its process. Call `flush` when the sockets are drained and `tick` often."""

    def __init__(
        self, config: GatewayConfig, link: Link, outbox: Outbox, *, rng: random.Random, clock: Callable[[], float]
    ) -> None:
        self.config = config
        self.link = link
        self.counters: Counter[str] = Counter()
        self.model_states: Callable[[], list[ModelState]] = list
        self._clock = clock
        self._outbox = outbox
        self._cache = AnswerCache(config.cache, self.counters)
        self._lanes = {
            model: _Lane(Batcher(config.max_batch_size, config.max_delay_s, config.max_waiting))
            for model in config.models
        }
        self._acks: dict[int, Callable[[], None]] = {}
        self._open: list[OpenRequest] = []
        self._forwarder = Forwarder(
            link,
            outbox,
            config.site,
            config.node,
            linger_s=config.sample_linger_s,
            retry_after_s=config.retry_after_s,
        )
        self._reporter = StateReporter(link, self._report, interval_s=config.state_interval_s, rng=rng)
        CommandDesk(link, config.site, config.node, {"report_state": lambda _: self._report_now()})
        self._subscribe()
        link.on_bad(Route.INFER, self._on_bad)

    # -- models ------------------------------------------------------------------------------------------------------

    def activate(self, model: str, spec: ReleaseSpec, path: Path) -> None:
        """Serve this release from the next batch on.

        Raises:
            ModelError: it has no artefact for gateways, or the runtime refuses it.
        """
        artefact = next((item for item in spec.artefacts if item.tier == Tier.TIER_GATEWAY), None)
        if artefact is None:
            raise ModelError(f"release {spec.release} of {model} has nothing for gateways")
        self._lanes[model].served = ServedModel(spec, artefact, engine.load(path))
        self._reporter.soon()

    # -- requests in ---------------------------------------------------------------------------------------------------

    def _subscribe(self) -> None:
        config = self.config
        if config.devices:
            for device in config.devices:
                self.link.subscribe(Route.INFER, self._on_request, ack_late=True, site=config.site, node=device)
        else:
            group = serving_group(config.models, config.devices)
            self.link.subscribe(Route.INFER, self._on_request, group=group, ack_late=True, site=config.site)

    def _on_request(self, delivery: Delivery) -> None:
        request = delivery.message
        if not isinstance(request, pb.InferenceRequest):
            raise PayloadError("empty", field="payload")
        check_request(request, delivery.address, delivery.response_topic)
        if len(self._open) >= self.config.max_waiting:
            # Only QoS 0 gets here: it knows no receive-maximum, and is sent again.
            self.counters["requests.dropped"] += 1
            delivery.ack()
            return
        self.counters["requests"] += 1
        now = self._clock()
        opened = open_request(request, delivery.address, delivery.correlation, now)
        self._open.append(opened)
        self._acks[id(opened)] = delivery.ack
        self._admit(opened, list(request.rows), replay=request.replay, now=now)

    def _admit(self, opened: OpenRequest, rows: list[pb.InferenceRow], *, replay: bool, now: float) -> None:
        lane = self._lanes.get(opened.model)
        if lane is None or lane.served is None:
            refuse_all(opened, rows, pb.STATUS_NOT_FOUND, f"model {opened.model!r} is not served here", "model")
        elif not lane.batcher.has_room(len(rows)):
            refuse_all(opened, rows, pb.STATUS_RESOURCE_EXHAUSTED, f"{len(lane.batcher)} rows wait already", "rows")
        else:
            for row in parse_rows(opened, rows, lane.served.shape):
                lane.batcher.add(row, now, replay=replay)

    def _on_bad(self, delivery: Delivery, error: PayloadError) -> None:
        """Answer what cannot be parsed, or is not its sender's own; the correlation data says which it was."""
        reply = pb.InferenceReply(rows=[refusal(0, pb.STATUS_INVALID_ARGUMENT, str(error), error.field)])
        sender = delivery.address
        self.link.publish(Route.REPLY, reply, correlation=delivery.correlation, site=sender.site, node=sender.node)

    # -- batches and replies -------------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """The sockets are drained: run what may leave, make samples durable, then reply and acknowledge."""
        if not self._open:
            return
        answered: list[Answered] = []
        for lane in self._lanes.values():
            while (batch := lane.batcher.take(now, drained=True)) is not None:
                self.counters[batch.left.value] += 1
                rows = [row for row in batch.rows if not self._is_late(row, now)]
                if lane.served is not None and rows:
                    answered += run_batch(lane.served, rows, self._cache, self.counters)
        self._settle(answered)
        self._reply()

    def due_at(self) -> float | None:
        """When `flush` has something to do though no socket says so."""
        dues = [lane.batcher.due_at() for lane in self._lanes.values()]
        return min((due for due in dues if due is not None), default=None)

    def tick(self, now: float) -> None:
        self._reporter.tick(now)
        self._outbox.commit()
        self._forwarder.tick(now)

    def _is_late(self, row: Row, now: float) -> bool:
        request = row.request
        if not request.answer_only or request.deadline is None or now <= request.deadline:
            return False
        row.settle(refusal(row.seq, pb.STATUS_DEADLINE_EXCEEDED, "too late to be run", "answer_within_ms"))
        return True

    def _settle(self, answered: list[Answered]) -> None:
        """Commit the samples of all batches at once; only then may a reply promise them."""
        for item in answered:
            promised = item.sample is not None
            if item.sample is not None and not self._outbox.put(item.sample):
                message = f"{self._outbox.in_flight} samples wait for the cloud already"
                item.row.settle(refusal(item.row.seq, pb.STATUS_RESOURCE_EXHAUSTED, message))
                continue
            item.row.settle(
                pb.RowReply(seq=item.row.seq, status=pb.STATUS_OK, answer=item.answer, sample_promised=promised)
            )
        self._outbox.commit()

    def _reply(self) -> None:
        still_open: list[OpenRequest] = []
        for request in self._open:
            if not request.is_complete:
                still_open.append(request)
                continue
            sent = self.link.publish(
                Route.REPLY, request.reply(), correlation=request.correlation, site=request.site, node=request.device
            )
            if not sent and self.link.connected:
                still_open.append(request)  # the window is full; the next PUBACK makes room
                continue
            self._count(request, sent=sent)
            # Unsent means that the link is gone: the device asks again, and this acknowledgement goes nowhere.
            self._acks.pop(id(request))()
        self._open = still_open

    def _count(self, request: OpenRequest, *, sent: bool) -> None:
        self.counters["replies" if sent else "replies.unsent"] += 1
        for row in request.replies:
            if row is not None:
                self.counters[f"rows.{pb.Status.Name(row.status).removeprefix('STATUS_').lower()}"] += 1

    # -- small parts -----------------------------------------------------------------------------------------------

    def _report(self) -> Report:
        counters = self.counters + sample_counters(self._outbox) + self.link.counters
        return Report(counters, self.model_states())

    def _report_now(self) -> str:
        self._reporter.soon()
        return "state follows"


def serving_group(models: Sequence[str], devices: Sequence[str]) -> str:
    """The shared group of all gateways that serve the same: equal members may answer for each other."""
    served = "\n".join([*sorted(models), "", *sorted(devices)])
    return f"gw-{hashlib.sha256(served.encode()).hexdigest()[:12]}"
