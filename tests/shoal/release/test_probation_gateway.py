"""A real gateway on probation: real ONNX models, golden vectors, batches, slots, trust and publisher."""

import contextlib
import random

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="left out: gateways need onnxruntime")

from edge_gateway import engine  # noqa: E402  not in the device environment
from edge_gateway.gateway import Gateway, GatewayConfig  # noqa: E402
from shoal.codec import encode  # noqa: E402
from shoal.delivery.outbox import Outbox  # noqa: E402
from shoal.loop import Loop  # noqa: E402
from shoal.release.client import UpdateClient  # noqa: E402
from shoal.release.offer import NodeModel  # noqa: E402
from shoal.release.probation import measure_baseline  # noqa: E402
from shoal.release.trust import TrustStore  # noqa: E402
from shoal.routes import Route, topic  # noqa: E402
from shoal.scoring import score_rows  # noqa: E402
from shoal.tensors import to_tensor  # noqa: E402
from shoal.v1 import inference_pb2, sensor_pb2  # noqa: E402
from shoal.v1 import release_pb2 as pb  # noqa: E402
from shoal.v1.node_pb2 import SlotPhase  # noqa: E402
from tests.shoal.release.conftest import MODEL, InlineDisk, InlineSelfTest, NodeLink  # noqa: E402

SITE, NODE, CAMERA = "plant", "gw-1", "cam-1"
PROBATION_S = 10.0


def classifier(path, operator):
    """An ONNX file that answers two logits: an operator of each input."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x"], ["y"])],
        operator.lower(),
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 2])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def spec_of(path, parent=0):
    """A release whose golden vectors and baseline are what the model answers to positive rows."""
    rows = np.random.default_rng(1).uniform(0.5, 4.0, (500, 2)).astype(np.float32)
    outputs = engine.load(path).run(rows)
    artefact = pb.Artefact(
        tier=pb.TIER_GATEWAY,
        format=pb.MODEL_FORMAT_ONNX,
        golden=pb.GoldenVectors(inputs=to_tensor(rows[:8]), outputs=to_tensor(outputs[:8]), tolerance=1e-4),
        threshold=1.0,
        baseline=measure_baseline(score_rows(pb.SCORE_KIND_UNCERTAINTY, rows, outputs).scores.tolist()),
    )
    schema = pb.InputSchema(shape=[2], mean=[0.0], std=[1.0])
    return pb.ReleaseSpec(
        model=MODEL, parent=parent, input=schema, score=pb.SCORE_KIND_UNCERTAINTY, artefacts=[artefact]
    )


class Served:
    """A gateway and its update client on the memory broker, wired as the service wires them."""

    def __init__(self, directory, broker, cloud):
        self.directory = directory
        self.broker = broker
        self.cloud = cloud
        self.rng = np.random.default_rng(2)
        self.now = 0.0
        self.seq = 0
        self.start()

    def start(self):
        self.link = NodeLink(self.broker, NODE, "gateway")
        self.outbox = Outbox(self.directory / "outbox.sqlite")
        config = GatewayConfig(SITE, NODE, [MODEL], [CAMERA])
        self.loop = Loop(lambda: self.now)
        self.gateway = Gateway(config, self.link, self.outbox, rng=random.Random(3), loop=self.loop)
        self.updates = UpdateClient(
            self.link,
            TrustStore(self.directory / "trust", self.cloud.store.root(), clock=self.cloud.wall_s),
            self.directory / "models",
            [NodeModel(MODEL, pb.TIER_GATEWAY, "onnx", PROBATION_S)],
            node=NODE,
            self_test=InlineSelfTest(engine.load),
            activate=self.gateway.activate,
            deactivate=self.gateway.deactivate,
            find_watch=self.gateway.watch,
            rng=random.Random(4),
            counters=self.gateway.counters,
            disk=InlineDisk(),
        )
        self.gateway.model_states = self.updates.state
        self.updates.start()

    def ask(self, low, high, rows=8):
        """Deliver one question, without serving it yet."""
        asked = inference_pb2.InferenceRequest(device=CAMERA, epoch=b"e" * 16, model=MODEL)
        for _ in range(rows):
            self.seq += 1
            values = sensor_pb2.Scalars(values=self.rng.uniform(low, high, 2) if low < high else [low, high])
            asked.rows.add(reading=sensor_pb2.SensorData(seq=self.seq, scalars=values))
        name = topic(Route.INFER, site=SITE, node=CAMERA)
        self.link.inbox.receive(name, encode(asked), retained=False, ack=lambda: None)

    def run(self, seconds, low=0.5, high=4.0):
        """Half a second at a time: a question, its answer, then what is due."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.ask(low, high)
            self.gateway.flush(self.now)
            self.updates.tick(self.now)
            self.broker.run()

    def statuses(self):
        return {row.status for row in self.link.last(Route.REPLY).rows}

    def close(self):
        self.updates.close()
        self.gateway.lanes.close()
        self.loop.close()
        self.outbox.close()
        self.link.connected = False

    @property
    def model(self):
        """As in the last NodeState that the gateway published."""
        self.gateway._reporter.soon()
        self.gateway.tick(self.now)
        (state,) = self.link.last(Route.STATE).models
        return state


@pytest.fixture
def served(tmp_path, broker, cloud):
    with contextlib.closing(Served(tmp_path, broker, cloud)) as made:
        yield made


@pytest.fixture
def good(served, cloud, tmp_path):
    """Release 1, a good one, confirmed on live rows."""
    path = classifier(tmp_path / "good.onnx", "Identity")
    cloud.ship(path.read_bytes(), spec=spec_of(path))
    served.run(20.0)
    assert (served.model.release, served.model.phase) == (1, SlotPhase.SLOT_PHASE_CONFIRMED)
    return served


def ship_logarithm(cloud, folder, parent=0):
    """A model that is right about every positive row, at the gate too, and about no other."""
    path = classifier(folder / "log.onnx", "Log")
    cloud.ship(path.read_bytes(), spec=spec_of(path, parent))


def test_model_that_is_not_finite_on_live_rows_goes_back(good, cloud, tmp_path):
    """It passes its golden vectors; devices are answered by the last model again, and the state says why."""
    ship_logarithm(cloud, tmp_path, parent=1)
    good.run(3.0)
    assert (good.model.release, good.model.phase) == (2, SlotPhase.SLOT_PHASE_PROBATION)
    assert good.model.answers > 0
    good.run(3.0, -4.0, -0.5)
    model = good.model
    assert (model.release, model.phase, model.refused_release) == (1, SlotPhase.SLOT_PHASE_CONFIRMED, 2)
    assert model.refused_reason.startswith("probation: it failed on ")
    assert "not finite" in model.refused_reason
    good.run(1.0, -4.0, -0.5)
    assert good.statuses() == {inference_pb2.STATUS_OK}
    good.run(60.0)
    assert good.model.release == 1


def test_model_that_keeps_working_is_confirmed(good, cloud, tmp_path):
    """The same release on rows that it can take."""
    ship_logarithm(cloud, tmp_path, parent=1)
    good.run(20.0)
    model = good.model
    assert (model.release, model.phase, model.errors) == (2, SlotPhase.SLOT_PHASE_CONFIRMED, 0)
    assert model.divergence_ppm == 0


def test_rows_that_no_model_could_take_are_not_held_against_it(good, cloud, tmp_path):
    """What is refused before the model runs is the device's fault."""
    ship_logarithm(cloud, tmp_path, parent=1)
    good.run(3.0)
    good.run(20.0, np.inf, np.inf)
    assert good.statuses() == {inference_pb2.STATUS_INVALID_ARGUMENT}
    assert (good.model.release, good.model.errors) == (2, 0)


def test_first_model_that_is_unfit_is_not_served_any_more(served, cloud, tmp_path):
    """Rows that waited for it are answered too: this gateway serves no such model."""
    ship_logarithm(cloud, tmp_path)
    served.run(3.0)
    served.ask(-4.0, -0.5)
    served.gateway.flush(served.now)
    served.ask(0.5, 4.0)
    served.updates.tick(served.now)
    assert (served.gateway.watch(MODEL), served.model.refused_release) == (None, 1)
    served.gateway.flush(served.now)
    assert served.statuses() == {inference_pb2.STATUS_NOT_FOUND}
    assert not served.gateway._open


def test_power_cuts_on_probation_do_not_cost_a_good_model(good, cloud, tmp_path):
    """Two starts more, each with its whole probation."""
    ship_logarithm(cloud, tmp_path, parent=1)
    good.run(3.0)
    for _ in range(2):
        good.close()
        good.start()
        good.run(3.0)
        assert (good.model.release, good.model.phase) == (2, SlotPhase.SLOT_PHASE_PROBATION)
    good.run(15.0)
    assert (good.model.phase, good.model.refused_release) == (SlotPhase.SLOT_PHASE_CONFIRMED, 0)
