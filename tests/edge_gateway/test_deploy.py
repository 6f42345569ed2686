"""One ONNX file, some devices, no cloud."""

import random
import subprocess
import sys
from urllib.request import urlopen

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import edge_gateway
from edge_gateway.deploy import local_model, model_id
from fleet_console.broker import free_port
from shoal.errors import ConfigError, LinkError, ModelError, PayloadError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.tensors import to_array
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import Scalars, SensorData

_PATIENCE_S = 10.0


def save_model(path, outputs=(3,)):
    """A linear classifier of two inputs, or something with another output."""
    weights = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if outputs != (3,):
        nodes = [helper.make_node("Unsqueeze", ["x", "axes"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "m",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor("w", TensorProto.FLOAT, [2, 3], weights.ravel()),
            helper.make_tensor("axes", TensorProto.INT64, [1], [2]),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def ask(url, site, node, values, model="resnet18-quantized", **fields):
    """Ask as a device and return the first reply, None when nobody answers in a second."""
    loop, replies = Loop(), []
    link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(site, node, "device"), rng=random.Random(1))
    link.subscribe(Route.REPLY, lambda delivery: replies.append(delivery.message), site=site, node=node)
    rows = [pb.InferenceRow(reading=SensorData(seq=1, scalars=Scalars(values=values)))]
    request = pb.InferenceRequest(device=node, epoch=b"e" * 16, model=model, rows=rows, **fields)
    link.attach(loop)
    loop.run(until=lambda: link.is_subscribed)
    assert link.publish(Route.INFER, request, site=site, node=node)
    loop.call_at(loop.clock() + 1.0, lambda _now: loop.stop())
    loop.run(until=lambda: bool(replies))
    link.close()
    loop.close()
    return replies[0] if replies else None


def test_seeds_own_example_answers_its_devices_and_nobody_else(broker, tmp_path):
    """The arguments are those of the document that ordered it; the label is onnxruntime's own."""
    path = save_model(tmp_path / "ResNet18 Quantized.onnx")
    service = edge_gateway.Deploy(
        model=path,
        devices=["cam01", "cam02", "cam03"],
        max_batch_size=8,
        broker=broker.url,
        site="deploy",
        name="gw-deploy",
    )
    service.start()
    try:
        reply = ask(broker.url, "deploy", "cam02", [0.5, -1.0])
        assert ask(broker.url, "deploy", "cam04", [0.5, -1.0]) is None
    finally:
        service.stop()
    logits = onnxruntime.InferenceSession(path).run(None, {"x": np.array([[0.5, -1.0]], np.float32)})[0]
    assert reply.rows[0].answer.label == int(logits.argmax())
    assert not reply.rows[0].sample_promised
    assert (service.stats()["requests"], service.stats()["rows.ok"]) == (1, 1)


def test_it_says_when_there_is_no_broker(tmp_path, monkeypatch):
    """And leaves no thread behind."""
    monkeypatch.setattr("edge_gateway.deploy._CONNECT_S", 0.2)
    service = edge_gateway.Deploy(save_model(tmp_path / "m.onnx"), broker="mqtt://127.0.0.1:1")
    with pytest.raises(LinkError, match="broker"):
        service.start()
    assert service._thread is None


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"site": "Plant"}, PayloadError, "site"),
        ({"name": "gw 1"}, PayloadError, "name"),
        ({"devices": ["cam01", "+"]}, PayloadError, "devices"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size 0"),
        ({"max_delay_ms": -1.0}, ValueError, "max_delay_ms -1.0"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes -1"),
        ({"workers": -1}, ValueError, "workers -1"),
        ({"model": []}, ValueError, "no model"),
        ({"model": ["a/m.onnx", "b/m.onnx"]}, ConfigError, "one name"),
        ({"model": {"Not An Id": "m.onnx"}}, PayloadError, "model"),
    ],
)
def test_arguments_that_cannot_be_are_refused_where_they_are_given(arguments, error, named):
    """Not in a thread, ten seconds later."""
    with pytest.raises(error, match=named):
        edge_gateway.Deploy(**{"model": "m.onnx", **arguments})


def test_what_cannot_be_served_is_said(tmp_path):
    """Where it is started, not in its thread."""
    with pytest.raises(ModelError, match="No such file"):
        local_model("m", tmp_path / "missing.onnx")
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="rubbish"):
        edge_gateway.Deploy(tmp_path / "rubbish.onnx").start()


def test_several_models_answer_under_their_names_with_all_their_outputs(broker, tmp_path):
    """A mapping names them; an output of any shape travels where it is wanted."""
    flat, deep = save_model(tmp_path / "m.onnx"), save_model(tmp_path / "n.onnx", (2, 1))
    with edge_gateway.Deploy({"flat": flat, "deep": deep}, broker=broker.url, site="several", name="gw-2") as service:
        assert service.models == ("flat", "deep")
        replies = {
            name: ask(broker.url, "several", "cam01", [0.5, -1.0], name, wants_outputs=True) for name in service.models
        }
    values = np.array([[0.5, -1.0]], np.float32)
    for name, path in ("flat", flat), ("deep", deep):
        (tensor,) = replies[name].rows[0].answer.outputs
        np.testing.assert_array_equal(
            to_array(tensor), onnxruntime.InferenceSession(path).run(None, {"x": values})[0][0]
        )
    with pytest.raises(ValueError, match="too many values"):
        service.model  # noqa: B018  the property raises


def test_metrics_are_served_while_it_runs(broker, tmp_path):
    """On a port of one's own; what keeps it from serving is an error of `start`."""
    address = f"127.0.0.1:{free_port()}"
    path = save_model(tmp_path / "m.onnx")
    with edge_gateway.Deploy(path, broker=broker.url, site="metrics", name="gw-3", metrics_address=address):
        with urlopen(f"http://{address}/healthz") as answer:
            assert answer.read() == b"ok\n"
        with pytest.raises(ConfigError, match="metrics_address"):
            edge_gateway.Deploy(path, broker=broker.url, site="metrics", name="gw-4", metrics_address=address).start()


def test_stem_becomes_an_id():
    """Whatever people call their files."""
    assert model_id("ResNet18 (v2)_int8") == "resnet18-v2-_int8"


def test_importing_the_package_loads_no_runtime():
    """A device that has the package for its messages does not pay for onnxruntime."""
    program = "import sys, edge_gateway; assert 'onnxruntime' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
