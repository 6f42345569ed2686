"""The cloud's processes: each has one loop and one link, and shares the cloud's data directory with the others."""

import datetime as dt
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cloud import ingest, trainer
from cloud.keys import ROOT_KEYS, FileKeyStore, Password, key_password
from cloud.pipelines.command import load_pipelines
from cloud.pruning import Retention
from cloud.publisher import Publisher
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, TOP_LEVEL, first_generation
from cloud.settings import CloudSettings
from cloud.sqlite_store import SqliteSampleStore
from shoal.config import link_config
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import service_identity
from shoal.loop import Loop
from shoal.release.durable import write_atomic
from shoal.release.trust import model_role
from shoal.state import Report, StateReporter

log = logging.getLogger(__name__)

_FAST_S = 0.2
_SLOW_S = 0.5


def init(settings: CloudSettings, password: Password | None = None) -> Path:
    """Make keys, an empty repository and stores; return the root metadata that nodes are provisioned with.

    Three keys for root, of which two must sign; one for each other role.

    Args:
        settings: the cloud's.
        password: what the key files are encrypted with; without one they are not, as the log then says.

    Raises:
        ConfigError: it was done before, or the directory cannot be made.
    """
    try:
        settings.directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data_dir {settings.data_dir}: {exc.strerror}") from exc
    keys = FileKeyStore(settings.keys_dir, password)
    models = [model.name for model in settings.models]
    keys.create("root", ROOT_KEYS)
    for role in (*TOP_LEVEL[1:], ROLLOUT, *map(model_role, models)):
        keys.create(role)
    if password is None:
        log.warning("key files are NOT encrypted directory=%s: `shoal keys init` encrypts", settings.keys_dir)
    releases = ReleaseStore(settings.releases_dir)
    releases.create(first_generation(keys, models, dt.datetime.now(dt.UTC)))
    SqliteSampleStore(settings.samples_path).close()
    root = settings.directory / "root.json"
    write_atomic(root, releases.root())
    return root


def run_ingest(settings: CloudSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: `init` comes first.
    """
    store = open_samples(settings)
    loop, link = _open(settings, ingest.SERVICE)
    service = ingest.Ingest(link, store)
    loop.on_idle(lambda _: service.flush())
    retention = Retention(store, settings.retention.limits())

    def make_room(now: float) -> None:
        loop.call_at(now + retention.step(), make_room)

    loop.call_soon(lambda: make_room(loop.clock()))
    _serve(settings, loop, link, lambda: service.counters + retention.counters)
    service.flush()
    store.close()


def run_trainer(settings: CloudSettings, config: Path) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: `init` comes first, or a pipeline file is wrong.
    """
    pipelines = load_pipelines(settings)
    store = open_samples(settings)
    loop, link = _open(settings, trainer.SERVICE)
    service = trainer.Trainer(settings, link, store, pipelines=pipelines, start_run=trainer.process_starter(config))
    loop.call_every(_SLOW_S, service.tick)
    try:
        _serve(settings, loop, link, lambda: service.counters)
    finally:
        service.close()
        store.close()


def run_publisher(settings: CloudSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: `init` comes first.
    """
    releases = ReleaseStore(settings.releases_dir)
    releases.load()
    loop, link = _open(settings, "publisher")
    counters: Counter[str] = Counter()
    keys = FileKeyStore(settings.keys_dir, key_password)
    service = Publisher(link, releases, keys, counters=counters, budget_bytes=settings.retained_budget_bytes)
    service.start()
    link.on_connect(service.on_connect)
    loop.call_every(_FAST_S, service.tick)
    _serve(settings, loop, link, lambda: counters + service.retained())
    service.close()


def open_samples(settings: CloudSettings) -> SqliteSampleStore:
    """Open the store that `init` made.

    Raises:
        ConfigError: it did not, or a later version of Shoal has changed the store.
    """
    if not settings.samples_path.is_file():
        raise ConfigError(f"{settings.samples_path} is not there: make it with `shoal cloud init`")
    return SqliteSampleStore(settings.samples_path)


def _open(settings: CloudSettings, service: str) -> tuple[Loop, Link]:
    return Loop(), Link(link_config(settings.broker, session_expiry_s=0), service_identity(service))


def _serve(settings: CloudSettings, loop: Loop, link: Link, counters: Callable[[], Counter[str]]) -> None:
    rng = random.SystemRandom()
    report: Callable[[], Report] = lambda: Report(counters() + link.counters)  # noqa: E731
    reporter = StateReporter(link, report, interval_s=settings.state_interval_s, rng=rng)
    link.attach(loop)
    loop.call_every(_FAST_S, reporter.tick)
    with loop.stopping_on_signals():
        loop.run()
    link.close()
    loop.close()
