"""The cloud's one TOML file, and what it names on disk."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cloud.retained import RETAINED_BUDGET_BYTES
from cloud.retention import Limits
from cloud.usage import Price
from shoal.config import BrokerSettings
from shoal.state import MAX_INTERVAL_S

_Count = Annotated[int, Meta(ge=1)]


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[models]]` entry: a model that this cloud signs for.

    Attributes:
        pipeline: the file that says how and when its releases are made; empty where people bring them.
    """

    name: str
    pipeline: str = ""


class RetentionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `[retention]` table: which samples the store lets go of.

    Attributes:
        keep_days: what came within this time is never dropped.
        max_age_days: what is older goes; 0 is no limit.
        max_bytes: of the store; above it the least worth goes first. 0 is no limit.
    """

    keep_days: Annotated[float, Meta(ge=0)] = 7.0
    max_age_days: Annotated[float, Meta(ge=0)] = 0.0
    max_bytes: Annotated[int, Meta(ge=0)] = 32 * 2**30

    def limits(self) -> Limits:
        return Limits.in_days(self.keep_days, self.max_age_days, self.max_bytes)


class CloudSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/cloud.md."""

    data_dir: str
    models: list[ModelSettings]
    retention: RetentionSettings = msgspec.field(default_factory=RetentionSettings)
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    train_threads: _Count = 1
    price: Price = Price()
    parallel_builds: _Count = 2
    retained_budget_bytes: _Count = RETAINED_BUDGET_BYTES
    state_interval_s: Annotated[float, Meta(gt=0, le=MAX_INTERVAL_S)] = 60.0

    @property
    def directory(self) -> Path:
        return Path(self.data_dir)

    @property
    def samples_path(self) -> Path:
        return self.directory / "samples.sqlite"

    @property
    def releases_dir(self) -> Path:
        return self.directory / "releases"

    @property
    def keys_dir(self) -> Path:
        return self.directory / "keys"

    @property
    def builds_dir(self) -> Path:
        """Checkpoints, while a step runs."""
        return self.directory / "builds"

    @property
    def objects_dir(self) -> Path:
        """What steps made, by digest."""
        return self.directory / "objects"

    @property
    def registry_path(self) -> Path:
        """What was run, from what, and what came of it."""
        return self.directory / "registry.sqlite"

    def model(self, name: str) -> ModelSettings | None:
        return next((model for model in self.models if model.name == name), None)
