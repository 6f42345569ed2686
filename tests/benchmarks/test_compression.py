"""The table of `make bench-compression` compares what it says it compares, and holds the keys that others read."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import compression
from benchmarks.compression import Answers, Effort, describe, figure, measure_subject, worst_of
from benchmarks.compression_report import draw, table
from benchmarks.compression_subjects import Subject
from cloud.measure import Interval
from cloud.tasks.base import GateLimits

_LIMITS = GateLimits(min_metric=0.0, max_drop_from_float=0.01, max_drop_from_parent=1.0)


def accuracy_of(labels):
    return lambda outputs, drawn: float((outputs[drawn].argmax(axis=1) == labels[drawn]).mean())


def small_subject(labels, **changes):
    """Rows of four values, two classes."""
    torch.manual_seed(0)
    rows = np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32)
    metric = accuracy_of(labels)
    model, narrow = (nn.Sequential(nn.Linear(4, wide), nn.ReLU(), nn.Linear(wide, 2)).eval() for wide in (64, 32))
    given = {
        "name": "cnn",
        "shape": (4,),
        "modules": {"float": model, "pruned": narrow},
        "calibration": rows,
        "rows": rows,
        "metric_name": "accuracy",
        "metrics": {"float": metric, "pruned": metric},
        "limits": _LIMITS,
        "search": rows,
        "search_metric": metric,
        "resamples": 20,
    }
    return Subject(**(given | changes))


def logits(classes):
    return np.eye(2, dtype=np.float32)[classes]


def described(**changes):
    """Four variants, of which int8 is wrong on one row in ten and twice as fast, pruned + int8 wrong on two."""
    labels = np.zeros(100, dtype=np.int64)
    wrong = {"float": 0, "pruned": 5, "int8": 10, "pruned_int8": 20}
    answers = {name: logits((np.arange(100) < count).astype(int)) for name, count in wrong.items()}
    models = {"float": bytes(900), "pruned": bytes(300), "int8": bytes(300), "pruned_int8": bytes(100)}
    taken = np.tile([4000.0, 2000.0, 2000.0, 1000.0], (5, 1))
    return describe(small_subject(labels, **changes), models, Answers(answers, taken), Effort(5, 0.001, 0))


def test_every_variant_is_compared_with_float_of_its_runtime():
    """Pins sizes, speeds and drops: those of pruned + int8 are against float, not against pruned."""
    variants = described()["variants"]
    both = variants["pruned_int8"]
    assert (both["size_ratio"], both["size_ratio_ci"]) == (9.0, [9.0, 9.0])
    assert (both["speed_ratio"], both["speed_ratio_ci"]) == (4.0, [4.0, 4.0])
    assert both["metric_drop"] == pytest.approx(0.2)
    low, high = both["metric_drop_ci"]
    assert low < 0.2 < high
    assert variants["float"]["metric_drop_ci"] == [0.0, 0.0]


def test_runtime_starts_with_the_figures_of_int8():
    """Pins `NETWORK.RUNTIME.size_ratio`, and that float ships where int8 costs more than its limit."""
    found = described()
    assert (found["size_ratio"], found["speed_ratio"]) == (3.0, 2.0)
    assert found["ships"] == "float"
    assert "loses more than 0.01" in found["reason"]


def test_agreement_without_labels_is_with_the_network_that_was_quantized():
    """Pins that a network without labels compares pruned + int8 with pruned, which answers differently from float."""
    labels, pruned = np.zeros(100, dtype=np.int64), (np.arange(100) < 5).astype(np.int64)
    metrics = {"float": accuracy_of(labels), "pruned": accuracy_of(pruned)}
    variants = described(search_metric=None, metrics=metrics)["variants"]
    assert variants["pruned"]["metric"] == 1.0
    assert variants["pruned_int8"]["metric_drop"] == pytest.approx(0.15)


def test_worst_of_takes_each_figure_with_its_own_interval():
    """Pins that a variant's figure is the least good of all runtimes, and that a runtime without it does not count."""
    fast = figure("size_ratio", Interval(3, 3, 3)) | figure("speed_ratio", Interval(4, 3, 5))
    slow = figure("size_ratio", Interval(4, 4, 4)) | figure("speed_ratio", Interval(2, 1, 3))
    good, bad = figure("metric_drop", Interval(0.0, 0.0, 0.1)), figure("metric_drop", Interval(0.2, 0.1, 0.3))
    runtimes = {
        "metric": "accuracy",
        "onnx": {"variants": {"float": fast | good, "int8": fast | bad}},
        "litert": {"variants": {"float": fast | good, "int8": slow | good, "mixed": fast | good}},
        "tflite_runtime": {"left_out": "no .venv-device"},
    }
    worst = worst_of(runtimes)
    assert worst["int8"] == {
        **figure("size_ratio", Interval(3, 3, 3)),
        **figure("speed_ratio", Interval(2, 1, 3)),
        **figure("metric_drop", Interval(0.2, 0.1, 0.3)),
    }
    assert worst["mixed"] == fast | good
    assert "float" not in worst


def test_table_has_a_line_for_each_variant():
    """Pins what docs/compression.md shows: what is not there is left out, not drawn as zero."""
    lines = table({"cnn": {"onnx": described(), "tflite_runtime": {"left_out": "no .venv-device"}}}).splitlines()
    assert len(lines) == 2 + 4
    assert lines[-1].startswith("| CNN | ONNX Runtime | pruned + int8 | 100 |")
    assert "| 9.00x | 4.00x (4.00 to 4.00) | 0.8000 | 20.00 (" in lines[-1]


def test_subject_is_exported_quantized_and_measured_in_every_runtime(tmp_path):
    """Pins the way from modules to the table and the picture, on a network that takes no time."""
    labels = np.zeros(64, dtype=np.int64)
    generous = GateLimits(min_metric=0.0, max_drop_from_float=1.0, max_drop_from_parent=1.0)
    found = measure_subject(small_subject(labels, limits=generous), Effort(3, 0.0005, 0), lambda _: None)
    for runtime in ("onnx", "litert"):
        assert found[runtime]["variants"].keys() == {"float", "pruned", "int8", "pruned_int8"}
        assert found[runtime]["signal_to_noise_db"] > 20
    assert found["torch_dynamic"]["bytes"] > 0
    assert found["pruned_int8"].keys() == {f"{name}{end}" for name in _FIGURES for end in ("", "_ci")}
    draw({"cnn": found, "machine": {"cores": 2, "kind": "x"}, "date": "2026-01-01"}, tmp_path / "picture.svg")
    assert "pruned + int8" in (tmp_path / "picture.svg").read_text()


_FIGURES = ("size_ratio", "speed_ratio", "metric_drop")


def test_stored_figures_keep_what_the_docs_say():
    """Pins the committed table: keys with intervals, half a point at most for digits, the CNN nine times smaller."""
    stored = json.loads(compression._RESULTS.read_text())
    for network in ("autoencoder", "cnn", "resnet8", "resnet18"):
        for place in ("onnx", "litert", "tflite_runtime", "pruned", "int8", "pruned_int8"):
            for name in _FIGURES:
                low, high = stored[network][place][f"{name}_ci"]
                assert low <= stored[network][place][name] <= high
    assert stored["cnn"]["pruned_int8"]["size_ratio"] >= 9
    for network, variant in (
        *(("cnn", each) for each in ("int8", "pruned_int8")),
        *(("resnet8", each) for each in ("int8", "pruned_int8")),
        ("autoencoder", "int8"),
    ):
        assert stored[network][variant]["metric_drop"] <= 0.005
