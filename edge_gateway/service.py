"""The gateway as a process: one loop, one link, one outbox, and the update client that brings its models."""

import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_gateway.cache import CacheConfig
from edge_gateway.engine import CPU, runtime_name
from edge_gateway.gateway import Gateway, GatewayConfig
from edge_gateway.lanes import MAX_BATCH_SIZE, LaneConfig
from edge_gateway.metrics import GatewayCollector, MetricsServer
from shoal.config import BrokerSettings, link_config
from shoal.delivery.outbox import Limits, Outbox
from shoal.errors import ConfigError, PayloadError
from shoal.ids import parse_id
from shoal.link import Link
from shoal.link_config import LinkConfig, node_identity
from shoal.loop import Loop
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.selftest import ChildSelfTest
from shoal.release.trust import TrustStore
from shoal.state import MAX_INTERVAL_S
from shoal.v1.release_pb2 import Tier

_TICK_S = 0.05
# What a gateway missed while it was away is sent again by the devices: no session.
SESSION_EXPIRY_S = 0
# Requests and replies under way: several full batches, and what a site's devices ask at once. The shipped broker
# profiles allow as many.
WINDOW = 500

# Checked while the file is read, so that the message names the key.
_NotNegative = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(gt=0)]


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The gateway's TOML file; see docs/gateway.md."""

    site: str
    node: str
    models: Annotated[list[str], Meta(min_length=1)]
    data_dir: str
    trusted_root: str
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    devices: list[str] = []
    max_batch_size: Annotated[int, Meta(gt=0, le=MAX_BATCH_SIZE)] = 32
    max_delay_ms: _NotNegative = 0.0
    cache_bytes: Annotated[int, Meta(ge=0)] = 16 << 20
    outbox_items: _Count = 200_000
    outbox_bytes: _Count = 1 << 30
    state_interval_s: Annotated[float, Meta(gt=0, le=MAX_INTERVAL_S)] = 60.0
    sample_linger_s: _NotNegative = 0.5
    retry_after_s: Annotated[float, Meta(gt=0)] = 10.0
    probation_s: _NotNegative = 10.0
    max_waiting_per_device: _Count = 64
    workers: Annotated[int, Meta(ge=0)] = 0
    providers: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: [CPU])
    metrics_address: str = "127.0.0.1:5000"

    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(
            site=self.site,
            node=self.node,
            models=self.models,
            devices=self.devices,
            lanes=LaneConfig(
                max_batch_size=self.max_batch_size,
                max_delay_s=self.max_delay_ms / 1000,
                max_waiting_per_device=self.max_waiting_per_device,
                workers=self.workers or os.cpu_count() or 1,
                cache=CacheConfig(max_bytes=self.cache_bytes),
            ),
            providers=self.providers,
            state_interval_s=self.state_interval_s,
            sample_linger_s=self.sample_linger_s,
            retry_after_s=self.retry_after_s,
        )


def run(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: a file that the settings name is missing or unusable, or a name is not an id.
    """
    _check_names(settings)
    root = _read_root(settings)
    directory = _make_directory(settings)
    link = open_link(link_config(settings.broker, session_expiry_s=SESSION_EXPIRY_S), settings.site, settings.node)
    loop = Loop()
    rng = random.SystemRandom()
    outbox = Outbox(directory / "outbox.sqlite", Limits(settings.outbox_items, settings.outbox_bytes))
    gateway = Gateway(settings.gateway_config(), link, outbox, rng=rng, loop=loop)
    updates = UpdateClient(
        link,
        TrustStore(directory / "trust", root),
        directory / "models",
        [
            NodeModel(model, Tier.TIER_GATEWAY, runtime_name(settings.providers), settings.probation_s)
            for model in settings.models
        ],
        node=settings.node,
        self_test=ChildSelfTest("edge_gateway.engine"),
        activate=gateway.activate,
        deactivate=gateway.deactivate,
        find_watch=gateway.watch,
        rng=rng,
        counters=gateway.counters,
    )
    gateway.model_states = updates.state
    gateway.clock_suspect = lambda: updates.clock_suspect
    updates.start()
    loop.call_every(_TICK_S, updates.tick)
    try:
        with serving_metrics(gateway, settings.metrics_address):
            serve(gateway, loop)
        updates.excuse_start()
    finally:
        updates.close()
        outbox.close()
        loop.close()


def _check_names(settings: GatewaySettings) -> None:
    names = [("site", settings.site), ("node", settings.node)]
    names += [("models", model) for model in settings.models]
    names += [("devices", device) for device in settings.devices]
    try:
        for key, name in names:
            parse_id(name, key)
    except PayloadError as exc:
        raise ConfigError(str(exc)) from exc


def _read_root(settings: GatewaySettings) -> bytes:
    try:
        return Path(settings.trusted_root).read_bytes()
    except OSError as exc:
        raise ConfigError(f"trusted_root {settings.trusted_root}: {exc.strerror}") from exc


def _make_directory(settings: GatewaySettings) -> Path:
    directory = Path(settings.data_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data_dir {settings.data_dir}: {exc.strerror}") from exc
    return directory


def open_link(config: LinkConfig, site: str, node: str) -> Link:
    windows = replace(config, max_inflight=WINDOW, receive_maximum=WINDOW)
    return Link(windows, node_identity(site, node, "gateway"))


def serving_metrics(gateway: Gateway, address: str) -> AbstractContextManager[object]:
    """Serve Prometheus while the block runs; an empty address serves nothing."""
    if not address:
        return nullcontext()
    collector = GatewayCollector(gateway.all_counters, gateway.lanes.histograms)
    return MetricsServer(address, collector, gateway.ailment)


def serve(gateway: Gateway, loop: Loop) -> None:
    """Drive a gateway until SIGINT or SIGTERM."""
    with loop.stopping_on_signals():
        drive(gateway, loop)


def drive(gateway: Gateway, loop: Loop) -> None:
    """Drive a gateway on the loop until it is stopped."""
    gateway.link.attach(loop)
    loop.call_every(_TICK_S, gateway.tick)
    loop.on_idle(_flusher(gateway, loop))
    loop.run()
    gateway.close()
    gateway.link.close()


def _flusher(gateway: Gateway, loop: Loop) -> Callable[[float], None]:
    """Flush when idle, and wake the loop when rows that wait for company have waited long enough."""
    planned: float | None = None

    def flush(now: float) -> None:
        nonlocal planned
        gateway.flush(now)
        due = gateway.due_at()
        if due is not None and due != planned:
            planned = due
            loop.call_at(due, gateway.flush)

    return flush
