"""The `[source]` table: which kind, and how each is made."""

import os
import random
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import get_args

from device_agent.sources.camera import CameraSettings, CameraSource
from device_agent.sources.csv_replay import CsvSettings, CsvSource
from device_agent.sources.feed import Source
from device_agent.sources.host import HostSettings, HostSource
from device_agent.sources.images import ImagesSettings, ImagesSource
from device_agent.sources.mqtt import MqttSettings, MqttSource
from device_agent.sources.stdin import StdinSettings, StdinSource
from shoal.link_config import LinkConfig, parse_broker_url

SourceSettings = CsvSettings | HostSettings | ImagesSettings | CameraSettings | MqttSettings | StdinSettings
SOURCES: Mapping[str, type[SourceSettings]] = MappingProxyType(
    {str(kind.__struct_config__.tag): kind for kind in get_args(SourceSettings)}
)


def make_source(
    settings: SourceSettings,
    *,
    node: str,
    broker: LinkConfig,
    rng: random.Random,
    environment: Mapping[str, str] = os.environ,
) -> Source:
    """Make the source that the settings describe.

    Args:
        settings: the table.
        node: the device, for what needs a name of its own.
        broker: the agent's, which an MQTT source reads too unless told otherwise.
        rng: for waits that must not be those of other devices.
        environment: where credentials for another broker are: SHOAL_SOURCE_USERNAME and SHOAL_SOURCE_PASSWORD.

    Raises:
        ConfigError: the settings contradict themselves, or need a package that is not installed.
    """
    match settings:
        case CsvSettings():
            return CsvSource(settings)
        case HostSettings():
            return HostSource(settings)
        case ImagesSettings():
            return ImagesSource(settings)
        case CameraSettings():
            return CameraSource(settings)
        case StdinSettings():
            return StdinSource(settings)
        case MqttSettings():
            return MqttSource(settings, _broker(settings, broker, environment), f"{node}-source", rng)


def _broker(settings: MqttSettings, own: LinkConfig, environment: Mapping[str, str]) -> LinkConfig:
    if not settings.broker:
        return own
    parsed = parse_broker_url(settings.broker)
    return replace(
        parsed,
        tls_ca=settings.tls_ca or parsed.tls_ca,
        username=environment.get("SHOAL_SOURCE_USERNAME", parsed.username),
        password=environment.get("SHOAL_SOURCE_PASSWORD", parsed.password),
    )
