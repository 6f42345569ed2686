import subprocess
import sys
from types import MappingProxyType

import numpy as np
import pytest

from cloud import gate
from cloud.pipelines.evaluate import RefusedError
from cloud.tasks.base import GateLimits
from cloud.tasks.datasets import SHUTTLE_SELECT, SHUTTLE_STREAM, digits_images, digits_stream, shuttle_rows
from shoal.release.probation import MAX_DIVERGENCE_PPM, MAX_ERROR_PPM, Outcome, Watch, measure_baseline, parse_baseline
from shoal.scoring import scale, score_rows
from shoal.tensors import to_array
from shoal.v1 import release_pb2 as pb
from tests.cloud.toolchain import build_release, task_of

TIER_IDS = {"device": pb.TIER_DEVICE, "gateway": pb.TIER_GATEWAY}


def artefact_of(built, tier):
    (artefact,) = (one for one in built.spec.artefacts if one.tier == tier)
    return artefact


def runner_of(built, tier):
    artefact = artefact_of(built, tier)
    return gate.load_runner(built.files[artefact.path], artefact.format)


def score_with(built, tier, values):
    """Score raw readings as a node does that knows nothing but the release."""
    scaled = scale(values, built.spec.input)
    return score_rows(built.spec.score, scaled, runner_of(built, tier)(scaled))


@pytest.fixture(params=["shuttle", "digits", "retrained"])
def built(request):
    return request.getfixturevalue(request.param)


def exceeding(built, name, values):
    """Score raw readings with a shipped artefact and say which ask upwards."""
    tier = TIER_IDS[name]
    return score_with(built, tier, values).scores > np.float32(artefact_of(built, tier).threshold)


def test_reports_agree_with_what_ships(built):
    """The report of a tier is about the very bytes in `files`."""
    metric = "average_precision" if built.spec.model == "shuttle" else "accuracy"
    for name, tier in TIER_IDS.items():
        report, artefact = built.reports[name], artefact_of(built, tier)
        size, measured = (
            (report["bytes_int8"], report["metric_int8"])
            if artefact.int8
            else (report["bytes_float"], report["metric_float"])
        )
        assert report["ships"] == ("int8" if artefact.int8 else "float")
        assert len(built.files[artefact.path]) == size
        assert built.spec.metrics_ppm[f"{name}_{metric}"] == round(measured * 1e6)
        assert min(report["latency_float_us"], report["latency_int8_us"]) > 0


def test_golden_vectors_accept_the_artefact_and_refuse_another_input(built):
    """A correct runtime reproduces them; the wrong model or a wrong row does not."""
    for tier in TIER_IDS.values():
        golden = artefact_of(built, tier).golden
        inputs, outputs = to_array(golden.inputs), to_array(golden.outputs)
        run = runner_of(built, tier)
        assert len(inputs) == 8
        assert np.abs(run(inputs) - outputs).max() <= golden.tolerance
        assert np.abs(run(inputs[::-1].copy()) - outputs).max() > golden.tolerance


def test_shuttle_finds_anomalies_on_the_selection_rows(shuttle):
    """Thresholds keep the promised recall, and the metrics in the spec are those of the shipped pair."""
    rows = shuttle_rows().take(SHUTTLE_SELECT)
    device, gateway = (exceeding(shuttle, name, rows.x) for name in TIER_IDS)
    anomalies = rows.y == 1
    assert device[anomalies].mean() >= 0.985
    assert (device & gateway)[anomalies].mean() >= 0.98
    metrics = shuttle.spec.metrics_ppm
    assert metrics["device_recall"] == round(device[anomalies].mean() * 1e6)
    assert metrics["cascade_recall"] == round((device & gateway)[anomalies].mean() * 1e6)
    assert metrics["device_asked_share"] == round(device.mean() * 1e6)
    assert metrics["gateway_asked_share"] == round((device & gateway).mean() * 1e6)


def test_shuttle_finds_anomalies_in_the_stream(shuttle):
    """On 37 thousand rows never seen: nearly all anomalies, while few rows are asked."""
    rows = shuttle_rows().take(SHUTTLE_STREAM)
    device, gateway = (exceeding(shuttle, name, rows.x) for name in TIER_IDS)
    assert (device & gateway)[rows.y == 1].mean() >= 0.97
    assert device.mean() <= 0.10


def test_digits_recognise_the_stream_and_ship_int8_to_the_gateway(digits):
    """Tiny int8 models are good on images never seen, and their thresholds ask for few of them."""
    stream = digits_images().take(digits_stream())
    for name, tier in TIER_IDS.items():
        assert (score_with(digits, tier, stream.x).labels == stream.y).mean() >= 0.96
        assert 0.01 < exceeding(digits, name, stream.x).mean() < 0.2
        assert 0 < artefact_of(digits, tier).threshold < 1
    assert artefact_of(digits, pb.TIER_GATEWAY).int8


def test_drift_breaks_the_first_release_and_labels_heal_it(digits, retrained, unseen):
    """Few labelled samples from the field bring back what a turned camera took, without forgetting the old view."""
    stream = digits_images().take(digits_stream())
    for name, tier in TIER_IDS.items():
        assert (score_with(digits, tier, unseen.x).labels == unseen.y).mean() < 0.6
        assert exceeding(digits, name, unseen.x).mean() > 0.4
        assert (score_with(retrained, tier, unseen.x).labels == unseen.y).mean() >= 0.92
        assert (score_with(retrained, tier, stream.x).labels == stream.y).mean() >= 0.95


def test_retrained_release_names_and_beats_its_parent(digits, retrained, labelled):
    """The parent is scored on the same held-out rows, drifted ones among them."""
    assert (digits.spec.parent, retrained.spec.parent, retrained.spec.release) == (0, 1, 2)
    holdout = task_of("digits").prepare(labelled).holdout
    for name, tier in TIER_IDS.items():
        report = retrained.reports[name]
        assert digits.reports[name]["metric_parent"] is None
        assert report["metric_parent"] == (score_with(digits, tier, holdout.x).labels == holdout.y).mean()
        assert report["metric_parent"] + 0.1 < report["metric_float"]


def watch_live(built, name, values):
    """What a node would think of these readings at the end of its probation."""
    tier = TIER_IDS[name]
    watch = Watch(parse_baseline(artefact_of(built, tier).baseline))
    for reading, score in zip(values, score_with(built, tier, values).scores.tolist(), strict=True):
        watch.answered(score, reading.tobytes())
    return watch


def test_baseline_is_what_the_shipped_artefact_scores_on_the_holdout(digits, retrained, labelled):
    """In whole numbers, with the limits that a node holds it to."""
    for built, extra in ((digits, None), (retrained, labelled)):
        holdout = task_of("digits").prepare(extra).holdout
        for tier in TIER_IDS.values():
            baseline = artefact_of(built, tier).baseline
            assert baseline == measure_baseline(score_with(built, tier, holdout.x).scores.tolist())
            assert (baseline.rows, sum(baseline.score_ppm)) == (len(holdout), 1_000_000)
            assert (baseline.max_error_ppm, baseline.max_divergence_ppm) == (MAX_ERROR_PPM, MAX_DIVERGENCE_PPM)


@pytest.mark.parametrize("name", TIER_IDS)
def test_good_releases_survive_probation_on_real_drift(digits, retrained, drifted, name):
    """On the view they were made for, on a turned camera, and on just those images that the layer below asks about."""
    stream = digits_images().take(digits_stream()).x
    for built in (digits, retrained):
        for images in (stream, drifted.x, stream[exceeding(built, "device", stream)], drifted.x[:, ::-1].copy()):
            assert watch_live(built, name, images).decide(60.0, 10.0).outcome is Outcome.CONFIRM


@pytest.mark.parametrize("name", TIER_IDS)
def test_good_release_survives_probation_on_anomalies_alone(shuttle, name):
    """Nothing but anomalies, as a gateway is asked about: the gate saw few of them, and they are no fault."""
    rows = shuttle_rows().take(SHUTTLE_STREAM)
    for values in (rows.x, rows.x[rows.y == 1]):
        watch = watch_live(shuttle, name, values)
        assert watch.decide(60.0, 10.0).outcome is Outcome.CONFIRM, watch.divergence_ppm


def test_wrong_unit_does_not_survive_probation(shuttle):
    """Readings a thousand times too large: every score is where the gate saw none."""
    decision = watch_live(shuttle, "device", 1000 * shuttle_rows().take(SHUTTLE_STREAM).x[:200]).decide(0.0, 10.0)
    assert decision.outcome is Outcome.FAIL
    assert "next to none" in decision.reason


def test_release_worse_than_its_limits_is_refused(brief_task, tmp_path, monkeypatch):
    """Every tier that fails is named, and what was measured is kept for people."""
    monkeypatch.setattr(
        type(brief_task), "limits", MappingProxyType(dict.fromkeys(TIER_IDS.values(), GateLimits(1.01, 1.0, 1.0)))
    )
    with pytest.raises(RefusedError, match=r"release of digits refused, device: metric 0\.\d+, .* gateway: ") as error:
        build_release(brief_task, tmp_path)
    assert set(error.value.figures["tiers"]) == {"device", "gateway"}


def test_importing_the_steps_outline_does_not_import_torch():
    """Whoever only reads a registry starts in a fraction of a second."""
    code = "import sys, cloud.pipelines.engine, cloud.trainer, cloud.tasks.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
