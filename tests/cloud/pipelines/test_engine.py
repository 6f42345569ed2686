"""The engine with steps that take no time: what is done again, what is not, and what a kill at any moment leaves."""

import datetime as dt
import hashlib
import itertools
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cloud import services
from cloud.keys import FileKeyStore
from cloud.pipelines.deploy import newest_release
from cloud.pipelines.engine import Engine, LoggedProgress, StoppedError
from cloud.pipelines.evaluate import RefusedError
from cloud.pipelines.file import EvaluateModel, Kind, parse_pipeline
from cloud.pipelines.objects import ObjectStore
from cloud.pipelines.registry import Registry, Status
from cloud.pipelines.work import TIERS, Made
from cloud.release_orders import submit_release
from cloud.release_store import ReleaseStore
from cloud.sample_store import StoredLabel, StoredSample
from cloud.settings import CloudSettings, ModelSettings
from cloud.sqlite_store import SqliteSampleStore
from cloud.tasks.datasets import digits_images
from shoal.errors import ConfigError, ModelError
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb
from shoal.v1.sensor_pb2 import SensorData
from tests.cloud.pipelines.test_file import GOOD

NAMES = ["train_model", "prune_model", "quantize_model", "evaluate_model", "deploy_to_edge"]


class Killed(BaseException):
    """What no code of ours catches on purpose."""


class FakeSteps:
    """Outputs that depend on everything a step is given, and latencies that are never the same twice."""

    def __init__(self):
        self.ran = []
        self.measured = 0
        self.refuse = False
        self.fail = None
        self.files = {}

    def __call__(self, step, work):
        self.ran.append(step.step_name)
        if self.fail == step.step_name:
            raise ModelError("the loss left the finite numbers")
        (work.folder / "checkpoint").write_bytes(b"half done")
        work.measure("device", 1, 1, {"loss": 0.5})
        data = (
            b"".join(value for files in work.inputs.values() for value in files.values()) + work.data.train.x.tobytes()
        )
        told = msgspec.json.encode([step, work.seed])
        content = hashlib.sha256(told + data).digest()
        if not isinstance(step, EvaluateModel):
            return Made({"content": content}, {"seconds": len(self.ran)})
        (latency,) = work.once("latency_us", self._measure)
        if self.refuse:
            raise RefusedError("worse than its limits", {"tiers": {}})
        return self._release(work, f"{latency}".encode())

    def _measure(self):
        self.measured += 1
        return [float(self.measured)]

    def _release(self, work, decision):
        """A release that follows from artefacts, data and the measured decision, with the field's number as parent."""
        artefacts = work.inputs[Kind.ARTEFACTS]["content"]
        parent = pb.ReleaseSpec.FromString(work.inputs[Kind.FIELD].get("spec.pb", b"")).release
        spec = pb.ReleaseSpec(model="digits", parent=parent, input=work.data.schema(), score=pb.SCORE_KIND_UNCERTAINTY)
        files = {}
        for tier in TIERS:
            spec.artefacts.add(tier=tier.number, format=tier.format, threshold=0.5)
            files[f"{tier.name}.{tier.suffix}"] = tier.name.encode() + decision + artefacts
        return Made(files | {"spec.pb": spec.SerializeToString(deterministic=True)}, {"tiers": {}})


class Rig:
    def __init__(self, directory, task, text=GOOD):
        self.settings = CloudSettings(data_dir=str(directory), models=[ModelSettings(name="digits")])
        self.task = task
        self.pipeline = parse_pipeline(text, "p.yaml")
        self.steps = FakeSteps()
        services.init(self.settings)

    def engine(self, pipeline=None):
        return closing(
            Engine(
                self.settings,
                pipeline or self.pipeline,
                self.task,
                Path("p.yaml"),
                progress=LoggedProgress("digits"),
                execute=self.steps,
            )
        )

    def run(self, pipeline=None):
        """Run once; return the run and the steps that were not known."""
        self.steps.ran.clear()
        with self.engine(pipeline) as engine:
            run = engine.run("asked for")
            return run, [step.name for step in engine.registry.steps(run.id) if step.status == "done"]

    def outputs(self):
        with closing(Registry(self.settings.registry_path)) as registry:
            return {step.output_name: step.output_digest for step in registry.steps(registry.newest("digits").id)}

    def label(self, first, count):
        images = digits_images().take(slice(first, first + count))
        with closing(SqliteSampleStore(self.settings.samples_path)) as samples:
            for seq, (values, label) in enumerate(zip(images.x, images.y.tolist(), strict=True), start=first):
                reading = SensorData(tensor=to_tensor(values)).SerializeToString()
                nothing = (None,) * 6
                samples.add([StoredSample("cam", bytes(16), seq, "digits", "gw", 1, "", 0, seq, reading, *nothing)])
                samples.add_labels([StoredLabel("cam", bytes(16), seq, label, 1, "", 0)])

    @property
    def releases(self):
        return newest_release(ReleaseStore(self.settings.releases_dir), "digits").spec.release


@pytest.fixture
def rig(tmp_path, brief_task):
    return Rig(tmp_path / "cloud", brief_task)


def test_everything_runs_once_and_then_nothing(rig):
    """That the field has what the first run put there is no news to the second."""
    run, done = rig.run()
    assert (run.status, run.release, done) == (Status.DONE, 1, NAMES)
    for _ in range(2):
        run, done = rig.run()
        assert (run.release, done, rig.releases, rig.steps.measured) == (1, [], 1, 1)
    with closing(Registry(rig.settings.registry_path)) as registry:
        assert [report.release for report in registry.releases("digits")] == [1]
        assert [metric.value for metric in registry.metrics(registry.runs()[-1].id)] == [0.5] * 4


def test_release_of_others_in_the_field_is_looked_at(rig):
    """Somebody brought one by hand: ours is held against it, and takes its place under a new number."""
    rig.run()
    store, keys = ReleaseStore(rig.settings.releases_dir), FileKeyStore(rig.settings.keys_dir, None)
    before = newest_release(store, "digits")
    submit_release(store, before.spec, [b"by hand", *list(before.files.values())[1:]], keys, dt.datetime.now(dt.UTC))
    run, done = rig.run()
    assert (run.release, done, rig.releases, rig.steps.measured) == (3, ["evaluate_model", "deploy_to_edge"], 3, 1)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (("ratio: {gateway: 0.5}", "ratio: {gateway: 0.25}"), "prune_model"),
        (("name: quantize_model", "name: quantize_model\n    parameters: {calibration_rows: 64}"), "quantize_model"),
        (("targets: edge_server_*", "targets: ['*']"), "deploy_to_edge"),
        (("task: vision", "task: vision\nseed: 3"), "train_model"),
        (("# nothing", ""), None),
    ],
)
def test_only_what_changed_is_done_again(rig, change, first):
    """What comes before the change is unchanged; a change after which nothing is new ends there."""
    rig.run()
    _, done = rig.run(parse_pipeline(GOOD.replace(*change, 1), "p.yaml"))
    assert done == (NAMES[NAMES.index(first) :] if first else [])


def test_new_labels_make_a_new_release(rig):
    """The samples are part of what decides."""
    rig.run()
    rig.label(0, 30)
    run, done = rig.run()
    assert (run.release, run.labelled, done, rig.releases) == (2, 30, NAMES, 2)


def test_damaged_object_is_made_again(rig):
    """The registry says that it is there; the disk knows better. What it comes to is the same, and no release."""
    rig.run()
    digest = rig.outputs()["trained"]
    (rig.settings.objects_dir / digest[:2] / digest).write_bytes(b"rot")
    assert rig.run()[1] == ["train_model", "evaluate_model", "deploy_to_edge"]
    assert (rig.outputs()["trained"], rig.releases) == (digest, 1)


def test_refused_release_leaves_the_field_alone(rig):
    """The reason and what was measured stay; nothing is signed, and the next run begins anew."""
    rig.steps.refuse = True
    for _ in range(2):
        with rig.engine() as engine, pytest.raises(RefusedError, match="worse than its limits"):
            engine.run("asked for")
    with closing(Registry(rig.settings.registry_path)) as registry:
        newest, older = registry.runs("digits")
        assert (newest.status, newest.error) == (Status.REFUSED, "worse than its limits")
        assert newest.id != older.id
        assert registry.steps(newest.id)[-1].status == "failed"
        assert registry.newest_ended("digits") == newest
    assert ReleaseStore(rig.settings.releases_dir).orders() == []


def test_failed_run_goes_on_where_it_failed_with_what_it_began_with(rig):
    """Labels that came meanwhile are the next run's."""
    rig.steps.fail = "quantize_model"
    with rig.engine() as engine, pytest.raises(ModelError, match="finite"):
        engine.run("asked for")
    rig.steps.fail = None
    rig.label(0, 30)
    run, _ = rig.run()
    assert rig.steps.ran == ["quantize_model", "evaluate_model"]
    assert run.labelled == 0
    run, done = rig.run()
    assert (run.labelled, done) == (30, NAMES)


def test_changed_file_abandons_the_run_that_did_not_end(rig):
    """Half of one pipeline and half of another would be neither."""
    rig.steps.fail = "quantize_model"
    with rig.engine() as engine, pytest.raises(ModelError):
        engine.run("asked for")
    rig.steps.fail = None
    run, done = rig.run(msgspec.structs.replace(rig.pipeline, seed=5))
    assert done == NAMES
    with closing(Registry(rig.settings.registry_path)) as registry:
        assert [(each.id == run.id, each.status) for each in registry.runs()] == [(True, "done"), (False, "abandoned")]


def test_stopped_run_is_known_as_such(rig):
    """`shoal runs` shows why; the next call goes on."""
    rig.steps.fail = None

    def stop(step, work):
        raise StoppedError("SIGTERM")

    steps, rig.steps = rig.steps, stop
    with rig.engine() as engine, pytest.raises(StoppedError):
        engine.run("asked for")
    rig.steps = steps
    with closing(Registry(rig.settings.registry_path)) as registry:
        stopped = registry.newest("digits")
    assert (stopped.status, stopped.error) == (Status.STOPPED, "SIGTERM")
    assert rig.run()[0].id == stopped.id


def test_two_runs_of_one_model_do_not_meet(rig):
    """The second is told why."""

    def another(step, work):
        with rig.engine() as engine:
            engine.run("asked for")

    steps, rig.steps = rig.steps, another
    with rig.engine() as engine, pytest.raises(ConfigError, match="another run of digits goes on"):
        engine.run("asked for")
    rig.steps = steps


def test_plan_says_what_a_run_would_do(rig):
    """Before, in between, and after."""
    with rig.engine() as engine:
        assert [planned.output_digest for planned in engine.plan()] == [None] * 5
    rig.run()
    with rig.engine() as engine:
        assert {planned.step.output: planned.output_digest for planned in engine.plan()} == rig.outputs()
        changed = parse_pipeline(GOOD.replace("0.5", "0.25"), "p.yaml")
    with rig.engine(changed) as engine:
        assert [planned.output_digest is None for planned in engine.plan()] == [False, True, True, True, True]


def test_old_objects_go(rig, monkeypatch):
    """What no recent run names is deleted; the newest runs of every model stay whole."""
    monkeypatch.setattr("cloud.pipelines.engine._KEPT_RUNS", 1)
    monkeypatch.setattr("cloud.pipelines.engine._YOUNG_S", -60.0)
    rig.run()
    first = rig.outputs()["trained"]
    store = ObjectStore(rig.settings.objects_dir)
    others = store.put({"model": b"of a run of another model"})
    with closing(Registry(rig.settings.registry_path)) as registry:
        newest = registry.newest("digits")
        registry.begin(replace(newest, id="0", model="shuttle", samples_digest=others))
    forgotten, recent = (rig.settings.builds_dir / "work" / name for name in ("forgotten", "recent"))
    for folder in (forgotten, recent):
        folder.mkdir()
    os.utime(forgotten, (1000, 1000))
    rig.label(0, 30)
    rig.run()
    assert (forgotten.exists(), recent.exists()) == (False, True)
    assert not store.holds(first)
    assert all(map(store.holds, [*rig.outputs().values(), others]))


def killed_at(rig, monkeypatch, point):
    """Run, and die at the given write to registry, object store or publisher's queue; say whether it did."""
    count = itertools.count()

    def deadly(function, *, after):
        def call(*args, **kwargs):
            if after:
                result = function(*args, **kwargs)
            if next(count) == point:
                raise Killed
            return result if after else function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for target, name, after in (
            (Registry, "begin", False),
            (Registry, "put_step", False),
            (Registry, "put_result", False),
            (Registry, "put_result", True),
            (Registry, "put_release", False),
            # Also the last words: a process that was killed has none.
            (Registry, "end", False),
            (ObjectStore, "put", False),
            (ObjectStore, "put", True),
            (ReleaseStore, "submit", False),
            (ReleaseStore, "submit", True),
        ):
            patch.setattr(target, name, deadly(getattr(target, name), after=after))
        try:
            rig.run()
        except Killed:
            return True
    return False


def test_kill_at_any_write_ends_with_the_same_digests(tmp_path, brief_task, monkeypatch):
    """One run dies at each point in turn and goes on: one release comes of it, with the bytes of the undisturbed."""
    calm = Rig(tmp_path / "calm", brief_task)
    calm.run()
    measured_again = 0
    for point in itertools.count():
        rig = Rig(tmp_path / f"killed-{point}", brief_task)
        if not killed_at(rig, monkeypatch, point):
            break
        run, _ = rig.run()
        assert (run.status, rig.releases, len(ReleaseStore(rig.settings.releases_dir).orders())) == (Status.DONE, 1, 2)
        if rig.steps.measured == 1:
            assert rig.outputs() == calm.outputs(), point
        measured_again += rig.steps.measured - 1
        with closing(Registry(rig.settings.registry_path)) as registry:
            assert [report.release for report in registry.releases("digits")] == [1]
            assert len(registry.runs()) == 1
    assert point > 30
    # Only where it died between measuring and keeping what it measured.
    assert measured_again == 1
