"""Files that somebody else made: each becomes a release that nodes reproduce, or is refused with its exact reason."""

import datetime as dt
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cloud import byo
from cloud.byo_probe import Facts, random_row
from cloud.keys import FileKeyStore
from cloud.publisher import Publisher
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, TOP_LEVEL, first_generation
from cloud.verify import verify_store
from shoal.errors import ConfigError, ModelError
from shoal.release.chunks import digest
from shoal.release.probation import measure_baseline
from shoal.release.selftest import Limits, Outcome, selftest_in_child
from shoal.release.trust import model_role
from shoal.tensors import to_array
from shoal.v1 import release_pb2 as pb

_DEVICE_PYTHON = Path(__file__).parents[2] / ".venv-device" / "bin" / "python"
TFLITE = {
    "ad01_fp32.tflite": ([640], pb.SCORE_KIND_RECONSTRUCTION, False),
    "ad01_int8.tflite": ([640], pb.SCORE_KIND_RECONSTRUCTION, True),
    "hello_world_int8.tflite": ([1], pb.SCORE_KIND_RECONSTRUCTION, True),
    "kws_ref_model.tflite": ([49, 10, 1], pb.SCORE_KIND_UNCERTAINTY, True),
    "pretrainedResnet.tflite": ([32, 32, 3], pb.SCORE_KIND_UNCERTAINTY, False),
    "pretrainedResnet_quant.tflite": ([32, 32, 3], pb.SCORE_KIND_UNCERTAINTY, True),
}


def onnx_file(path, nodes, *, inputs, outputs, constants=()):
    """Write an ONNX model; inputs and outputs are name to (element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()],
        [helper.make_tensor_value_info(name, *info) for name, info in outputs.items()],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def dense(path, *, batch="batch", element=TensorProto.FLOAT, width=5):
    """A dense layer of 4 to `width`."""
    dtype = helper.tensor_dtype_to_np_dtype(element)
    weights = np.random.default_rng(0).normal(size=(4, width)).astype(dtype)
    return onnx_file(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        inputs={"x": (element, [batch, 4])},
        outputs={"y": (element, [batch, width])},
        constants=[onnx.numpy_helper.from_array(weights, "w")],
    )


def one_node(path, operator, *, shape=("batch", 4), out=("batch", 4), domain="", **attributes):
    node = helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes)
    return onnx_file(path, [node], inputs={"x": (TensorProto.FLOAT, shape)}, outputs={"y": (TensorProto.FLOAT, out)})


def self_test(path, data, spec, runtime="device_agent.runtime"):
    """What a node would say of it."""
    artefact = pb.Artefact()
    artefact.CopyFrom(spec.artefacts[0])
    artefact.sha256 = digest(data)
    return selftest_in_child(path, artefact, runtime, clock=time.monotonic, sleep=time.sleep), artefact


@pytest.fixture
def keys(tmp_path):
    keys = FileKeyStore(tmp_path / "keys")
    keys.create("root", 3)
    for role in (*TOP_LEVEL[1:], ROLLOUT, model_role("theirs")):
        keys.create(role)
    return keys


@pytest.fixture
def store(tmp_path, keys):
    store = ReleaseStore(tmp_path / "store")
    store.create(first_generation(keys, ["theirs"], dt.datetime.now(dt.UTC)))
    return store


@pytest.fixture
def publish_all(store, keys):
    """Let the publisher take what is queued."""

    def publish() -> Counter[str]:
        link = type("Link", (), {"connected": False})()
        publisher = Publisher(link, store, keys, counters=Counter())
        publisher.start()
        publisher.tick(1.0)
        publisher.close()
        return publisher.counters["orders_taken"], publisher.counters["orders_refused"]

    return publish


@pytest.mark.parametrize("name", TFLITE)
def test_third_party_tflite_is_released_and_reproduced(shared_data, store, keys, publish_all, name):
    """MLPerf Tiny's and TFLite Micro's own files: schema and score as they are, and a device confirms the answers."""
    path = shared_data / "models_tflite" / name
    described = byo.describe(path)
    shape, score, is_int8 = TFLITE[name]
    [artefact] = described.spec.artefacts
    assert (list(described.spec.input.shape), described.spec.score, artefact.int8) == (shape, score, is_int8)
    assert (artefact.tier, artefact.format) == (pb.TIER_DEVICE, pb.MODEL_FORMAT_TFLITE)
    assert list(artefact.golden.inputs.shape) == [8, *shape]
    released = byo.publish(store, keys, described, model="theirs", targets=["cam-*"])
    assert publish_all() == (2, 0)
    assert store.file(released.artefacts[0].sha256) == path.read_bytes()
    assert verify_store(store.directory, dt.datetime.now(dt.UTC)).faults == ()
    verdict, _ = self_test(path, described.data, released)
    assert verdict.outcome is Outcome.PASSED, verdict.reason


@pytest.mark.parametrize("name", TFLITE)
def test_golden_vectors_hold_in_the_other_runtime(shared_data, tmp_path, name):
    """tflite-runtime rounds otherwise; rows on which that decides the class are not chosen."""
    if not _DEVICE_PYTHON.exists():
        pytest.skip("left out: needs the environment of `make venv-device`")
    path = shared_data / "models_tflite" / name
    described = byo.describe(path)
    artefact = described.spec.artefacts[0]
    artefact.sha256 = digest(described.data)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as verdict:
        limits = [str(1 << 30), "30", str(write_end)]
        subprocess.run(
            [_DEVICE_PYTHON, "-m", "shoal.release.selftest", "device_agent.runtime", path, *limits],
            input=artefact.SerializeToString(),
            pass_fds=[write_end],
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        os.close(write_end)
        assert verdict.read() == '{"reason": ""}'


def test_wrong_answers_fail_the_golden_vectors(shared_data):
    """They are worth something: another model of the same shape does not pass them."""
    folder = shared_data / "models_tflite"
    spec = byo.describe(folder / "ad01_fp32.tflite").spec
    other = folder / "ad01_int8.tflite"
    verdict, _ = self_test(other, other.read_bytes(), spec)
    assert verdict.outcome is Outcome.FAILED
    assert "off by" in verdict.reason


@pytest.mark.parametrize("batch", ["batch", 1])
def test_onnx_goes_to_gateways(tmp_path, batch):
    """With a free batch or one of 1, in the gateway's own runtime."""
    path = dense(tmp_path / "m.onnx", batch=batch)
    described = byo.describe(path)
    [artefact] = described.spec.artefacts
    assert (artefact.tier, artefact.format) == (pb.TIER_GATEWAY, pb.MODEL_FORMAT_ONNX)
    assert described.spec.score == pb.SCORE_KIND_UNCERTAINTY
    verdict, _ = self_test(path, described.data, described.spec, "edge_gateway.engine")
    assert verdict.outcome is Outcome.PASSED, verdict.reason


def test_large_third_party_onnx_keeps_to_one_message(shared_data):
    """A 224x224x3 row is 602 KB: the spec holds one golden vector and stays under 1 MiB."""
    spec = byo.describe(shared_data / "models_onnx" / "light_squeezenet.onnx").spec
    assert list(spec.artefacts[0].golden.inputs.shape) == [1, 3, 224, 224]
    assert spec.ByteSize() < 1 << 20


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: dense(p, batch=4), "fixed batch of 4"),
        (lambda p: dense(p, element=TensorProto.DOUBLE), r"input x is tensor\(double\)"),
        (lambda p: dense(p, width=1), "one value, which gives no score"),
        (lambda p: one_node(p, "Identity", shape=("batch", "n"), out=("batch", "n")), r"\['n'\] after the batch"),
        (lambda p: one_node(p, "Identity", shape=("batch",), out=("batch",)), r"\[\] after the batch"),
        (lambda p: one_node(p, "Identity", shape=("batch", 1 << 18), out=("batch", 1 << 18)), "more than 1 MiB"),
        (lambda p: one_node(p, "Shape", out=None), r"output y is tensor\(int64\)|refuses"),
        (lambda p: one_node(p, "NoSuchOperator"), "NoSuchOperator"),
        (lambda p: one_node(p, "Their", domain="their.own"), "Their"),
        (lambda p: one_node(p, "RandomNormalLike"), "differently each time"),
        (lambda p: one_node(p, "Softmax", axis=0), "in a batch than alone"),
        (lambda p: one_node(p, "ReduceSum", out=(), keepdims=0), r"one row in, output \[\] out"),
        (lambda p: one_node(p, "Log", shape=("batch", 64), out=("batch", 64)), "no output is finite"),
    ],
)
def test_onnx_that_cannot_be_released_says_why(tmp_path, make, reason):
    """Each with the tensor, what it is and what was expected; the rows of one batch must not know of each other."""
    path = make(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=reason):
        byo.describe(path)


@pytest.mark.parametrize("seed", [0, 1, 4, 5, 8, 31])
def test_scrambled_model_is_refused_or_runs(shared_data, tmp_path, seed):
    """A file that crashes its runtime costs a child process, never the command."""
    data = bytearray((shared_data / "models_tflite" / "hello_world_int8.tflite").read_bytes())
    rng = random.Random(seed)
    for _ in range(2):
        data[rng.randrange(8, len(data))] = rng.randrange(256)
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    refusal = ""
    try:
        assert byo.describe(path).data == bytes(data)
    except ModelError as exc:
        refusal = str(exc)
    assert not refusal or refusal.startswith("m.tflite: ")


def test_model_that_takes_its_process_with_it_is_refused(tmp_path, monkeypatch):
    """The command says how it ended, its last words and under which limits."""
    child = tmp_path / "python"
    child.write_text("#!/bin/sh\necho INFO: hello\necho 'mmap failed'\necho INFO: bye\nkill -SEGV $$\n")
    child.chmod(0o700)
    monkeypatch.setattr(byo.sys, "executable", str(child))
    with pytest.raises(ModelError, match=r"m\.onnx: .+ended with signal 11: mmap failed .+1024 MiB and 30 s"):
        byo.describe(dense(tmp_path / "m.onnx"))


def test_model_that_never_answers_is_refused(tmp_path, monkeypatch):
    """The command ends."""
    monkeypatch.setattr(byo, "Limits", lambda: Limits(wall_s=0.01))
    with pytest.raises(ModelError, match=r"no answer within 0\.01 s"):
        byo.describe(dense(tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("m.tflite", b"", "0 bytes"),
        ("m.tflite", b"TFL3", "m.tflite: "),
        ("m.onnx", b"\xff" * 64, "ONNX Runtime refuses it"),
        ("m.pt", b"x", "ends in .tflite or .onnx"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, name, data, reason):
    """Empty, cut off, rubbish, or of a kind that no node runs."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=reason):
        byo.describe(tmp_path / name)


def test_file_that_is_too_large_is_not_read(tmp_path):
    """No node takes more than 64 MiB."""
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(byo.MAX_FILE_BYTES + 1)
    with pytest.raises(ModelError, match="67108865 bytes, expected 1 to 67108864"):
        byo.describe(path)


def test_missing_file_is_the_operators_mistake(tmp_path):
    """One line that names it."""
    with pytest.raises(ConfigError, match=r"m\.onnx"):
        byo.describe(tmp_path / "m.onnx")


def test_nothing_is_asked_unless_a_threshold_is_given(tmp_path):
    """A stranger's scores mean nothing yet."""
    path = dense(tmp_path / "m.onnx")
    assert byo.describe(path).spec.artefacts[0].threshold == 1.0
    assert byo.describe(path, threshold=0.25).spec.artefacts[0].threshold == 0.25
    same = one_node(tmp_path / "same.onnx", "Neg")
    assert byo.describe(same).spec.artefacts[0].threshold == pytest.approx(3.4e38, rel=0.01)


def golden_file(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_given_golden_vectors_are_released_as_they_are(tmp_path):
    """With their own tolerance, once the model was seen to reproduce them."""
    inputs = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = one_node(tmp_path / "m.onnx", "Neg")
    golden = byo.load_golden(golden_file(tmp_path / "g.npz", inputs=inputs, outputs=-inputs, tolerance=0.5))
    vectors = byo.describe(path, golden).spec.artefacts[0].golden
    assert vectors.tolerance == 0.5
    np.testing.assert_array_equal(to_array(vectors.inputs), inputs)
    np.testing.assert_array_equal(to_array(vectors.outputs), -inputs)


def test_given_rows_are_a_baseline_and_random_ones_are_not(tmp_path):
    """Live scores are compared with what the model answered to rows that somebody chose; errors count without."""
    inputs = np.ones((3, 4), np.float32)
    inputs[2] = 5.0
    path = one_node(tmp_path / "m.onnx", "Neg")
    golden = byo.load_golden(golden_file(tmp_path / "g.npz", inputs=inputs))
    assert byo.describe(path, golden).spec.artefacts[0].baseline == measure_baseline([4.0, 4.0, 100.0])
    assert byo.describe(path).spec.artefacts[0].baseline == measure_baseline([])


def test_golden_inputs_alone_are_answered(tmp_path):
    """Inputs that the model is made for are worth more than random ones."""
    inputs = np.arange(12, dtype=np.float64).reshape(3, 4)
    path = one_node(tmp_path / "m.onnx", "Log")
    golden = byo.load_golden(golden_file(tmp_path / "g.npz", inputs=inputs + 1))
    np.testing.assert_allclose(
        to_array(byo.describe(path, golden).spec.artefacts[0].golden.outputs), np.log(inputs + 1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("arrays", "error", "reason"),
    [
        ({"outputs": np.ones((3, 4))}, ConfigError, "inputs"),
        ({"inputs": np.ones((3, 4)), "outputs": np.ones((2, 4))}, ConfigError, "expected"),
        ({"inputs": np.ones((3, 4)), "tolerance": np.nan}, ConfigError, "tolerance"),
        ({"inputs": np.ones((3, 5))}, ModelError, r"\[5\] a row, expected \[4\]"),
        ({"inputs": np.ones((3, 4)), "outputs": np.ones((3, 4))}, ModelError, "golden vector 0: off by 2"),
        ({"inputs": np.ones((3, 4)), "outputs": np.ones((3, 2))}, ModelError, r"\[3, 2\], the model answers \[3, 4\]"),
        ({"inputs": np.full((3, 4), np.nan), "outputs": np.ones((3, 4))}, ModelError, "off by nan"),
        ({"inputs": np.ones((40_000, 4))}, ModelError, "use fewer"),
    ],
)
def test_golden_vectors_that_do_not_fit_are_refused(tmp_path, arrays, error, reason):
    """Before anything is signed."""
    path = one_node(tmp_path / "m.onnx", "Neg")
    with pytest.raises(error, match=reason):
        byo.describe(path, byo.load_golden(golden_file(tmp_path / "g.npz", **arrays)))


def test_second_release_has_the_first_to_go_back_to(tmp_path, store, keys, publish_all):
    """Its parent is what the live plan names."""
    for width in (5, 6):
        byo.publish(store, keys, byo.describe(dense(tmp_path / "m.onnx", width=width)), model="theirs", targets=["*"])
    assert publish_all() == (4, 0)
    specs = [path for path in store.load().targets() if path.startswith("releases/")]
    assert sorted(specs) == ["releases/theirs/1.spec", "releases/theirs/2.spec"]


def test_model_without_a_role_is_told_how_to_get_one(tmp_path, store, keys):
    """And nothing is queued."""
    described = byo.describe(dense(tmp_path / "m.onnx"))
    with pytest.raises(ConfigError, match="shoal keys add-model other"):
        byo.publish(store, keys, described, model="other", targets=["*"])
    assert not store.orders()


def test_rows_on_which_kernels_disagree_are_not_golden():
    """Twelve rows, four of them in dispute by half the range: eight are left, and the tolerance stays four steps."""
    facts = Facts((1,), low=-1.0, high=1.0, input_step=1 / 64, output_step=1 / 256, int8=True, runtime="")
    rows = np.arange(12, dtype=np.float32).reshape(12, 1)
    outputs = np.zeros((12, 3), dtype=np.float32)
    plainly = outputs.copy()
    plainly[::3, 1] = 0.5
    golden = byo._derived(facts, rows, outputs, plainly)
    assert sorted(to_array(golden.inputs)[:, 0]) == [1, 2, 4, 5, 7, 8, 10, 11]
    assert golden.tolerance == 4 / 256


def test_random_rows_of_a_quantized_model_are_exact():
    """On its own steps, so that no runtime rounds an input."""
    facts = Facts((1000,), low=-2.0, high=2.0 - 1 / 64, input_step=1 / 64, output_step=0.0, int8=True, runtime="")
    row = random_row(facts, np.random.default_rng(0))
    assert row.min() >= -2.0
    assert row.max() <= 2.0 - 1 / 64
    np.testing.assert_array_equal(row * 64, np.rint(row * 64))


def test_preparation_travels_with_the_release(tmp_path):
    """Overlapping windows of two readings, each value with a scale of its own: the device needs no code for it."""
    path = dense(tmp_path / "m.onnx")
    described = byo.describe(path, preparation=byo.Preparation(2, 1, mean=[1, 2, 3, 4], std=[1, 1, 2, 2]))
    schema = described.spec.input
    assert (list(schema.shape), schema.window, schema.stride, schema.resize) == ([4], 2, 1, pb.RESIZE_UNSPECIFIED)
    assert (list(schema.mean), list(schema.std)) == ([1, 2, 3, 4], [1, 1, 2, 2])


@pytest.mark.parametrize(
    ("preparation", "reason"),
    [
        (byo.Preparation(window=3), "4 values are not a window of 3"),
        (byo.Preparation(resize="area"), r"no picture can be resized to \[4\]"),
        (byo.Preparation(window=2, resize="area"), "both a window and a picture"),
        (byo.Preparation(stride=2, resize="area"), "pictures have no stride"),
        (byo.Preparation(mean=[1.0, 2.0]), "2 means and 1 deviations"),
        (byo.Preparation(mean=[1.0, 2.0], std=[1.0, 1.0]), "expected 1 or 4 of each"),
    ],
)
def test_preparation_that_no_device_can_do_is_refused(tmp_path, preparation, reason):
    """Here, where somebody reads it, and not on ten thousand devices."""
    with pytest.raises(ModelError, match=reason):
        byo.describe(dense(tmp_path / "m.onnx"), preparation=preparation)


@pytest.mark.parametrize(
    "schema",
    [pb.InputSchema(shape=[5], window=2), pb.InputSchema(shape=[4], mean=[0.0], std=[0.0])],
)
def test_release_with_an_impossible_input_is_never_signed(tmp_path, store, keys, publish_all, schema):
    """Whoever made the spec: a pipeline of one's own too."""
    described = byo.describe(dense(tmp_path / "m.onnx"))
    described.spec.input.CopyFrom(schema)
    with pytest.raises(ModelError):
        byo.publish(store, keys, described, model="theirs", targets=["*"])
    assert publish_all() == (0, 0)
