"""Finding a task: one that ships, one that an installed package offers, or one file of the user's.

A task's module is imported only when it is asked for: torch takes seconds.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias, TypeVar, cast

import msgspec

from cloud.tasks.base import Task
from shoal.errors import ConfigError

GROUP = "shoal.tasks"
# The same as in pyproject.toml, so that a checkout that was never installed has them too.
BUILT_IN: Mapping[str, str] = MappingProxyType(
    {"sensor": "cloud.tasks.sensor:SensorTask", "vision": "cloud.tasks.vision:VisionTask"}
)

# Makes a task of the model's name, the pipeline file's parameters, and the directory that paths in them begin at.
TaskFactory: TypeAlias = Callable[[str, Mapping[str, object], Path], Task]

T = TypeVar("T", bound=msgspec.Struct)


def load_task(name: str, model: str, parameters: Mapping[str, object], base: Path) -> Task:
    """Make a task.

    Args:
        name: `sensor` or `vision`, an entry point of the group `shoal.tasks`, or `file.py:Class`.
        model: the name that releases carry.
        parameters: the task's own.
        base: where the pipeline file lies; relative paths begin there.

    Raises:
        ConfigError: there is no such task, or it does not take these parameters.
    """
    return _factory(name, base)(model, parameters, base)


def parse_parameters(parameters: Mapping[str, object], kind: type[T]) -> T:
    """Check a task's parameters; `kind` should refuse unknown fields.

    Raises:
        ConfigError: a parameter is unknown, missing or of the wrong kind; the message names it.
    """
    try:
        return msgspec.convert(parameters, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"parameters: {exc}") from exc


def _factory(name: str, base: Path) -> TaskFactory:
    if name in BUILT_IN:
        module, _, kind = BUILT_IN[name].partition(":")
        return cast("TaskFactory", getattr(import_module(module), kind))
    if ".py:" in name:
        return _from_file(name, base)
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offered:
        raise ConfigError(f"no task {name!r}: there is {', '.join(sorted({*BUILT_IN, *offered}))}, or `file.py:Class`")
    try:
        return cast("TaskFactory", offered[name].load())
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"task {name!r} of {offered[name].value}: {exc}") from exc


def _from_file(name: str, base: Path) -> TaskFactory:
    file, _, kind = name.rpartition(":")
    path = (base / file).resolve()
    # A trained module is kept with the name of its class, so the name must be the same in every process.
    module_name = f"shoal_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"task {name!r}: {path} is not there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    found = getattr(module, kind, None)
    if found is None:
        raise ConfigError(f"task {name!r}: {path} has no {kind}")
    return cast("TaskFactory", found)
