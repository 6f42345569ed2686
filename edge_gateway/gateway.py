"""The gateway: requests in, batches through the model, replies out, samples into the outbox before they are promised.

Data flows one way: link -> turns -> requests -> lanes -> outbox.commit -> replies -> PUBACK.
Invariants:
- beyond a batch, a device's questions cost the others a turn each: not even unpacking a flood goes first;
- a reply that promises a sample follows the commit that holds it;
- a request's PUBACK follows its reply, so that receive-maximum is back-pressure and a crash loses no question;
- a swap of models happens between batches: no row is answered by two releases, none is dropped.
"""

import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_gateway import engine
from edge_gateway.batcher import Turns
from edge_gateway.forwarder import Forwarder, sample_counters
from edge_gateway.inference import Outcome, Scored, ServedModel
from edge_gateway.lanes import LaneConfig, Lanes
from edge_gateway.requests import OpenRequest, Row, check_request
from edge_gateway.samples import sample_of
from shoal.commands import CommandDesk
from shoal.delivery.outbox import Outbox
from shoal.errors import MAX_MESSAGE_CHARS, ModelError, PayloadError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.loop import Loop
from shoal.release.probation import Watch, parse_baseline
from shoal.routes import Route, serving_group
from shoal.state import Report, StateReporter, quality_of
from shoal.v1 import inference_pb2 as pb
from shoal.v1.node_pb2 import ModelState
from shoal.v1.release_pb2 import ReleaseSpec, Tier

log = logging.getLogger(__name__)

# A commit takes a disk's flush: the next one waits three times as long as the last took, so that a gateway under load
# spends at most a quarter of its time in them, and an idle one does not wait at all.
_COMMIT_PAUSE = 3.0
_COUNTER_OF_STATUS = {number: f"rows.{name.removeprefix('STATUS_').lower()}" for name, number in pb.Status.items()}


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway's settings; see docs/gateway.md.

    Attributes:
        models: what it serves.
        devices: whom it serves; empty means every device of the site, shared with the gateways that serve the same.
        providers: of ONNX Runtime, the best first.
        max_open: requests without their reply, of all models: what waits in lanes, for a commit, for room to reply.
    """

    site: str
    node: str
    models: Sequence[str]
    devices: Sequence[str] = ()
    lanes: LaneConfig = field(default_factory=LaneConfig)
    providers: Sequence[str] = (engine.CPU,)
    max_open: int = 8192
    state_interval_s: float = 60.0
    sample_linger_s: float = 0.5
    retry_after_s: float = 10.0


class Gateway:
    """Everything of a gateway but its process. Call `flush` when the sockets are drained and `tick` often.

    Attributes:
        counters: of requests, rows by status, batches by reason, the cache.
        lanes: the models and what waits for them.
    """

    def __init__(self, config: GatewayConfig, link: Link, outbox: Outbox, *, rng: random.Random, loop: Loop) -> None:
        self.config = config
        self.link = link
        self.counters: Counter[str] = Counter()
        self.lanes = Lanes(config.models, config.lanes, self.counters, wake=loop.wake)
        self.model_states: Callable[[], list[ModelState]] = list
        self.clock_suspect: Callable[[], bool] = bool
        self._clock = loop.clock
        self._wake = loop.wake
        self._outbox = outbox
        self._open = 0
        # Questions whose turn to be unpacked has not come, and how many came so soon that they did not have to wait.
        self._arrivals: Turns[Delivery] = Turns()
        self._at_once = 0
        self._arrived_at: float | None = None
        self._ready: deque[OpenRequest] = deque()
        self._refusals: deque[tuple[Delivery, pb.InferenceReply]] = deque()
        self._promised: list[tuple[Row, pb.Answer]] = []
        self._commit_at = 0.0
        self._forwarder = Forwarder(
            link,
            outbox,
            config.site,
            config.node,
            linger_s=config.sample_linger_s,
            retry_after_s=config.retry_after_s,
        )
        self._reporter = StateReporter(link, self._report, interval_s=config.state_interval_s, rng=rng)
        self._desk = CommandDesk(link, config.site, config.node, {"report_state": lambda _: self._report_now()})
        self._subscribe()
        link.on_arrival(Route.INFER, self._on_arrival)
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
        watch = Watch(parse_baseline(artefact.baseline))
        runtime = engine.load(path, self.config.providers)
        self.lanes.serve(model, ServedModel(spec, artefact, runtime, watch))
        self._reporter.soon()

    def deactivate(self, model: str) -> None:
        """Serve this model no more; what waits for it is answered NOT_FOUND."""
        self.lanes.end(model)
        self._reporter.soon()

    def watch(self, model: str) -> Watch | None:
        """What the release being served has done here; None where none is."""
        served = self.lanes.served(model)
        return None if served is None else served.watch

    # -- requests in ---------------------------------------------------------------------------------------------------

    def _subscribe(self) -> None:
        config = self.config
        if config.devices:
            for device in config.devices:
                self.link.subscribe(Route.INFER, self._on_request, ack_late=True, site=config.site, node=device)
        else:
            group = serving_group(config.models, config.devices)
            self.link.subscribe(Route.INFER, self._on_request, group=group, ack_late=True, site=config.site)

    def _on_arrival(self, delivery: Delivery) -> bool:
        """Whether a question waits for its turn. The first of a round do not: they fill a batch and no more."""
        if not self._arrivals and self._at_once < self.config.lanes.max_batch_size:
            self._at_once += 1
            return False
        device = delivery.address.node
        # Too much of one device is refused now, because it takes room in the receive-maximum that all share.
        if self._is_crowding(device) or self._is_overrun():
            return False
        self._arrivals.add(device, delivery, self._clock())
        return True

    def _is_crowding(self, device: str) -> bool:
        return self._arrivals.waiting(device) >= self.config.lanes.max_waiting_per_device

    def _is_overrun(self) -> bool:
        """Only QoS 0 gets here: it knows no receive-maximum, and is sent again."""
        return self._open + len(self._arrivals) >= self.config.max_open

    def _on_request(self, delivery: Delivery) -> None:
        request = delivery.message
        if not isinstance(request, pb.InferenceRequest):
            raise PayloadError("empty", field="payload")
        check_request(request, delivery.address, delivery.response_topic)
        if self._is_overrun():
            self.counters["requests.dropped"] += 1
            delivery.ack()
            return
        self.counters["requests"] += 1
        self._open += 1
        opened = OpenRequest(
            request,
            delivery.address,
            self._clock() if self._arrived_at is None else self._arrived_at,
            self._ready.append,
            correlation=delivery.correlation,
            qos=delivery.qos,
            ack=delivery.ack,
        )
        if self._is_crowding(opened.device):
            message = f"{self._arrivals.waiting(opened.device)} questions wait already"
            opened.refuse_all(pb.STATUS_RESOURCE_EXHAUSTED, message, "rows")
        else:
            self.lanes.admit(opened, request, len(delivery.payload))

    def _on_bad(self, delivery: Delivery, error: PayloadError) -> None:
        """Answer what cannot be parsed, or is not its sender's own; the correlation data says which it was."""
        message = str(error)[:MAX_MESSAGE_CHARS]
        row = pb.RowReply(status=pb.STATUS_INVALID_ARGUMENT, field=error.field, message=message)
        if len(self._refusals) < self.config.max_open:
            self._refusals.append((delivery, pb.InferenceReply(rows=[row])))
        else:
            self.counters["replies.unsent"] += 1

    # -- batches and replies -------------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """The sockets are drained: run what may leave, make samples durable, then reply and acknowledge.

        One batch at a time where questions wait for their turn: those that came meanwhile are read before the next.
        """
        self._admit()
        for settled in self.lanes.run(now, is_behind=self.is_behind):
            for row, served, outcome in settled:
                self._take(row, served, outcome)
            # Batch by batch: while the next one runs, broker and devices are at work on these.
            if self._ready:
                self._reply()
                self.link.flush()
        if self._promised and now >= self._commit_at:
            self._commit(now)
        self._reply()
        self._at_once = 0
        if self.is_behind:
            self._wake()

    @property
    def is_behind(self) -> bool:
        """Questions wait for their turn to be unpacked."""
        return bool(self._arrivals)

    def _admit(self) -> None:
        """Unpack what waits, device by device, until a batch is full."""
        while self._arrivals and not self.lanes.is_full:
            self._arrived_at, delivery = self._arrivals.pop()
            self.link.handle(delivery)
        self._arrived_at = None

    def due_at(self) -> float | None:
        """When `flush` has something to do though no socket says so."""
        due = self.lanes.due_at()
        if not self._promised:
            return due
        return self._commit_at if due is None else min(due, self._commit_at)

    def tick(self, now: float) -> None:
        self._desk.tick()
        self._reporter.tick(now)
        self._outbox.commit()
        self._forwarder.tick(now)

    def close(self) -> None:
        """Keep every promise that was about to be made, then end the workers."""
        now = self._clock()
        self.flush(now)
        while self.is_behind:
            self.flush(now)
        self._commit(now)
        self._reply()
        self.lanes.close()

    def _take(self, row: Row, served: ServedModel, outcome: Outcome) -> None:
        """One row's outcome: an answer now, an answer after the commit that keeps its sample, or a refusal."""
        request = row.request
        if isinstance(outcome, PayloadError):
            request.refuse(row.place, pb.STATUS_INVALID_ARGUMENT, str(outcome), row.field)
        elif isinstance(outcome, ModelError):
            request.refuse(row.place, pb.STATUS_INTERNAL, str(outcome))
        elif outcome.outputs and not request.has_room(sum(output.ByteSize() for output in outcome.outputs)):
            request.refuse(row.place, pb.STATUS_INVALID_ARGUMENT, "the outputs exceed one message", "wants_outputs")
        else:
            self._answer(row, served, outcome)

    def _answer(self, row: Row, served: ServedModel, scored: Scored) -> None:
        answer = pb.Answer(release=served.release, score=scored.score, label=scored.label, outputs=scored.outputs)
        if scored.from_cache:
            answer.from_cache = True
        sample = sample_of(row, served, scored)
        if sample is None:
            row.request.answer(row.place, answer, promised=False)
        elif self._outbox.put(sample):
            self._promised.append((row, answer))
        else:
            message = f"{self._outbox.in_flight} samples wait for the cloud already"
            row.request.refuse(row.place, pb.STATUS_RESOURCE_EXHAUSTED, message)

    def _commit(self, now: float) -> None:
        """Make all promised samples durable at once; only then may a reply promise them."""
        before = self._clock()
        self._outbox.commit()
        self._commit_at = now + _COMMIT_PAUSE * (self._clock() - before)
        for row, answer in self._promised:
            row.request.answer(row.place, answer, promised=True)
        self._promised.clear()

    def _reply(self) -> None:
        while self._refusals:
            delivery, refusal = self._refusals[0]
            sender = delivery.address
            sent = self.link.publish(
                Route.REPLY, refusal, correlation=delivery.correlation, site=sender.site, node=sender.node
            )
            if not sent and self.link.connected:
                return  # as below
            self._refusals.popleft()
        now = self._clock()
        while self._ready:
            request = self._ready[0]
            sent = self.link.publish(
                Route.REPLY,
                request.reply,
                correlation=request.correlation,
                qos=request.qos,
                site=request.sender.site,
                node=request.sender.node,
            )
            if not sent and self.link.connected:
                return  # the window is full; the next PUBACK makes room
            self._ready.popleft()
            self._open -= 1
            self._count(request, sent=sent)
            self.lanes.histograms.request_s.observe(now - request.arrived)
            # Unsent means that the link is gone: the device asks again, and this acknowledgement goes nowhere.
            request.ack()

    def _count(self, request: OpenRequest, *, sent: bool) -> None:
        self.counters["replies" if sent else "replies.unsent"] += 1
        if not request.has_refusals:
            self.counters["rows.ok"] += len(request.reply.rows)
            return
        for row in request.reply.rows:
            self.counters[_COUNTER_OF_STATUS[row.status]] += 1

    # -- small parts -----------------------------------------------------------------------------------------------

    def all_counters(self) -> Counter[str]:
        """The gateway's, its outbox's and its link's."""
        return self.counters + sample_counters(self._outbox) + self.link.counters

    def ailment(self) -> str:
        """What keeps it from answering; empty where nothing does."""
        if not (self.link.connected and self.link.is_subscribed):
            return "not connected to the broker"
        missing = self.lanes.unserved()
        return f"no release yet of {', '.join(missing)}" if missing else ""

    def _report(self) -> Report:
        counters = self.all_counters()
        for name, histogram in (("request", self.lanes.histograms.request_s), ("queue", self.lanes.histograms.queue_s)):
            for share in (50, 99):
                bound = histogram.quantile(share / 100)
                if bound < float("inf"):
                    counters[f"{name}.p{share}_us"] = int(bound * 1_000_000)
        return Report(counters, self.model_states(), quality_of(clock_suspect=self.clock_suspect()))

    def _report_now(self) -> str:
        self._reporter.soon()
        return "state follows"
