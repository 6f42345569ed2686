"""ONNX files served to some devices, with no cloud at all."""

import os
import random
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_gateway import engine
from edge_gateway.cache import CacheConfig
from edge_gateway.gateway import Gateway, GatewayConfig
from edge_gateway.inference import ServedModel
from edge_gateway.lanes import MAX_BATCH_SIZE, LaneConfig
from edge_gateway.service import SESSION_EXPIRY_S, drive, open_link, serving_metrics
from shoal.delivery.outbox import Outbox
from shoal.errors import ConfigError, LinkError, ModelError
from shoal.ids import parse_id
from shoal.link_config import parse_broker_url
from shoal.loop import Loop
from shoal.release.chunks import digest
from shoal.v1 import release_pb2 as pb

_CONNECT_S = 10.0
_POLL_S = 0.01

ModelFiles = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


class Deploy:
    """Serves local models to the devices of a site; `start()` returns once it is connected.

    A model answers with the largest value of its first output as the label and one minus its softmax probability as the
    score; a request that wants the outputs themselves gets all of them. Nothing is forwarded, because there is no cloud
    to forward to.

    Args:
        model: an ONNX file, several, or several by name. A file's stem, made an id, is its model's name otherwise.
        devices: whom to serve; empty means every device of the site.
        max_batch_size: rows of one model call.
        max_delay_ms: how long a first row may wait for company; 0 runs whatever has arrived.
        cache_bytes: of the answer cache; 0 turns it off.
        providers: of ONNX Runtime, the best first.
        metrics_address: `host:port` for Prometheus; empty serves none.
        workers: threads for slow models; 0 means as many as there are cores.

    Raises:
        PayloadError: a name is not an id.
        ConfigError: the broker's address is none, or two files have one name.
        ValueError: no model, or a batch size, delay, cache or number of workers that cannot be.
    """

    def __init__(
        self,
        model: ModelFiles,
        devices: Sequence[str] = (),
        max_batch_size: int = 32,
        *,
        broker: str = "mqtt://127.0.0.1:1883",
        site: str = "site",
        name: str = "gw-local",
        max_delay_ms: float = 0.0,
        cache_bytes: int = 16 << 20,
        providers: Sequence[str] = (engine.CPU,),
        metrics_address: str = "",
        workers: int = 0,
    ) -> None:
        for key, text in ("site", site), ("name", name), *(("devices", device) for device in devices):
            parse_id(text, key)
        if not 0 < max_batch_size <= MAX_BATCH_SIZE or not max_delay_ms >= 0 or min(cache_bytes, workers) < 0:
            raise ValueError(
                f"max_batch_size {max_batch_size}, max_delay_ms {max_delay_ms}, cache_bytes {cache_bytes}, "
                f"workers {workers}"
            )
        self._paths = _by_name(model)
        self._link_config = parse_broker_url(broker, session_expiry_s=SESSION_EXPIRY_S)
        self._config = GatewayConfig(
            site=site,
            node=name,
            models=tuple(self._paths),
            devices=tuple(devices),
            providers=tuple(providers),
            lanes=LaneConfig(
                max_batch_size=max_batch_size,
                max_delay_s=max_delay_ms / 1000,
                cache=CacheConfig(max_bytes=cache_bytes),
                workers=workers or os.cpu_count() or 1,
            ),
        )
        self._metrics_address = metrics_address
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._gateway: Gateway | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The names that requests use."""
        return tuple(self._paths)

    @property
    def model(self) -> str:
        """The one model's name.

        Raises:
            ValueError: there are several.
        """
        (name,) = self._paths
        return name

    def start(self) -> None:
        """Serve in a thread of its own.

        Raises:
            ModelError: a file cannot be served, and why.
            LinkError: no broker answered in time.
            RuntimeError: it serves already.
        """
        if self._thread is not None:
            raise RuntimeError(f"{', '.join(self.models)} served already")
        served = {name: local_model(name, path, self._config.providers) for name, path in self._paths.items()}
        connected = threading.Event()
        failures: list[BaseException] = []
        self._loop = Loop()
        self._thread = threading.Thread(
            target=self._serve, args=(self._loop, served, connected, failures), name=f"shoal-{self._config.node}"
        )
        self._thread.start()
        in_time = connected.wait(_CONNECT_S)
        if failures or not in_time:
            self.stop()
            if failures and not isinstance(failures[0], LinkError):
                raise failures[0]
            raise LinkError(f"no answer from the broker: {failures[0] if failures else 'it did not come in time'}")

    def stop(self) -> None:
        """Say goodbye and end the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            self._thread.join()
            self._loop.close()
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
        self,
        loop: Loop,
        served: Mapping[str, ServedModel],
        connected: threading.Event,
        failures: list[BaseException],
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # The outbox stays empty; SQLite wants its thread's own connection, so it is opened here.
            outbox = Outbox(Path(folder) / "outbox.sqlite")
            try:
                link = open_link(replace(self._link_config, backoff_max_s=2.0), self._config.site, self._config.node)
                gateway = Gateway(self._config, link, outbox, rng=random.SystemRandom(), loop=loop)
                for name, model in served.items():
                    gateway.lanes.serve(name, model)
                self._gateway = gateway
                # Subscriptions too must be there: the birth goes out before them, and its PUBACK comes back first.
                loop.call_every(
                    _POLL_S, lambda _now: connected.set() if link.connected and link.is_subscribed else None
                )
                with serving_metrics(gateway, self._metrics_address):
                    drive(gateway, loop)
            except (LinkError, ModelError, ConfigError, OSError) as exc:
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


def _by_name(files: ModelFiles) -> dict[str, Path]:
    if isinstance(files, Mapping):
        return {parse_id(name, "model"): Path(path) for name, path in files.items()}
    paths = [Path(path) for path in ([files] if isinstance(files, str | Path) else files)]
    if not paths:
        raise ValueError("no model to serve")
    named = {model_id(path.stem): path for path in paths}
    if len(named) < len(paths):
        raise ConfigError(f"files of one name: {', '.join(map(str, paths))}; give them names in a mapping")
    return named


def local_model(model: str, path: Path, providers: Sequence[str] = (engine.CPU,)) -> ServedModel:
    """Load a file as a release that forwards nothing.

    Raises:
        ModelError: it cannot be read, run or scored, and why.
    """
    try:
        sha256 = digest(path.read_bytes())
    except OSError as exc:
        raise ModelError(f"{path}: {exc.strerror}") from exc
    runtime = engine.load(path, providers)
    artefact = pb.Artefact(
        tier=pb.TIER_GATEWAY,
        format=pb.MODEL_FORMAT_ONNX,
        sha256=sha256,
        threshold=1.0,  # no score exceeds 1: nothing is ever promised
    )
    spec = pb.ReleaseSpec(
        model=model,
        release=1,
        input=pb.InputSchema(shape=runtime.input_shape, mean=[0.0], std=[1.0]),
        score=pb.SCORE_KIND_UNCERTAINTY,
        artefacts=[artefact],
    )
    return ServedModel(spec, artefact, runtime)
