"""The tasks that ship, by model name. A task's module is imported only when it is asked for: torch takes seconds."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import cast

from cloud.tasks.base import Task
from shoal.errors import ConfigError

TASKS: Mapping[str, str] = MappingProxyType(
    {"shuttle": "cloud.tasks.shuttle:ShuttleTask", "digits": "cloud.tasks.digits:DigitsTask"}
)


def load_task(model: str) -> Task:
    """Return the task of a model.

    Raises:
        ConfigError: there is none.
    """
    place = TASKS.get(model)
    if place is None:
        raise ConfigError(f"no task for model {model!r}; one of {sorted(TASKS)}")
    module, name = place.split(":")
    return cast("Task", getattr(import_module(module), name)())
