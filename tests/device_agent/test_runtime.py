import importlib
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.runtime import RuntimeKind, TfliteRuntime, _installed, load, runtime_name
from shoal.errors import ConfigError, ModelError
from shoal.release.chunks import digest
from shoal.release.selftest import Outcome, selftest_in_child
from shoal.tensors import to_tensor
from shoal.v1.release_pb2 import Artefact, GoldenVectors

pytestmark = pytest.mark.device

# One network, made into each of them by models/make.py.
MODELS = Path(__file__).parent / "models"
MODULES = {RuntimeKind.LITERT: "ai_edge_litert", RuntimeKind.TFLITE: "tflite_runtime"}
ROW = np.random.default_rng(3).normal(size=(1, 16)).astype(np.float32)
# Of ROW, by the float network.
ANSWER = np.float32([-0.0673, 0.3000, -0.0288, 0.1597, 0.3961, -0.3251, 0.2151, 0.0532])


@pytest.fixture(params=MODULES, ids=str)
def kind(request):
    """Each runtime; the two never share an environment."""
    if find_spec(MODULES[request.param]) is None:
        pytest.skip(f"left out: needs {MODULES[request.param]}, which this environment lacks")
    return request.param


@pytest.fixture(scope="session")
def model_path(shared_data):
    """Where a model of MLPerf Tiny or TFLite Micro is."""
    return lambda name: shared_data / "models_tflite" / f"{name}.tflite"


@pytest.fixture(scope="session")
def hello(model_path):
    return load(model_path("hello_world_int8"))


@pytest.fixture
def raw(model_path):
    """Invoke a model with the installed interpreter itself, in the units of its own tensors."""
    distribution, _ = runtime_name().split()
    interpreter_class = importlib.import_module(distribution.replace("-", "_") + ".interpreter").Interpreter

    def invoke(name, convert, row):
        interpreter = interpreter_class(model_path=str(model_path(name)), num_threads=1)
        interpreter.allocate_tensors()
        (taken,), (given_back,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.set_tensor(taken["index"], convert(row, *taken["quantization"]))
        interpreter.invoke()
        return interpreter.get_tensor(given_back["index"]), given_back["quantization"]

    return invoke


def as_int8(row, scale, zero):
    """Quantize by the specification, in double precision: round(value / scale) + zero, saturating."""
    return np.clip(np.round(row.astype(np.float64) / scale) + zero, -128, 127).astype(np.int8)


@pytest.mark.parametrize(
    ("name", "shape", "outputs"),
    [
        ("hello_world_int8", (1,), (1,)),
        ("ad01_int8", (640,), (640,)),
        ("ad01_fp32", (640,), (640,)),
        ("kws_ref_model", (49, 10, 1), (12,)),
        ("pretrainedResnet_quant", (32, 32, 3), (10,)),
    ],
)
def test_real_models_load_and_answer_in_float(model_path, name, shape, outputs):
    """Pins shapes without the batch dimension, and one float32 output for each row, for models of others."""
    runtime = load(model_path(name))
    assert runtime.input_shape == shape
    answers = runtime.run(np.zeros((3, *shape), np.float32))
    assert (answers.dtype, answers.shape) == (np.float32, (3, *outputs))


def test_int8_model_approximates_a_sine(hello):
    """Pins both conversions at once: the model was trained on sin(x) over one period, and answers in those units."""
    x = np.linspace(0.0, 6.0, 40, dtype=np.float32).reshape(-1, 1)
    assert np.abs(hello.run(x) - np.sin(x)).max() < 0.12


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_quantized_tensors_are_converted_with_their_own_scales(model_path, raw, seed):
    """Pins the conversion of inputs and outputs against the interpreter used by hand, bit for bit."""
    row = np.random.default_rng(seed).normal(5.0, 20.0, (1, 640)).astype(np.float32)
    integers, (scale, zero) = raw("ad01_int8", as_int8, row)
    assert integers.dtype == np.int8
    expected = (integers.astype(np.float32) - zero) * np.float32(scale)
    np.testing.assert_array_equal(load(model_path("ad01_int8")).run(row), expected)


def test_float_tensors_pass_as_they_are(model_path, raw):
    """Pins that a float model is not converted at all."""
    row = np.random.default_rng(4).normal(0.0, 1.0, (1, 640)).astype(np.float32)
    answer, _ = raw("ad01_fp32", lambda values, *_: values, row)
    np.testing.assert_array_equal(load(model_path("ad01_fp32")).run(row), answer)


@settings(max_examples=50, deadline=None)
@given(value=st.floats(min_value=7.0, max_value=2.0**40, width=32))
def test_values_beyond_the_input_range_saturate(hello, value):
    """Pins that a large value is the largest the tensor holds, and does not wrap round to its other end."""
    highest, lowest = (127 + 128) * 0.024480115622282028, 0.0
    extremes = np.array([[value], [-value]], np.float32)
    np.testing.assert_array_equal(hello.run(extremes), hello.run(np.array([[highest], [lowest]], np.float32)))


def test_rows_are_answered_one_by_one_in_order(hello):
    """Pins that a batch is as many single calls, which share nothing, and that answers are copies."""
    x = np.array([[0.5], [3.0], [5.5]], np.float32)
    together = hello.run(x)
    alone = [hello.run(x[index : index + 1]) for index in range(3)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert len(np.unique(together)) == 3


@pytest.mark.parametrize("shape", [(1, 639), (1, 641), (1, 10, 64), (1,)])
def test_wrong_shape_is_refused(model_path, shape):
    """Pins that the message says both shapes: an old model on a new firmware."""
    with pytest.raises(ModelError, match=r"input \[.*\], the model takes \[640\]"):
        load(model_path("ad01_int8")).run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("content", [b"not a model, only text that is long enough to look at", b""])
def test_garbage_is_refused_by_name(tmp_path, content):
    """Pins that a damaged file is an error of the model's, whichever runtime is installed."""
    path = tmp_path / "garbage.tflite"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"garbage\.tflite: "):
        load(path)


def test_missing_file_is_refused_by_name(tmp_path):
    """Pins that a file that is gone is an error of the model's too."""
    with pytest.raises(ModelError, match=r"gone\.tflite: "):
        load(tmp_path / "gone.tflite")


class _Interpreter:
    """As many inputs and outputs as a test wants."""

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs

    def get_input_details(self):
        return [{}] * self.inputs

    def get_output_details(self):
        return [{}] * self.outputs


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (1, 2), (0, 1)])
def test_other_than_one_input_and_output_is_refused(inputs, outputs):
    """Pins that a model whose answer would be ambiguous is not run."""
    with pytest.raises(ModelError, match=f"m: {inputs} inputs and {outputs} outputs"):
        TfliteRuntime(_Interpreter(inputs, outputs), "m")


class _Failing(_Interpreter):
    """Takes one float and fails on it."""

    def get_input_details(self):
        return [{"shape": [1, 1], "dtype": np.float32, "index": 0}]

    get_output_details = get_input_details

    def set_tensor(self, index, values):
        assert (index, values.shape) == (0, (1, 1))

    def invoke(self):
        raise RuntimeError("node 3 failed to invoke")


def test_model_that_fails_while_it_runs_is_a_model_error():
    """Pins that such a model ends no agent: the device asks the gateway instead."""
    with pytest.raises(ModelError, match="inference failed: node 3"):
        TfliteRuntime(_Failing(1, 1), "m").run(np.zeros((1, 1), np.float32))


def test_runtime_names_itself_with_its_version():
    """Pins what NodeState says: the distribution that is used, as installed."""
    name, number = runtime_name().split()
    assert name in ("ai-edge-litert", "tflite-runtime")
    assert number == version(name)


def test_device_without_a_runtime_is_told_what_to_install(monkeypatch):
    """Pins the operator's line where neither runtime is installed."""
    monkeypatch.setattr("device_agent.runtime.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"install shoal\[device\]"):
        runtime_name()


@pytest.mark.parametrize("name", ["float", "static_int8", "static_16x8", "weight_only"])
def test_each_quantization_answers_as_the_float_network(kind, name):
    """Pins what runs on both runtimes, and that it is right there: off by less than int8's own steps."""
    assert np.abs(load(MODELS / f"{name}.tflite", kind).run(ROW) - ANSWER).max() < 0.02


@pytest.mark.parametrize("chosen", ["kind", RuntimeKind.AUTO])
def test_dynamic_range_runs_where_it_is_right_and_is_refused_elsewhere(kind, chosen):
    """Pins that no device answers wrongly in silence, as tflite-runtime does on such models, and that it says why."""
    path, chosen = MODELS / "dynamic_range.tflite", kind if chosen == "kind" else chosen
    if kind is RuntimeKind.LITERT:
        assert np.abs(load(path, chosen).run(ROW) - ANSWER).max() < 0.02
    else:
        with pytest.raises(ModelError, match=r"dynamic_range\.tflite: FULLY_CONNECTED has integer weights.*tflite-run"):
            load(path, chosen)


def test_self_test_uses_the_runtime_that_was_chosen(tmp_path):
    """Pins that the child judges with what will answer: a runtime that is not there fails it, by name."""

    def judge(kind):
        path = MODELS / "static_int8.tflite"
        golden = GoldenVectors(inputs=to_tensor(ROW), outputs=to_tensor(np.float32([ANSWER])), tolerance=0.05)
        artefact = Artefact(sha256=digest(path.read_bytes()), golden=golden)
        module = f"device_agent.runtime:{kind}"
        return selftest_in_child(path, artefact, module, clock=time.monotonic, sleep=time.sleep)

    there = {kind for kind, module in MODULES.items() if find_spec(module)}
    assert there
    assert judge(RuntimeKind.AUTO).outcome is Outcome.PASSED
    for kind in MODULES:
        verdict = judge(kind)
        assert verdict.outcome is (Outcome.PASSED if kind in there else Outcome.FAILED)
        assert kind in there or f"no TFLite runtime for '{kind}'" in verdict.reason


@pytest.mark.parametrize("kind", MODULES)
def test_runtime_that_is_chosen_and_missing_is_no_other(monkeypatch, kind):
    """Pins that a choice is not overruled in silence, and that the operator is told what to install."""
    monkeypatch.setattr("device_agent.runtime.find_spec", lambda name: None if name == MODULES[kind] else name)
    assert _installed().name != MODULES[kind]
    with pytest.raises(ConfigError, match=f"for '{kind}': install shoal"):
        runtime_name(kind)


def test_image_classifier_answers_as_mlperf_tiny_says(model_path, shared_data):
    """Pins the golden answers of MLPerf Tiny's image classification: 25 of 25, in both runtimes."""
    with np.load(shared_data / "mlperf_tiny_samples" / "ic_cifar10_25.npz") as samples:
        images, golden = samples["images"], samples["model_ref"]
    # Its input tensor has scale 1 and zero point -128: 0..255 in float are the bytes less 128 in int8.
    answers = load(model_path("pretrainedResnet_quant")).run(images.astype(np.float32))
    assert (answers.argmax(axis=1) == golden).sum() == len(golden) == 25
