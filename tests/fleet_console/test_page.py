import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fleet_console.demo.page import write_html
from fleet_console.demo.report import make_report

THRESHOLDS = {"shuttle": 0.05, "digits": 0.2}
VOID = {"meta", "br", "path", "use"}


class _Page(HTMLParser):
    """Collects text and ids, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.words = [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def render(tmp_path):
    def write(evidence):
        path = tmp_path / "report.html"
        write_html(path, make_report(evidence), evidence, THRESHOLDS)
        return path.read_text(encoding="utf-8")

    return write


def test_page_is_whole_and_needs_nothing(render, evidence):
    """Pins well-formed HTML with unique ids, no script, and no address to fetch from."""
    text = render(evidence)
    page = _Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)) > 100
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    addresses = set(re.findall(r"https?://[^\"'\s]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text


def test_page_says_that_the_loop_closed(render, evidence):
    """Pins verdict, headline figures and every check with what was measured."""
    page = _Page(render(evidence))
    assert "The loop closed" in page.text
    assert "9 of 9 checks passed" in page.text
    assert "90.0% camera accuracy after the update" in page.text
    assert "100.0% before the drift, 40.0% after it" in page.text
    assert "25.0\N{MULTIPLICATION SIGN} fewer bytes than as canonical JSON" in page.text
    for item in make_report(evidence)["checks"]:
        assert item["measured"] in page.text
    assert "failed" not in page.text


def test_page_says_that_the_loop_did_not_close(render, evidence):
    """Pins that holes are named and that equations which do not hold say so."""
    holes = ["sensor-00/7 was promised to the cloud and is not there"]
    account = replace(evidence.account, holes=1, kept=114, named_holes=holes)
    page = _Page(render(replace(evidence, account=account)))
    assert "The loop did not close" in page.text
    assert "7 of 9 checks passed" in page.text
    assert holes[0] in page.text
    assert page.text.count("✗ failed") == 3


def test_ledger_shows_its_equations_in_numbers(render, evidence):
    """Pins both sums as they are written."""
    text = _Page(render(evidence)).text
    assert "produced = kept + lost before accept + accepted 130 = 115 + 0 + 15" in text
    assert "accepted = answered + dropped + quarantined + in flight 15 = 15 + 0 + 0 + 0" in text


def test_models_show_both_precisions_and_why(render, evidence):
    """Pins a row of the table: what ships is bold, and the metric has its name."""
    text = render(evidence)
    assert "0.980 / <strong>0.985</strong>" in text
    assert "18.0 / <strong>8.1</strong>" in text
    words = _Page(text).text
    for expected in ("digits 2", "LiteRT 9", "accuracy", "0.804", "int8: metric +0.0050"):
        assert expected in words


def test_run_and_notes_are_told(render, evidence):
    """Pins the facts to make it again, and the notes that keep the figures honest."""
    text = _Page(render(replace(evidence, restarts={"gateway": 2}))).text
    assert "shoal demo --quick --seed 7" in text
    assert "mosquitto 2.0.22" in text
    assert "gateway 2 times" in text
    assert "stand-in for a human annotator" in text
    assert "No release was trained on these images" in text
    assert "JSON sizes are counted, not sent" in text


def test_everything_from_outside_is_escaped(render, evidence):
    """Pins that no name, reason or hole becomes markup."""
    nasty = "<script>alert('x')</script>"
    tiers = {"device": evidence.builds[0].tiers["device"] | {"reason": nasty}}
    build = type(evidence.builds[0])(
        model=nasty,
        release=1,
        parent=0,
        labelled=0,
        created_at_us=0,
        tiers=tiers,
        thresholds={},
        metrics_ppm={},
    )
    text = render(
        replace(
            evidence,
            broker_name=nasty,
            broker_version=nasty,
            builds=[build],
            runtimes={"device": nasty},
            messages={nasty: 1},
            restarts={nasty: 1},
            account=replace(evidence.account, holes=1, named_holes=[nasty]),
        )
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8


def test_page_of_a_run_without_readings_is_written(render, empty):
    """Pins that a run which ended early gets its page."""
    page = _Page(render(empty))
    assert page.open == []
    assert "The loop did not close" in page.text
    assert "n/a" in page.text
