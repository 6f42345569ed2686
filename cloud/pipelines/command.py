"""A run as a process has it: the settings that it needs, signals that end it well, and a publisher for what it made."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cloud.keys import FileKeyStore, key_password
from cloud.pipelines.engine import Engine, Progress, StoppedError
from cloud.pipelines.file import Pipeline, load_pipeline
from cloud.publisher import Publisher
from cloud.release_store import PublisherRunsError, ReleaseStore
from cloud.settings import CloudSettings, ModelSettings
from cloud.tasks import load_task
from shoal.config import BrokerSettings, link_config
from shoal.errors import ConfigError, LinkError
from shoal.link import Link
from shoal.link_config import service_identity
from shoal.loop import Loop

_TICK_S = 0.1


def load_pipelines(settings: CloudSettings) -> list[Pipeline]:
    """Read the pipelines of the models that have one.

    Raises:
        ConfigError: one cannot be read, or makes another model.
    """
    return [load_model_pipeline(model) for model in settings.models if model.pipeline]


def load_model_pipeline(model: ModelSettings) -> Pipeline:
    """Read a model's pipeline file; raises as `load_pipelines` does."""
    pipeline = load_pipeline(Path(model.pipeline))
    if pipeline.model != model.name:
        raise ConfigError(f"{model.pipeline} makes {pipeline.model!r}, expected {model.name!r}")
    return pipeline


def settings_of(path: Path, pipeline: Pipeline, data_dir: Path, broker_url: str) -> CloudSettings:
    """Return settings for one pipeline, where no file gives them."""
    model = ModelSettings(name=pipeline.model, pipeline=str(path))
    return CloudSettings(data_dir=str(data_dir), models=[model], broker=BrokerSettings(url=broker_url))


@contextmanager
def opened_engine(
    settings: CloudSettings,
    path: Path,
    pipeline: Pipeline,
    progress: Progress,
) -> Iterator[Engine]:
    """Open the registry and the task of a pipeline.

    Raises:
        ConfigError: the stores were never made, or the task does not take its parameters.
    """
    if not settings.samples_path.is_file():
        raise ConfigError(f"{settings.samples_path} is not there: make it with `shoal keys init`")
    task = load_task(pipeline.task, pipeline.model, pipeline.parameters, path.parent)
    engine = Engine(settings, pipeline, task, path, progress=progress)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `StoppedError` wherever the process is.

    That is as good as any place: a run survives being killed, and this is a kill that the registry hears of. A second
    signal ends the process as it would without us.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        raise StoppedError(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def publish_waiting(settings: CloudSettings, patience_s: float) -> None:
    """See to it that everything in the publisher's queue is out: by the publisher that runs, or else here.

    Raises:
        ConfigError: a key to sign with is missing.
        LinkError: it was not out in time: the broker cannot be reached, or a publisher elsewhere stands still.
    """
    store = ReleaseStore(settings.releases_dir)
    patient_until = time.monotonic() + patience_s
    try:
        _publish_here(settings, store, patient_until)
    except PublisherRunsError:
        while store.orders():
            if time.monotonic() > patient_until:
                raise LinkError(f"the publisher that runs has not taken the release in {patience_s:.0f} s") from None
            time.sleep(_TICK_S)


def _publish_here(settings: CloudSettings, store: ReleaseStore, patient_until: float) -> None:
    loop = Loop()
    link = Link(link_config(settings.broker, session_expiry_s=0), service_identity("publisher"))
    keys = FileKeyStore(settings.keys_dir, key_password)
    publisher = Publisher(link, store, keys, counters=Counter(), budget_bytes=settings.retained_budget_bytes)
    publisher.start()
    try:
        link.on_connect(publisher.on_connect)
        link.attach(loop)
        loop.call_every(_TICK_S, publisher.tick)
        loop.run(until=lambda: publisher.settled or loop.clock() > patient_until)
        if not publisher.settled:
            raise LinkError(f"the broker at {settings.broker.url} has not confirmed the release in time")
    finally:
        link.close()
        loop.close()
        publisher.close()
