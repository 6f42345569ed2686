"""What Prometheus reads, over real HTTP."""

from collections import Counter
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from edge_gateway.histogram import ROWS, Histogram
from edge_gateway.lanes import Histograms
from edge_gateway.metrics import GatewayCollector, MetricsServer
from shoal.errors import ConfigError


@pytest.fixture
def told():
    """Counters, histograms, what is wrong, and where it is served."""
    counters, histograms, wrong = Counter({"requests": 7, "cache.hits": 2}), Histograms(), []
    collector = GatewayCollector(lambda: counters, histograms)
    with MetricsServer("127.0.0.1:0", collector, lambda: "".join(wrong)) as server:
        yield counters, histograms, wrong, f"http://127.0.0.1:{server.port}"


def read(url):
    with urlopen(url) as answer:
        return answer.read().decode()


def test_counters_and_histograms_are_what_they_are_now(told):
    """Prometheus's own parser reads them back."""
    counters, histograms, _, url = told
    histograms.batch_rows.observe(3)
    histograms.batch_rows.observe(1000)
    counters["requests"] += 1
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(read(f"{url}/metrics"))
        for sample in family.samples
    }
    assert samples["shoal_gateway_events_total", ("requests",)] == 8
    assert samples["shoal_gateway_events_total", ("cache.hits",)] == 2
    assert samples["shoal_gateway_batch_rows_bucket", ("4",)] == 1
    assert samples["shoal_gateway_batch_rows_bucket", ("256",)] == 1
    assert samples["shoal_gateway_batch_rows_bucket", ("+Inf",)] == 2
    assert samples["shoal_gateway_batch_rows_sum", ()] == 1003
    assert samples["shoal_gateway_request_seconds_count", ()] == 0


def test_health_says_what_is_wrong(told):
    """For load balancers and people."""
    _, _, wrong, url = told
    assert read(f"{url}/healthz") == "ok\n"
    wrong.append("not connected")
    with pytest.raises(HTTPError, match="503") as caught:
        urlopen(f"{url}/healthz")
    assert caught.value.read() == b"not connected\n"


@pytest.mark.parametrize("path", ["/", "/metrics/x", "/../etc/passwd", "/debug"])
def test_nothing_else_is_served(told, path):
    """Two paths, and no more to attack."""
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{told[3]}{path}")


@pytest.mark.parametrize("address", ["5000", "host:", "127.0.0.1:http", "127.0.0.1:70000"])
def test_address_that_is_none_is_said(address):
    """Before the gateway serves."""
    with pytest.raises(ConfigError, match="metrics_address"):
        MetricsServer(address, GatewayCollector(Counter, Histograms()), str)


@given(st.lists(st.floats(0, 300)), st.floats(0, 1))
def test_histogram_counts_every_value_once(values, share):
    """And its quantile is the bound that enough of them do not exceed."""
    histogram = Histogram(ROWS)
    for value in values:
        histogram.observe(value)
    assert histogram.count == len(values)
    bound = histogram.quantile(share)
    assert sum(value <= bound for value in values) >= share * len(values) - 1e-6
