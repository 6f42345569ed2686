"""The cloud's one TOML file, and what it names on disk."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cloud.retained import RETAINED_BUDGET_BYTES
from shoal.config import BrokerSettings
from shoal.state import MAX_INTERVAL_S

_Count = Annotated[int, Meta(ge=1)]


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[models]]` entry: what is trained, when, and for whom.

    Attributes:
        min_new_labels: a release is made once this many samples were labelled since the last one.
        max_releases: none after this; 0 is no limit.
        targets: node patterns of its plan.
    """

    name: str
    min_new_labels: _Count = 200
    max_releases: Annotated[int, Meta(ge=0)] = 0
    targets: list[str] = msgspec.field(default_factory=lambda: ["*"])


class CloudSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/cloud.md."""

    data_dir: str
    models: list[ModelSettings]
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)
    seed: int = 0
    train_threads: _Count = 1
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
        """Checkpoints while a build runs, and one JSON report for each release."""
        return self.directory / "builds"

    def model(self, name: str) -> ModelSettings | None:
        return next((model for model in self.models if model.name == name), None)
