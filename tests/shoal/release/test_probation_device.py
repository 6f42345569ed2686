"""A real device on probation: real TFLite model, golden vectors, outbox, slots, trust and publisher."""

import contextlib
import random
from collections import Counter

import numpy as np
import pytest

from device_agent.actions import Actions
from device_agent.config import DeviceConfig
from device_agent.device import Device
from device_agent.readings import Reading
from device_agent.runtime import load
from shoal.delivery.outbox import Outbox
from shoal.release.client import UpdateClient
from shoal.release.offer import NodeModel
from shoal.release.probation import EDGES, measure_baseline
from shoal.release.trust import TrustStore
from shoal.routes import Route
from shoal.scoring import score_rows
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb
from shoal.v1.command_pb2 import DropRelease
from shoal.v1.node_pb2 import SlotPhase
from shoal.v1.sensor_pb2 import TIME_QUALITY_SUSPECT, TIME_QUALITY_SYNCED
from tests.shoal.release.conftest import MODEL, InlineDisk, InlineSelfTest, NodeLink

pytestmark = pytest.mark.device

WIDTH = 640
PROBATION_S = 10.0


def spec_of(path, *, std=1.0, parent=0):
    """A release of MLPerf Tiny's anomaly detector, with golden vectors and baseline as this runtime answers."""
    runtime = load(path)
    rows = np.random.default_rng(1).normal(0.0, 1.0, (400, WIDTH)).astype(np.float32)
    outputs = runtime.run(rows)
    scores = score_rows(pb.SCORE_KIND_RECONSTRUCTION, rows, outputs).scores
    artefact = pb.Artefact(
        tier=pb.TIER_DEVICE,
        format=pb.MODEL_FORMAT_TFLITE,
        golden=pb.GoldenVectors(inputs=to_tensor(rows[:8]), outputs=to_tensor(outputs[:8]), tolerance=1e-3),
        threshold=1e9,
        baseline=measure_baseline(scores.tolist()),
    )
    schema = pb.InputSchema(shape=[WIDTH], mean=[0.0], std=[std])
    return pb.ReleaseSpec(
        model=MODEL, parent=parent, input=schema, score=pb.SCORE_KIND_RECONSTRUCTION, artefacts=[artefact]
    )


class Sensor:
    """A device and its update client on the memory broker, wired as the agent wires them."""

    def __init__(self, directory, broker, cloud):
        self.directory = directory
        self.broker = broker
        self.cloud = cloud
        self.wall = cloud.wall_s
        self.rng = np.random.default_rng(2)
        self.now = 0.0
        self.start()

    def start(self):
        self.link = NodeLink(self.broker, "dev-1", "device")
        self.outbox = Outbox(self.directory / "outbox.sqlite")
        config = DeviceConfig("plant", "dev-1", MODEL)
        self.device = Device(config, self.link, self.outbox, rng=random.Random(3), clock=lambda: self.now)
        self.updates = UpdateClient(
            self.link,
            TrustStore(self.directory / "trust", self.cloud.store.root(), clock=lambda: float(self.wall())),
            self.directory / "models",
            [NodeModel(MODEL, pb.TIER_DEVICE, "tflite", PROBATION_S)],
            node="dev-1",
            self_test=InlineSelfTest(load),
            activate=self.device.activate,
            deactivate=self.device.deactivate,
            find_watch=self.device.watch,
            rng=random.Random(4),
            counters=Counter(),
            disk=InlineDisk(),
        )
        self.device.model_states = self.updates.state
        self.device.clock_suspect = lambda: self.updates.clock_suspect
        self.updates.start()

    def run(self, seconds, *, readings=1, make=None):
        """Half a second at a time: readings, then what is due."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            for _ in range(readings):
                values = self.rng.normal(0.0, 1.0, WIDTH).astype(np.float32) if make is None else make()
                self.device.read(Reading(values, 0), self.now)
            self.outbox.commit()
            self.updates.tick(self.now)
            self.broker.run()

    def close(self):
        self.updates.close()
        self.outbox.close()
        self.link.connected = False

    @property
    def state(self):
        """The last NodeState that the device published."""
        self.device.report_soon()
        self.device.tick(self.now)
        return self.link.last(Route.STATE)

    @property
    def model(self):
        (state,) = self.state.models
        return state


@pytest.fixture
def detector(shared_data):
    return shared_data / "models_tflite" / "ad01_fp32.tflite"


@pytest.fixture
def sensor(tmp_path, broker, cloud, detector):
    """A device with release 1 confirmed on live readings."""
    (tmp_path / "dev-1").mkdir()
    made = Sensor(tmp_path / "dev-1", broker, cloud)
    cloud.ship(detector.read_bytes(), spec=spec_of(detector))
    made.run(25.0)
    assert (made.model.release, made.model.phase) == (1, SlotPhase.SLOT_PHASE_CONFIRMED)
    with contextlib.closing(made):
        yield made


def another(detector):
    """Other bytes, the same model: the runtime reads no further than the graph."""
    return detector.read_bytes() + b"\0" * 16


def exponential(path):
    """A TFLite file that answers e to the power of each input, which float32 holds up to 88."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="left out: nothing here writes TFLite")
    flatbuffers = pytest.importorskip("flatbuffers")
    tensors = [schema.TensorT(name=name, shape=[1, WIDTH], type=schema.TensorType.FLOAT32) for name in ("x", "y")]
    graph = schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[1])
    graph.operators = [schema.OperatorT(opcodeIndex=0, inputs=[0], outputs=[1])]
    code = schema.OperatorCodeT(builtinCode=schema.BuiltinOperator.EXP, version=1)
    code.deprecatedBuiltinCode = schema.BuiltinOperator.EXP
    model = schema.ModelT(version=3, operatorCodes=[code], subgraphs=[graph], buffers=[schema.BufferT()])
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def test_model_that_is_not_finite_on_live_readings_goes_back(sensor, cloud, tmp_path):
    """It passes its golden vectors, which are scaled; the release's scale is wrong, and live ones overflow."""
    path = exponential(tmp_path / "exp.tflite")
    cloud.ship(path.read_bytes(), spec=spec_of(path, std=1e-3, parent=1))
    sensor.run(5.0, readings=0)
    assert (sensor.model.release, sensor.model.phase) == (2, SlotPhase.SLOT_PHASE_PROBATION)
    sensor.run(5.0)
    model = sensor.model
    assert (model.release, model.phase) == (1, SlotPhase.SLOT_PHASE_CONFIRMED)
    assert model.refused_release == 2
    assert "failed on 5 of 5 readings" in model.refused_reason
    assert "not finite" in model.refused_reason
    assert sensor.device.release == 1
    sensor.run(20.0)
    assert (sensor.model.release, sensor.model.errors) == (1, 0)


def test_scale_that_no_reading_fits_goes_back(sensor, cloud, detector):
    """Finite readings that become infinite are the release's fault."""
    cloud.ship(another(detector), spec=spec_of(detector, std=1e-44, parent=1))
    sensor.run(10.0)
    model = sensor.model
    assert (model.release, model.refused_release) == (1, 2)
    assert model.refused_reason.endswith("a value is not finite")


def test_scores_far_from_the_baseline_go_back(sensor, cloud, detector):
    """Finite, and orders of magnitude from anything at the gate: the wrong unit."""
    cloud.ship(another(detector), spec=spec_of(detector, std=1e-6, parent=1))
    sensor.run(40.0, readings=10)
    model = sensor.model
    assert (model.release, model.refused_release) == (1, 2)
    assert "where its baseline has next to none" in model.refused_reason


def test_good_model_is_confirmed_on_drifted_readings(sensor, cloud, detector):
    """Three times the deviation that the gate saw: the world's fault, and why releases are made."""
    cloud.ship(another(detector), spec=spec_of(detector, parent=1))
    sensor.run(30.0, readings=10, make=lambda: sensor.rng.normal(0.0, 3.0, WIDTH).astype(np.float32))
    model = sensor.model
    assert (model.release, model.phase, model.refused_release) == (2, SlotPhase.SLOT_PHASE_CONFIRMED, 0)
    assert model.answers > 100
    assert model.HasField("divergence_ppm")


def test_release_that_a_command_drops_goes_back_for_good(sensor, cloud, detector):
    """Pins `drop_release` on real slots: the release before it returns, and the plan is not followed again."""
    cloud.ship(another(detector), parent=1, spec=spec_of(detector, parent=1))
    sensor.run(25.0)
    assert (sensor.model.release, sensor.model.phase) == (2, SlotPhase.SLOT_PHASE_CONFIRMED)
    drop = Actions(sensor.device, sensor.updates, lambda: None).table()["drop_release"]
    assert drop(DropRelease(model=MODEL, release=2, reason="alarms")) == "release 2 is refused; 1 runs"
    sensor.run(25.0)
    state = sensor.model
    assert (state.release, state.refused_release, state.refused_reason) == (1, 2, "dropped: alarms")


def test_broken_sensor_is_not_the_models_fault(sensor, cloud, detector):
    """Readings that are not finite are asked upwards and held against nobody."""
    cloud.ship(another(detector), spec=spec_of(detector, parent=1))
    sensor.run(30.0, readings=10, make=lambda: np.full(WIDTH, np.nan, np.float32))
    assert (sensor.model.release, sensor.model.answers, sensor.model.errors) == (2, 0, 0)
    assert sensor.state.counters["model_errors"] > 100


def test_readings_of_another_shape_are_the_releases_fault(sensor, cloud, detector):
    """A release for another firmware: no reading of this device fits it."""
    cloud.ship(another(detector), spec=spec_of(detector, parent=1))
    sensor.run(20.0, make=lambda: sensor.rng.normal(0.0, 1.0, 3).astype(np.float32))
    assert (sensor.model.release, sensor.model.refused_release) == (1, 2)


def test_restarts_on_probation_do_not_cost_a_good_model(sensor, cloud, detector):
    """Two power cuts, and as many ordered restarts as there are."""
    cloud.ship(another(detector), spec=spec_of(detector, parent=1))
    sensor.run(5.0)
    for restart in range(8):
        if restart > 1:
            sensor.updates.excuse_start()
        sensor.close()
        sensor.start()
        sensor.run(3.0)
        assert (sensor.model.release, sensor.model.phase) == (2, SlotPhase.SLOT_PHASE_PROBATION)
    sensor.run(15.0)
    assert (sensor.model.phase, sensor.model.refused_release) == (SlotPhase.SLOT_PHASE_CONFIRMED, 0)


def test_refused_first_release_leaves_every_reading_to_the_gateway(tmp_path, broker, cloud, detector):
    """With nothing to go back to the device asks, as before it had a model."""
    cloud.ship(detector.read_bytes(), spec=spec_of(detector, std=1e-44))
    with contextlib.closing(Sensor(tmp_path, broker, cloud)) as sensor:
        sensor.run(10.0)
        assert (sensor.device.release, sensor.model.refused_release) == (0, 1)
        assert sensor.device.read(Reading(np.zeros(WIDTH, np.float32), 0), sensor.now).reason == "asked.no_model"


def test_clock_that_stands_in_the_past_is_told(sensor, cloud, detector):
    """NodeState says that the node's times are not to be believed."""
    assert sensor.state.time_quality == TIME_QUALITY_SYNCED
    sensor.wall = lambda: 0.0
    cloud.ship(another(detector), spec=spec_of(detector, parent=1))
    sensor.run(5.0)
    assert sensor.state.time_quality == TIME_QUALITY_SUSPECT


def test_baseline_of_a_real_model_lies_inside_the_bins(detector):
    """Its scores are neither all below the first edge nor all above the last."""
    baseline = spec_of(detector).artefacts[0].baseline
    assert (len(baseline.score_ppm), baseline.score_ppm[0], baseline.score_ppm[-1]) == (len(EDGES) + 1, 0, 0)
