import re
from collections.abc import Callable
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_console.demo import charts
from fleet_console.demo.charts import Scores
from fleet_console.demo.measure import AccuracyPoint, Mark, Uplink
from fleet_console.drawing import Frame
from shoal.delivery.ledger import Account

POINTS = [AccuracyPoint(1.5, 0.99, 0.99, 20), AccuracyPoint(4.5, 0.4, 0.7, 20), AccuracyPoint(7.5, 0.95, 0.97, 20)]
MARKS = [Mark(0.0, "release 1"), Mark(3.0, "drift begins"), Mark(6.0, "release 2")]
UPLINK = Uplink(1000, 50, 0.98, 0.9, 0.08, 0.07, 20_000, 200_000, 80_000)
ACCOUNT = Account(1000, 900, 0, 100, 99, 1, 0, 0, 40, 40, 0, 0, 0)

Draw = Callable[[Frame], str]
DRAWN: dict[str, Draw] = {
    "accuracy": lambda frame: charts.accuracy_chart(POINTS, MARKS, frame),
    "bytes": lambda frame: charts.bytes_chart(UPLINK, frame),
    "sensors": lambda frame: charts.sensor_scores_chart(
        [Scores("normal", [0.0, 0.001, 0.002], 0.05), Scores("anomaly", [3.0, 0.01], 0.05)], frame
    ),
    "cameras": lambda frame: charts.camera_scores_chart(
        [Scores("before", [0.1, 0.2], 0.2), Scores("after", [0.7], 0.2), Scores("update", [0.1], None)], frame
    ),
    "latency": lambda frame: charts.latency_chart({"sensors": [1.0, 2.0, 900.0], "cameras": [20.0]}, frame),
    "ledger": lambda frame: charts.ledger_chart(ACCOUNT, frame),
}
EMPTY: dict[str, Draw] = {
    "accuracy": lambda frame: charts.accuracy_chart([], [], frame),
    "bytes": lambda frame: charts.bytes_chart(Uplink(0, 0, 0, 0, 0, 0, 0, 0, 0), frame),
    "sensors": lambda frame: charts.sensor_scores_chart([Scores("normal", [], None)], frame),
    "cameras": lambda frame: charts.camera_scores_chart([Scores("before", [], None)], frame),
    "latency": lambda frame: charts.latency_chart({"sensors": []}, frame),
    "ledger": lambda frame: charts.ledger_chart(Account(*[0] * 13), frame),
}
each = pytest.mark.parametrize("name", DRAWN)


def _texts(svg):
    return ["".join(text.itertext()).strip() for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@each
def test_chart_is_well_formed_and_named(name):
    """Pins that a page can take it as it is, and that who cannot see it hears what it is."""
    root = ET.fromstring(DRAWN[name](Frame(name, 480, 300)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"]
    assert root.attrib["viewBox"] == "0 0 480 300"


@each
def test_chart_needs_nothing_from_outside(name):
    """Pins that there is no style for the rest of the page, no script, no picture and no address."""
    svg = DRAWN[name](Frame(name, 480, 300))
    assert not re.search(r"<(style|script|image|foreignObject)\b", svg)
    assert set(re.findall(r"https?://[^\"]+", svg)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "DejaVu" not in svg


@each
def test_colours_are_variables_of_the_page(name):
    """Pins what makes one drawing serve light and dark pages: no bare colour is left."""
    svg = DRAWN[name](Frame(name, 480, 300))
    bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", svg)
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", bare)) == set()
    assert "var(--ink" in svg


def test_charts_of_one_page_share_no_id():
    """Pins that clip paths and markers of one chart never serve another; each reference has its target."""
    page = [draw(Frame(f"{name}-{size}", 480, 300)) for name, draw in DRAWN.items() for size in ("wide", "phone")]
    ids = re.findall(r'\bid="([^"]+)"', "".join(page))
    assert len(ids) == len(set(ids))
    for svg in page:
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {one or other for one, other in used} <= set(re.findall(r'\bid="([^"]+)"', svg))


@each
def test_chart_of_the_same_figures_is_the_same(name):
    """Pins that a report can be compared with another: no date, no random id."""
    assert DRAWN[name](Frame(name, 480, 300)) == DRAWN[name](Frame(name, 480, 300))


@each
def test_chart_of_nothing_is_still_a_chart(name):
    """Pins that a run which ended early gets its report; warnings are errors here."""
    ET.fromstring(EMPTY[name](Frame(name, 340, 300)))


def test_drawing_leaves_matplotlibs_settings_alone():
    """Pins that there is no global state to leave behind."""
    before = dict(mpl.rcParams)
    DRAWN["accuracy"](Frame("accuracy", 480, 300))
    assert dict(mpl.rcParams) == before


def test_accuracy_names_curves_drift_and_releases():
    """Pins every label of the first picture."""
    texts = _texts(DRAWN["accuracy"](Frame("a", 1000, 330)))
    assert {"device alone", "with the gateway's answers", "release 1", "drift begins", "release 2"} <= set(texts)
    assert "seconds since the first camera reading" in texts


def test_bytes_are_compared_with_both_kinds_of_json():
    """Pins figures and ratios, and that the unit says what it is."""
    texts = _texts(DRAWN["bytes"](Frame("b", 480, 300)))
    assert "20 kB" in texts
    assert "80 kB · 4.0\N{MULTIPLICATION SIGN}" in texts
    assert "200 kB · 10.0\N{MULTIPLICATION SIGN}" in texts
    assert any("1 kB = 1,000 bytes" in text for text in texts)


def test_uncertain_share_is_counted_against_the_phases_own_threshold():
    """Pins the share in each row's title: a score at the threshold is not above it."""
    texts = _texts(DRAWN["cameras"](Frame("c", 480, 340)))
    assert {"before: 0% of 2 uncertain", "after: 100% of 1 uncertain", "update, 1 readings"} <= set(texts)


def test_latency_marks_percentiles_of_each_fleet():
    """Pins the six labels with their unit."""
    texts = _texts(DRAWN["latency"](Frame("l", 480, 300)))
    assert {"p50 2.0 ms", "p50 20 ms", "p99 20 ms"} <= set(texts)
    assert sum(text.startswith(("p50", "p90", "p99")) for text in texts) == 6


def test_text_in_a_chart_is_escaped():
    """Pins that a name cannot become markup."""
    svg = charts.accuracy_chart(POINTS, [Mark(1.0, "<b>&release")], Frame("x", 480, 300))
    assert "<b>" not in svg
    assert "<b>&release" in _texts(svg)


@given(
    labels=st.lists(st.tuples(st.floats(0, 100), st.text("abc ", min_size=1, max_size=20)), max_size=12),
    width=st.floats(200, 1000),
)
def test_labels_never_overlap(labels, width):
    """Pins that two labels in one row keep clear of each other, however close the events."""
    rows = charts._label_rows(labels, 100.0, width)
    spans: dict[int, list[tuple[float, float]]] = {}
    for (at, text), row in zip(labels, rows, strict=True):
        x, size = at / 100 * width, len(text) * 7
        start, end = (x - size, x) if at > 50 else (x, x + size)
        assert all(end <= left or start >= right for left, right in spans.get(row, []))
        spans.setdefault(row, []).append((start, end))
