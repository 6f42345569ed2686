"""A device's counters as Prometheus reads them: as an answer to a command, and over HTTP where the settings want it.

Written by hand, because a device has no Prometheus client; the names are those of NodeState (docs/topics.md).
"""

from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(counters: Mapping[str, int], gauges: Mapping[str, float]) -> bytes:
    """The text exposition format. Source: prometheus.io, "Exposition formats", text-based format 0.0.4."""
    lines = [
        "# HELP shoal_device_events_total Counters as in NodeState; see docs/topics.md.",
        "# TYPE shoal_device_events_total counter",
        *(f'shoal_device_events_total{{name="{_escaped(name)}"}} {value}' for name, value in sorted(counters.items())),
    ]
    for name, value in sorted(gauges.items()):
        lines += [f"# TYPE shoal_device_{name} gauge", f"shoal_device_{name} {value!r}"]
    return ("\n".join(lines) + "\n").encode()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
