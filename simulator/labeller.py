"""The annotator as a process: sees what gateways send up, sends labels to ingest, and says for whom it stands.

python -m simulator labeller --config labeller.toml
"""

import contextlib
import secrets
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.config import BrokerSettings, link_config
from shoal.delivery.outbox import Key
from shoal.errors import PayloadError
from shoal.inbox import Delivery
from shoal.link import Link
from shoal.link_config import service_identity
from shoal.loop import Loop
from shoal.routes import CLOUD_SITE, Route
from shoal.v1 import command_pb2 as pb
from shoal.v1.sample_pb2 import SampleBatch
from simulator.annotator import Annotator, Labelled
from simulator.datasets import load_digits, load_shuttle
from simulator.journal import unix_time
from simulator.streams import Truth

_TICK_S = 0.25
_AUTHOR = "annotator-stand-in"
_INGEST = "ingest"


class LabellerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The labeller's TOML file.

    Attributes:
        models: whose samples are labelled.
        delay_s: between a sample's arrival and its label.
        retry_after_s: labels without a result are sent again after this; also their expiry.
    """

    models: list[str]
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    delay_s: Annotated[float, Meta(ge=0)] = 2.0
    retry_after_s: Annotated[float, Meta(gt=0)] = 5.0


@dataclass(slots=True)
class _Sent:
    labels: list[Labelled[Key]]
    retry_at: float


class Labeller:
    """A human stand-in: its labels are the data set's, they come late, and they go through the labelling command."""

    def __init__(self, settings: LabellerSettings, link: Link, loop: Loop) -> None:
        self._settings = settings
        self._link = link
        self._loop = loop
        self._annotator: Annotator[Key] = Annotator(settings.delay_s, Truth([load_digits(), load_shuttle()]))
        self._sent: dict[bytes, _Sent] = {}
        link.subscribe(Route.SAMPLE, self._on_batch)
        link.subscribe(Route.RESULT, self._on_result, site=CLOUD_SITE, node=_INGEST)

    def tick(self, now: float) -> None:
        if not self._link.connected:
            return
        for command_id, sent in list(self._sent.items()):
            if now >= sent.retry_at:
                del self._sent[command_id]
                self._send(sent.labels, now)
        labels = self._annotator.due(now)
        if labels:
            self._send(labels, now)

    def _on_batch(self, delivery: Delivery) -> None:
        batch = delivery.message
        if not isinstance(batch, SampleBatch):
            return
        now = self._loop.clock()
        for group in batch.groups:
            if group.model not in self._settings.models:
                continue
            for sample in group.samples:
                key = Key(group.device, group.epoch, sample.reading.seq)
                # A sample that nobody can look up is not labelled; the others are.
                with contextlib.suppress(PayloadError):
                    self._annotator.see(key, sample.reading.reference, now)

    def _send(self, labels: list[Labelled[Key]], now: float) -> None:
        now_us = int(unix_time() * 1e6)
        command = pb.Command(
            id=secrets.token_bytes(16),
            issued_at_us=now_us,
            expires_at_us=now_us + int(self._settings.retry_after_s * 1e6),
            add_labels=pb.AddLabels(
                source=pb.LABEL_SOURCE_PERSON,
                author=_AUTHOR,
                labels=[
                    pb.Label(device=item.key.device, epoch=item.key.epoch, seq=item.key.seq, label=item.label)
                    for item in labels
                ],
            ),
        )
        self._sent[command.id] = _Sent(labels, now + self._settings.retry_after_s)
        expiry_s = max(1, int(self._settings.retry_after_s))
        self._link.publish(Route.COMMAND, command, expiry_s=expiry_s, site=CLOUD_SITE, node=_INGEST)

    def _on_result(self, delivery: Delivery) -> None:
        result = delivery.message
        if not isinstance(result, pb.CommandResult):
            raise PayloadError("empty", field="payload")
        if result.status == pb.COMMAND_STATUS_DONE:
            self._sent.pop(result.id, None)


def run(settings: LabellerSettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    loop = Loop()
    link = Link(link_config(settings.broker, session_expiry_s=0), service_identity("labeller"))
    labeller = Labeller(settings, link, loop)
    link.attach(loop)
    loop.call_every(_TICK_S, labeller.tick)
    with loop.stopping_on_signals():
        loop.run()
    link.close()
    loop.close()
