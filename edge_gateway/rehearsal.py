"""A gateway without a network: whole packets in, whole packets out, everything between them the real thing.

What is measured with it lacks only the socket, the loop and the broker.
"""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf.message import Message

from edge_gateway.gateway import Gateway, GatewayConfig
from edge_gateway.inference import ServedModel
from edge_gateway.lanes import LaneConfig
from shoal.codec import encode
from shoal.delivery.outbox import Outbox
from shoal.link import Done, Link
from shoal.link_config import LinkConfig, node_identity
from shoal.loop import Loop
from shoal.routes import ROUTES, Route, topic_bytes
from shoal.v1 import inference_pb2 as pb
from shoal.wire import (
    correlation_property,
    encode_puback,
    encode_publish,
    expiry_property,
    packet_bounds,
    parse_publish,
)

SITE = "rehearsal"
_QOS = 1
_PACKET_IDS = 65_535
_CORRELATION = correlation_property(b"12345678")


class MemoryLink(Link):
    """Always connected to a broker that answers everything at once, and keeps nothing.

    Attributes:
        sent: packets of the gateway, as bytes; whoever looks empties it.
    """

    def __init__(self, node: str) -> None:
        super().__init__(LinkConfig("memory"), node_identity(SITE, node, "gateway"))
        self.connected = self.is_subscribed = True
        self.sent: list[bytes] = []
        self._packet_id = 0

    def publish(
        self,
        route: Route,
        message: Message | bytes,
        *,
        correlation: bytes = b"",
        expiry_s: int | None = None,
        qos: int | None = None,
        on_done: Done | None = None,
        **segments: str,
    ) -> bool:
        """Encode as a real link does."""
        spec = ROUTES[route]
        self._packet_id = self._packet_id % _PACKET_IDS + 1
        properties = correlation_property(correlation) if correlation else b""
        if expiry_s is not None:
            properties += expiry_property(expiry_s)
        packet = encode_publish(
            topic_bytes(route, **segments),
            message if isinstance(message, bytes) else encode(message),
            qos=spec.qos if qos is None else qos,
            retain=spec.retain,
            packet_id=self._packet_id,
            properties=properties,
        )
        self.sent.append(packet)
        if on_done is not None:
            on_done(None)
        return True

    def receive(self, packet: bytes) -> None:
        """One PUBLISH, as it would come from the socket.

        Raises:
            ValueError: it is none.
        """
        bounds = packet_bounds(packet, 0, len(packet))
        publish = None if bounds is None else parse_publish(packet, 0, *bounds)
        if publish is None:
            raise ValueError(f"{len(packet)} bytes are no PUBLISH")
        self._inbox.receive(
            publish.topic,
            publish.payload,
            retained=False,
            ack=lambda: self.sent.append(encode_puback(publish.packet_id)),
            qos=publish.qos,
            correlation=publish.correlation,
            response_topic=publish.response_topic,
        )


class Rehearsal:
    """One gateway that serves one model to whoever asks, while the block runs."""

    def __init__(self, model: str, served: ServedModel, lanes: LaneConfig) -> None:
        self._model = model
        self._served = served
        self._lanes = lanes

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._loop = Loop()
        self._outbox = Outbox(Path(self._folder.name) / "outbox.sqlite")
        self.link = MemoryLink("gw")
        config = GatewayConfig(site=SITE, node="gw", models=[self._model], lanes=self._lanes)
        self.gateway = Gateway(config, self.link, self._outbox, rng=random.Random(1), loop=self._loop)  # noqa: S311
        self.gateway.lanes.serve(self._model, self._served)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gateway.close()
        self._outbox.close()
        self._loop.close()
        self._folder.cleanup()

    def ask(self, packets: Sequence[bytes]) -> list[bytes]:
        """All of them are in the socket at once; return what the gateway sends when it is drained."""
        receive = self.link.receive
        for packet in packets:
            receive(packet)
        self.flush(self._loop.clock())
        sent, self.link.sent = self.link.sent, []
        return sent

    def flush(self, now: float) -> None:
        """Answer everything that has come."""
        self.gateway.flush(now)
        while self.gateway.is_behind:
            self.gateway.flush(now)


def packet_of(request: pb.InferenceRequest) -> bytes:
    """A device's question as it travels."""
    return encode_publish(
        topic_bytes(Route.INFER, site=SITE, node=request.device),
        encode(request),
        qos=_QOS,
        retain=False,
        packet_id=1,
        properties=_CORRELATION,
    )
