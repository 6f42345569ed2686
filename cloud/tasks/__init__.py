"""The tasks that ship, by model name. A task's module is imported only when it is asked for: torch takes seconds."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import cast

from cloud.tasks.base import Task
from shoal.errors import ConfigError

TASKS: Mapping[str, str] = MappingProxyType(
    {"sensor": "cloud.tasks.shuttle:ShuttleTask", "vision": "cloud.tasks.digits:DigitsTask"}
)


def load_task(name: str, model: str, parameters: Mapping[str, object], base: Path) -> Task:
    """Return a task.

    Raises:
        ConfigError: there is none.
    """
    del model, parameters, base
    place = TASKS.get(name)
    if place is None:
        raise ConfigError(f"no task {name!r}; one of {sorted(TASKS)}")
    module, kind = place.split(":")
    return cast("Task", getattr(import_module(module), kind)())
