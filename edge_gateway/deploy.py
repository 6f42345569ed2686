"""One ONNX file served to some devices, with no cloud at all."""

import random
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edge_gateway import engine
from edge_gateway.gateway import Gateway, GatewayConfig
from edge_gateway.lanes import MAX_BATCH_SIZE, LaneConfig
from edge_gateway.service import SESSION_EXPIRY_S, drive, open_link
from shoal.delivery.outbox import Outbox
from shoal.errors import LinkError, ModelError
from shoal.ids import parse_id
from shoal.link_config import parse_broker_url
from shoal.loop import Loop
from shoal.release.chunks import digest
from shoal.v1 import release_pb2 as pb

_CONNECT_S = 10.0
_POLL_S = 0.01


class Deploy:
    """Serves a local model to the devices of a site; `start()` returns once it is connected.

    The model answers with its largest output as the label and one minus its softmax probability as the score. Nothing
    is forwarded, because there is no cloud to forward to.

    Args:
        model: an ONNX file with one float32 input and one 2-D output; its stem, made an id, is the model's name.
        devices: whom to serve; empty means every device of the site.
        max_batch_size: rows of one model call.

    Raises:
        PayloadError: a name is not an id.
        ConfigError: the broker's address is none.
        ValueError: the batch size or delay cannot be.
    """

    def __init__(
        self,
        model: str | Path,
        devices: Sequence[str] = (),
        max_batch_size: int = 32,
        *,
        broker: str = "mqtt://127.0.0.1:1883",
        site: str = "site",
        name: str = "gw-local",
        max_delay_ms: float = 0.0,
    ) -> None:
        for key, text in ("site", site), ("name", name), *(("devices", device) for device in devices):
            parse_id(text, key)
        if not 0 < max_batch_size <= MAX_BATCH_SIZE or not max_delay_ms >= 0:
            raise ValueError(f"max_batch_size {max_batch_size}, max_delay_ms {max_delay_ms}")
        self._path = Path(model)
        self.model = model_id(self._path.stem)
        self._link_config = parse_broker_url(broker, session_expiry_s=SESSION_EXPIRY_S)
        self._config = GatewayConfig(
            site=site,
            node=name,
            models=[self.model],
            devices=tuple(devices),
            lanes=LaneConfig(max_batch_size=max_batch_size, max_delay_s=max_delay_ms / 1000),
        )
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._gateway: Gateway | None = None

    def start(self) -> None:
        """Serve in a thread of its own.

        Raises:
            ModelError: the file cannot be served, and why.
            LinkError: no broker answered in time.
            RuntimeError: it serves already.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self.model} is served already")
        release = local_release(self.model, self._path)
        connected = threading.Event()
        failures: list[BaseException] = []
        self._loop = Loop()
        self._thread = threading.Thread(
            target=self._serve, args=(self._loop, release, connected, failures), name=f"shoal-{self.model}"
        )
        self._thread.start()
        if not connected.wait(_CONNECT_S) or failures:
            self.stop()
            raise LinkError(f"no answer from the broker: {failures[0] if failures else 'it did not come in time'}")

    def stop(self) -> None:
        """Say goodbye and end the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            self._thread.join()
        self._loop = self._thread = None

    def stats(self) -> dict[str, int]:
        """Counters since the start: requests, rows by status, batches by reason, cache hits."""
        return {} if self._gateway is None else dict(self._gateway.counters)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _serve(
        self, loop: Loop, release: pb.ReleaseSpec, connected: threading.Event, failures: list[BaseException]
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # The outbox stays empty; SQLite wants its thread's own connection, so it is opened here.
            outbox = Outbox(Path(folder) / "outbox.sqlite")
            try:
                link = open_link(replace(self._link_config, backoff_max_s=2.0), self._config.site, self._config.node)
                gateway = Gateway(self._config, link, outbox, rng=random.SystemRandom(), loop=loop)
                gateway.activate(self.model, release, self._path)
                self._gateway = gateway
                # Subscriptions too must be there: the birth goes out before them, and its PUBACK comes back first.
                loop.call_every(
                    _POLL_S, lambda _now: connected.set() if link.connected and link.is_subscribed else None
                )
                drive(gateway, loop)
            except (LinkError, ModelError, OSError) as exc:
                failures.append(exc)
                connected.set()
            finally:
                outbox.close()


def model_id(stem: str) -> str:
    """A file's stem as a model id: lower case, other characters as dashes.

    Raises:
        PayloadError: nothing usable is left.
    """
    return parse_id(re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_"), "model")


def local_release(model: str, path: Path) -> pb.ReleaseSpec:
    """Describe a file as a release that forwards nothing.

    Raises:
        ModelError: it cannot be read or run, or its output is not one row of scores for each row.
    """
    try:
        sha256 = digest(path.read_bytes())
    except OSError as exc:
        raise ModelError(f"{path}: {exc.strerror}") from exc
    runtime = engine.load(path)
    output = runtime.run(np.zeros((1, *runtime.input_shape), np.float32))
    if output.ndim != 2:  # noqa: PLR2004  rows and classes
        raise ModelError(f"{path.name}: output {list(output.shape)}, expected rows of class scores")
    return pb.ReleaseSpec(
        model=model,
        release=1,
        input=pb.InputSchema(shape=runtime.input_shape, mean=[0.0], std=[1.0]),
        score=pb.SCORE_KIND_UNCERTAINTY,
        # No score exceeds 1: nothing is ever promised.
        artefacts=[pb.Artefact(tier=pb.TIER_GATEWAY, format=pb.MODEL_FORMAT_ONNX, sha256=sha256, threshold=1.0)],
    )
