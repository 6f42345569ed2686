from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from cloud import gate
from cloud.export import to_onnx, to_tflite
from cloud.mixed import find_mixed, rank_nodes, signal_to_noise_db
from cloud.quantize import onnx_nodes, quantize_onnx, tflite_operations, tflite_quantizer

LOUD = 2000.0


@pytest.fixture(scope="module")
def module():
    """One output is 2,000 times as large as the others: in the 256 steps of all of them, those are lost."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    network[4].weight.data[0] *= LOUD
    return network


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).uniform(-1, 1, size=(128, 9)).astype(np.float32)


def onnx_case(module, rows):
    exact = to_onnx(module, (9,))
    return exact, onnx_nodes(exact), partial(quantize_onnx, exact, rows), gate.onnx_runner


def tflite_case(module, rows):
    exact = to_tflite(module, (9,))
    return exact, tflite_operations(exact), tflite_quantizer(exact, rows), gate.tflite_runner


@pytest.mark.parametrize("case", [onnx_case, tflite_case])
def test_the_node_that_hurts_is_found_and_left_float(module, rows, case):
    """Pins the whole search in both formats: the last layer ranks worst; left float, it mends the small outputs."""
    exact, nodes, quantize, load = case(module, rows)
    outputs = load(exact)(rows)

    def small_outputs(model):
        return signal_to_noise_db(outputs[:, 1:], load(model)(rows)[:, 1:])

    plain = small_outputs(quantize(()))
    ranked = rank_nodes(nodes, quantize, lambda model: load(model)(rows)[:, 1:], outputs[:, 1:])
    assert ranked[0][0] == nodes[-1]
    assert [ratio for _, ratio in ranked] == sorted(ratio for _, ratio in ranked)
    found = find_mixed([node for node, _ in ranked], quantize, small_outputs, enough=25, max_tries=4)
    assert found.keep_float[0] == nodes[-1]
    assert plain < 10
    assert found.score == small_outputs(found.model) >= 25
    assert len(found.keep_float) < len(nodes)
    assert len(found.model) != len(quantize(()))


class Scores:
    """A quantizer whose artefacts are names, with a score for each set of nodes left float."""

    def __init__(self, scores):
        self.scores = scores
        self.asked = []

    def quantize(self, keep_float):
        return " ".join(sorted(keep_float)).encode()

    def score(self, model):
        self.asked.append(model.decode())
        return self.scores[model.decode()]


def test_exclusion_that_does_not_help_is_taken_back():
    """Pins that the score decides and not the rank: `b` alone helps less than nothing, `a` and `c` stay."""
    found = Scores({"": 0.5, "a": 0.6, "a b": 0.6, "a c": 0.8})
    mixed = find_mixed(["a", "b", "c"], found.quantize, found.score, enough=0.9, max_tries=5)
    assert (mixed.model, mixed.keep_float, mixed.score, mixed.tried) == (b"a c", ("a", "c"), 0.8, 3)


@pytest.mark.parametrize(("enough", "tries", "asked"), [(0.5, 5, [""]), (0.6, 5, ["", "a"]), (0.9, 1, ["", "a"])])
def test_search_ends_when_it_is_good_enough_or_out_of_tries(enough, tries, asked):
    """Pins that nothing is measured that is not needed, nor more than allowed."""
    found = Scores({"": 0.5, "a": 0.6, "a b": 0.7})
    mixed = find_mixed(["a", "b"], found.quantize, found.score, enough=enough, max_tries=tries)
    assert found.asked == asked
    assert mixed.tried == len(asked) - 1


def test_ratio_is_in_decibels():
    """Pins the unit: an error of a tenth is 20 dB; no error is no limit."""
    exact = np.array([[3.0, 4.0]], np.float32)
    assert signal_to_noise_db(exact, exact * np.float32(0.9)) == pytest.approx(20, abs=0.01)
    assert signal_to_noise_db(exact, exact) == float("inf")
