"""What a gateway tells Prometheus: its counters and histograms, and whether it is well; nothing else is served.

/metrics   the exposition format
/healthz   200 while the broker is connected and every model is served, 503 and the reason otherwise
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from edge_gateway.histogram import Histogram
from edge_gateway.lanes import Histograms
from shoal.errors import ConfigError

_TIMEOUT_S = 5.0

_HELP = {
    "batch_rows": "Rows of each model call.",
    "queue_s": "Seconds that the first row of each batch waited for it.",
    "inference_s": "Seconds of each model call.",
    "request_s": "Seconds from a request's arrival to its reply.",
}


class GatewayCollector(Collector):
    """Reads a gateway's counters and histograms when it is asked to.

    Args:
        counters: returns all counters, by their names in NodeState.
    """

    def __init__(self, counters: Callable[[], Mapping[str, int]], histograms: Histograms) -> None:
        self._counters = counters
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        events = CounterMetricFamily(
            "shoal_gateway_events", "Counters as in NodeState; see docs/topics.md.", labels=["name"]
        )
        for name, value in sorted(self._counters().items()):
            events.add_metric([name], value)
        yield events
        for name, text in _HELP.items():
            yield _family(f"shoal_gateway_{name.replace('_s', '_seconds')}", text, getattr(self._histograms, name))


def _family(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    running, buckets = 0, []
    counts = list(histogram.counts)
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], counts, strict=True):
        running += count
        buckets.append((bound, running))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, sum_value=histogram.sum)
    return family


class MetricsServer:
    """An HTTP server in threads of its own, while the block runs.

    Args:
        address: `host:port`; port 0 takes a free one.
        ailment: says what is wrong with the gateway, or nothing.

    Raises:
        ConfigError: the address is none, or taken.
    """

    def __init__(self, address: str, collector: Collector, ailment: Callable[[], str]) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"metrics_address {address!r}, expected host:port")
        registry = CollectorRegistry()
        registry.register(collector)
        try:
            self._server = ThreadingHTTPServer((host, int(port)), _handler(registry, ailment))
        except (OSError, OverflowError) as exc:
            raise ConfigError(f"metrics_address {address}: {exc}; choose another, or none with an empty one") from exc
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(registry: CollectorRegistry, ailment: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path == "/healthz":
                wrong = ailment()
                status = HTTPStatus.SERVICE_UNAVAILABLE if wrong else HTTPStatus.OK
                self._answer(status, f"{wrong or 'ok'}\n".encode(), "text/plain; charset=utf-8")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"/metrics or /healthz\n", "text/plain; charset=utf-8")

        def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            """Scrapes are no news."""

    return Handler
