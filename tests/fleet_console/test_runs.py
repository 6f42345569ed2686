"""`shoal runs`: a registry with three runs, as lists, JSON and a page."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cloud.pipelines.registry import MetricRow, Registry, ReleaseReport, Result, Run, Status, StepRow
from fleet_console.cli import app
from shoal.errors import ConfigError

DIGEST = "ab" * 32
TIER = {
    "bytes_float": 4000,
    "bytes_int8": 1000,
    "metric_float": 0.98,
    "metric_int8": 0.97,
    "ships": "int8",
    "latency_float_us": 10.0,
    "latency_int8_us": 5.0,
    "reason": "int8: metric <fine>",
    "metric_parent": 0.9,
}
DONE = Run(
    id="0006a1",
    model="digits",
    pipeline="vision.yaml",
    pipeline_digest=DIGEST,
    reason="200 new labels",
    started_at_us=1_795_464_000_000_000,
    seed=3,
    threads=2,
    labelled=200,
    samples_digest=DIGEST,
    field_digest=DIGEST,
    versions='{"torch": "2.13.0"}',
    machine="x86_64",
)


@pytest.fixture
def folder(tmp_path):
    """Two runs of one model, the second with nothing new, and a refused one of another."""
    with closing(Registry(tmp_path / "registry.sqlite")) as registry:
        registry.begin(DONE)
        step = StepRow("0006a1", 1, "train_model", "done", "key", "trained", DIGEST, {}, 0, 2.5)
        registry.put_result("key", Result(DIGEST), "0006a1", 1)
        registry.add_metrics(MetricRow("0006a1", "train_model", "device", x, "loss", 1.0 / x) for x in (1, 2))
        registry.end("0006a1", Status.DONE, DONE.started_at_us + 3_000_000, release=2)
        registry.begin(replace(DONE, id="0006b2"))
        registry.put_step(replace(step, run_id="0006b2", status="unchanged"))
        registry.put_step(
            StepRow("0006b2", 2, "evaluate_model", "done", "k2", "release", DIGEST, {"tiers": {"device": TIER}}, 0, 0.1)
        )
        registry.end("0006b2", Status.DONE, DONE.started_at_us + 1_000_000, release=2)
        registry.begin(replace(DONE, id="0007c3", model="shuttle"))
        registry.end("0007c3", Status.REFUSED, DONE.started_at_us, error="device: metric 0.2 <too low>")
        for release in (1, 2):
            registry.put_release(ReleaseReport("digits", release, 0, 0, 0, {"device": TIER}, {}, {}), "0006a1")
    return tmp_path


def shoal(folder, *words):
    result = CliRunner().invoke(app, ["runs", "--data-dir", str(folder), *words], catch_exceptions=False)
    return result.output


def test_list_says_how_each_ended(folder):
    """The newest first; one that was refused says why."""
    lines = shoal(folder).splitlines()
    assert [line.split()[0] for line in lines if line.startswith((" 0006", " 0007"))] == ["0007c3", "0006b2", "0006a1"]
    listed = json.loads(shoal(folder, "--json", "--model", "shuttle"))
    assert [(run["id"], run["error"]) for run in listed] == [("0007c3", "device: metric 0.2 <too low>")]
    assert len(json.loads(shoal(folder, "--json", "--count", "2"))) == 2


def test_show_draws_also_what_an_earlier_run_trained(folder):
    """The curve is that of the model that this run has, whoever trained it; the page needs nothing else."""
    page = folder / "page.html"
    text = shoal(folder, "show", "0006b", "--out", str(page))
    assert "1 train_model      unchanged" in text
    assert "device ships int8: int8: metric <fine>" in text
    html = page.read_text()
    assert {"Loss in train_model", "What int8 saves", "What int8 costs", "Metric of every release"} <= {
        part.partition("<")[0] for part in html.split("<h2>")
    }
    assert "metric &lt;fine&gt;" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    shown = json.loads(shoal(folder, "show", "0007", "--json"))
    assert (shown["run"]["status"], shown["steps"]) == ("refused", [])


def test_refused_run_is_drawn_too(folder):
    """It has no figures, and says why it was refused."""
    page = folder / "page.html"
    shoal(folder, "show", "last", "--out", str(page))
    assert "metric 0.2 &lt;too low&gt;" in page.read_text()


@pytest.mark.parametrize(("run_id", "said"), [("0006", "2 runs begin with '0006'"), ("x", "no runs begin with 'x'")])
def test_id_that_is_not_one_run_is_an_error(folder, run_id, said):
    """It says how many there are."""
    with pytest.raises(ConfigError, match=said):
        shoal(folder, "show", run_id)


def test_folder_without_a_registry_is_an_error(tmp_path):
    """It says which file it looked for, and makes none."""
    with pytest.raises(ConfigError, match=r"registry\.sqlite is not there"):
        shoal(tmp_path)
    assert list(tmp_path.iterdir()) == []
