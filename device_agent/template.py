"""A device's configuration file as `shoal device init` writes it: every setting, its meaning and its default. Pure.

What is asked for or has no default stands as it is; the others are commented out, so that defaults stay Shoal's.
"""

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

import msgspec

from device_agent.agent import AgentSettings
from device_agent.change import DeadBandSettings
from device_agent.sources.settings import SOURCES
from shoal.config import BrokerSettings

# One line each; docs/device.md has the same settings in its table.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "site": "which site the device belongs to",
        "node": "its name, one in the fleet; client id and user name at the broker too",
        "model": "which model it runs; releases come by themselves",
        "data_dir": "outbox, models and trust; must survive a restart",
        "trusted_root": "what signed metadata is verified against, from `shoal cloud init` or `shoal keys init`",
        "runtime": 'which interpreter runs models: "litert", "tflite", or "auto" for the one that is installed',
        "max_share": "share of readings that may be asked; the threshold rises to keep it",
        "audit_share": "part of it, asked at random, so that recall stays measurable",
        "max_per_minute": "questions a minute, whatever their reason",
        "max_per_day": "and a day; no such cap by default",
        "max_bytes_per_minute": "bytes of questions a minute; no such cap by default",
        "max_bytes_per_day": "and a day; no such cap by default",
        "score_threshold": "in place of the release's; 0 leaves the choice to the budget",
        "answer_within_ms": "how long an application waits for the gateway, 0: no hurry; the reading stays owed anyhow",
        "retry_after_s": "a question without a reply is asked again after this",
        "outbox_items": "how many readings may be owed; `shoal device outbox size` computes it",
        "outbox_bytes": "and how many bytes of them",
        "outbox_hold_s": "above 0 it spares the flash: questions wait so long in memory for their answer",
        "outbox_hold_items": "at most so many of them",
        "state_interval_s": "how often the device reports itself, at least",
        "probation_s": "how long a new model is watched at least; at most it is ten times as long",
        "metrics_address": "host:port where Prometheus may read /metrics; empty opens none",
    }
)
BROKER_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "url": "mqtt://host:port or mqtts://host:port; SHOAL_BROKER, SHOAL_USERNAME and SHOAL_PASSWORD override",
        "tls_ca": "the authority that signed the broker's certificate; for mqtts the system's by default",
        "tls_cert": "the device's own certificate, where the broker asks for one",
        "tls_key": "and its key",
    }
)
CHANGE_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "threshold": "a reading whose values all stay this near the last change is unchanged: no model call",
        "adapt": "share by which that baseline follows unchanged readings; 0 keeps it",
    }
)
SOURCE_MEANINGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "csv": {
            "path": "the file to replay",
            "columns": "whose values make a reading, in this order",
            "rate_hz": "rows a second; above 100 in bursts",
            "header": "the first row has the columns' names; else they are numbers from 1",
            "delimiter": "one character",
            "repeat": "begin again at the end",
        },
        "host": {
            "values": "of cpu_percent, load_1m, load_5m, load_15m, memory_percent, swap_percent, disk_percent, "
            "disk_free_bytes, temperature_celsius",
            "rate_hz": "polls a second",
            "disk": "a path on the disk that is meant",
            "temperature": "the chip whose hottest sensor counts; empty: all of them",
        },
        "images": {
            "path": "a file, or a directory of them",
            "pattern": "which of its files",
            "follow": "wait for more to come",
            "rate_hz": "pictures a second",
            "size": "[height, width] of what leaves the source",
            "grey": "one channel instead of three",
        },
        "camera": {
            "device": "a number, or a device, stream or video that OpenCV opens",
            "rate_hz": "pictures a second",
            "size": "[height, width] of what leaves the source",
            "grey": "one channel instead of three",
        },
        "mqtt": {
            "topics": "one filter with all values, or one topic for each value",
            "values": "JMESPath, one for each value; @ is the whole payload",
            "broker": "another broker than the agent's; SHOAL_SOURCE_USERNAME and SHOAL_SOURCE_PASSWORD are for it",
            "tls_ca": "its authority",
            "retained": "take values that were published before",
        },
        "stdin": {"values": "JMESPath, one for each value of a line; @ is the whole line"},
    }
)
# For what has no default, or none that can be written.
_EXAMPLES: Mapping[str, object] = MappingProxyType(
    {
        "csv.path": "/var/lib/shoal/readings.csv",
        "csv.columns": ["temperature", "vibration"],
        "host.values": ["temperature_celsius", "load_1m"],
        "images.path": "/var/spool/camera",
        "mqtt.topics": ["zigbee2mqtt/kitchen"],
        "max_per_day": 5000,
        "max_bytes_per_minute": 20_000,
        "max_bytes_per_day": 1_000_000,
        "score_threshold": 0.0,
        "size": [96, 96],
        "tls_ca": "/etc/shoal/ca.pem",
        "tls_cert": "/etc/shoal/device.pem",
        "tls_key": "/etc/shoal/device.key",
    }
)
_TABLES = ("broker", "change", "source", "answers")


def render(chosen: Mapping[str, str], broker: str, source: str) -> str:
    """The whole file. `chosen` has the settings without a default; where readings come from is an example to adapt."""
    lines = ["# The agent of a Shoal device: `shoal device check` says what is wrong with it.", ""]
    lines += _entries(AgentSettings, MEANINGS, dict(chosen))
    lines += ["[broker]", *_entries(BrokerSettings, BROKER_MEANINGS, {"url": broker})]
    lines += ["# Other kinds of change detector: docs/devices.md", "[change]", 'kind = "dead_band"']
    lines += _entries(DeadBandSettings, CHANGE_MEANINGS, {})
    lines += ["[source]", f"kind = {_toml(source)}", *_entries(SOURCES[source], SOURCE_MEANINGS[source], {}, source)]
    lines += ["# For applications on this device: one JSON object for each answer, on standard output; or with", "#"]
    lines += ['#     kind = "mqtt"', '#     topic = "answers/camera"', '#     broker = "mqtt://127.0.0.1:1883"', "#"]
    lines += ["# on a topic of a broker, this device's own by default", "# [answers]", '# kind = "stdout"']
    return "\n".join(lines).rstrip() + "\n"


def _entries(
    kind: type[msgspec.Struct], meanings: Mapping[str, str], chosen: Mapping[str, object], source: str = ""
) -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        name = field.name
        if name in _TABLES and kind is AgentSettings:
            continue
        yield f"# {meanings[name]}"
        if name in chosen:
            yield f"{name} = {_toml(chosen[name])}"
        elif field.required:
            yield f"{name} = {_toml(_EXAMPLES[f'{source}.{name}'])}"
        else:
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            yield f"# {name} = {_toml(_EXAMPLES[name] if default is None else default)}"
        yield ""


def _toml(value: Any) -> str:  # noqa: ANN401  whatever a setting may be
    """TOML agrees with JSON on what settings are made of."""
    return json.dumps(value.value if isinstance(value, Enum) else value, ensure_ascii=False)
