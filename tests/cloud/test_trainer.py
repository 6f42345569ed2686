"""The trainer with builds that end when a test says so."""

from collections import Counter

import numpy as np
import pytest

from cloud.pipelines.file import parse_pipeline
from cloud.pipelines.registry import Registry, ReleaseReport, Run, Status
from cloud.sample_store import StoredLabel, StoredSample
from cloud.settings import CloudSettings
from cloud.sqlite_store import SqliteSampleStore
from cloud.trainer import Trainer, process_starter
from shoal.inbox import Inbox
from shoal.routes import ROUTES, Route, topic
from shoal.v1 import command_pb2 as pb
from shoal.v1.inference_pb2 import ASK_REASON_AUDIT

LATER_US = 1 << 62
PIPELINE = """
model: {}
task: vision
triggers: {}
steps:
  - name: train_model
    inputs: samples
"""
MIN_NEW = 3


def pipeline_of(name, **triggers):
    return parse_pipeline(PIPELINE.format(name, {"new_labels": MIN_NEW, **triggers}), name)


class FakeBuild:
    """A process whose exit status a test sets."""

    def __init__(self, model):
        self.model = model
        self.code = None
        self.calls = []

    def poll(self):
        return self.code

    def terminate(self):
        self.calls.append("terminate")

    def wait(self):
        self.calls.append("wait")


class MemoryLink:
    """The part of a link that commands need."""

    def __init__(self):
        self.counters = Counter()
        self.inbox = Inbox(self.counters)
        self.results = []

    def on_connect(self, hook):
        """It never is."""

    def subscribe(self, route, handler, **segments):
        assert topic(route, **segments) == "shoal/v1/down/cloud/trainer/command"
        self.inbox.register(route, handler, ack_late=False)

    def publish(self, route, message, **segments):
        assert type(message) is ROUTES[route].message
        assert topic(route, site=segments["site"], node=segments["node"]) == "shoal/v1/up/cloud/trainer/result"
        self.results.append(message)
        return True


class Rig:
    """A trainer of models that are given by name and triggers."""

    def __init__(self, directory, *models, parallel_builds=2):
        self.settings = CloudSettings(data_dir=str(directory), models=[], parallel_builds=parallel_builds)
        self.pipelines = [pipeline_of(**model) for model in models]
        self.samples = SqliteSampleStore(self.settings.samples_path)
        self.registry = Registry(self.settings.registry_path)
        self.builds = []
        self.reasons = []
        self.labels = 0
        self.trainer = None
        self.restart()

    def restart(self):
        if self.trainer is not None:
            self.trainer.close()
        self.link = MemoryLink()
        self.trainer = Trainer(self.settings, self.link, self.samples, pipelines=self.pipelines, start_run=self._start)

    def close(self):
        self.trainer.close()
        self.samples.close()
        self.registry.close()

    def _start(self, model, reason):
        self.builds.append(FakeBuild(model))
        self.reasons.append(reason)
        return self.builds[-1]

    def started(self):
        return [build.model for build in self.builds]

    def label(self, model, count):
        for seq in range(self.labels, self.labels + count):
            nothing = (None,) * 6
            self.samples.add([StoredSample("cam", bytes(16), seq, model, "gw", 1, "", 0, 0, b"", *nothing)])
            self.samples.add_labels([StoredLabel("cam", bytes(16), seq, 1, pb.LABEL_SOURCE_PERSON, "", 0)])
        self.labels += count

    def audit(self, model, scores, release=1):
        """Bring samples of the audit share, in order."""
        first = self.samples.count()
        self.samples.add(
            StoredSample(
                "a", bytes(16), seq, model, "gw", ASK_REASON_AUDIT, "", 0, 0, b"", release, score, 1, *(None,) * 3
            )
            for seq, score in enumerate(scores, start=first)
        )

    def report(self, model, release):
        """Leave what a run leaves that begins now."""
        self.end_run(model, Status.DONE, release)
        labelled = self.samples.count_labelled(model)
        self.registry.put_release(ReleaseReport(model, release, release - 1, labelled, 0, {}, {}, {}), "run")

    def end_run(self, model, status, release=0):
        labelled = self.samples.count_labelled(model)
        run = Run(
            f"{release:04d}.{model}",
            model,
            "p",
            "",
            "",
            0,
            0,
            1,
            labelled,
            "",
            "",
            "{}",
            "",
            status.value,
            "",
            1,
            release,
        )
        self.registry.begin(run)

    def ask(self, model):
        command = pb.Command(id=b"%d" % len(self.link.results), expires_at_us=LATER_US)
        command.run_pipeline.model = model
        name = topic(Route.COMMAND, site="cloud", node="trainer")
        self.link.inbox.receive(name, command.SerializeToString(), retained=False, ack=lambda: None)
        return self.link.results[-1].status, self.link.results[-1].message


@pytest.fixture
def rig(tmp_path):
    """Make a trainer of some models."""
    made = []

    def make(*models, **settings):
        made.append(Rig(tmp_path, *models, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_first_release_is_built_at_once_and_only_once(rig):
    """While its build runs nothing else starts for the model, whatever comes in."""
    rig = rig({"name": "digits"})
    rig.trainer.tick(0.0)
    rig.label("digits", 10)
    rig.trainer.tick(1.0)
    assert rig.started() == ["digits"]
    assert rig.trainer.counters == {"builds.started": 1, "labelled.digits": 10}


def test_next_release_follows_new_labels(rig):
    """Labels count from the beginning of the last build: those that came while it ran are new."""
    rig = rig({"name": "digits"})
    rig.label("digits", 5)
    rig.trainer.tick(0.0)
    rig.report("digits", 1)
    rig.label("digits", MIN_NEW - 1)
    rig.builds[0].code = 0
    rig.trainer.tick(1.0)
    assert rig.started() == ["digits"]
    rig.label("digits", 1)
    rig.trainer.tick(2.0)
    assert rig.started() == ["digits", "digits"]
    rig.report("digits", 2)
    rig.builds[1].code = 0
    rig.trainer.tick(3.0)
    assert rig.started() == ["digits", "digits"]
    assert rig.trainer.counters["builds.done"] == 2


def test_no_more_builds_run_at_a_time_than_there_is_room_for(rig):
    """The next starts in the tick in which one has ended, and everybody's turn comes."""
    rig = rig({"name": "a"}, {"name": "b"}, {"name": "c"}, parallel_builds=2)
    rig.trainer.tick(0.0)
    rig.trainer.tick(1.0)
    assert rig.started() == ["a", "b"]
    rig.report("b", 1)
    rig.builds[1].code = 0
    rig.trainer.tick(2.0)
    assert rig.started() == ["a", "b", "c"]


@pytest.mark.parametrize("code", [1, 2, -9])
def test_failed_build_is_tried_again_after_a_while(rig, code):
    """The same data would fail again at once; other models are not held up meanwhile."""
    rig = rig({"name": "a"}, {"name": "b"}, parallel_builds=1)
    rig.trainer.tick(100.0)
    rig.builds[0].code = code
    rig.trainer.tick(110.0)
    assert rig.started() == ["a", "b"]
    rig.report("b", 1)
    rig.builds[1].code = 0
    rig.trainer.tick(139.9)
    assert rig.started() == ["a", "b"]
    rig.trainer.tick(140.0)
    assert rig.started() == ["a", "b", "a"]
    assert rig.trainer.counters["builds.failed"] == 1


def test_trainer_goes_on_where_it_was(rig):
    """A restarted trainer knows from the registry what was made and from how many labels."""
    rig = rig({"name": "digits", "max_releases": 12})
    rig.label("digits", 5)
    for release in range(1, 12):
        rig.report("digits", release)
    rig.restart()
    rig.trainer.tick(0.0)
    assert rig.started() == []
    rig.label("digits", MIN_NEW)
    rig.trainer.tick(1.0)
    assert rig.started() == ["digits"]
    rig.report("digits", 12)
    rig.restart()
    rig.label("digits", MIN_NEW)
    rig.trainer.tick(2.0)
    assert rig.started() == ["digits"]


def test_asked_for_build_starts_once(rig):
    """`RunPipeline` is answered at once and obeyed by the next tick, whatever the labels say."""
    rig = rig({"name": "digits"}, {"name": "shuttle"})
    rig.report("digits", 1)
    rig.report("shuttle", 1)
    rig.restart()
    assert rig.ask("digits")[0] == pb.COMMAND_STATUS_DONE
    rig.trainer.tick(0.0)
    assert rig.started() == ["digits"]
    rig.report("digits", 2)
    rig.builds[0].code = 0
    rig.trainer.tick(1.0)
    rig.trainer.tick(2.0)
    assert rig.started() == ["digits"]


def test_question_for_a_build_that_never_comes_is_refused(rig):
    """A model that is not trained here, or that has all of its releases, is named in the answer."""
    rig = rig({"name": "digits", "max_releases": 1})
    rig.report("digits", 1)
    rig.restart()
    assert rig.ask("engine") == (pb.COMMAND_STATUS_REFUSED, "model: 'engine' is not trained here")
    assert rig.ask("digits") == (pb.COMMAND_STATUS_REFUSED, "model: 'digits' has all of its 1 releases")
    rig.trainer.tick(0.0)
    assert rig.started() == []


def test_refused_run_is_not_tried_again_with_the_same_labels(rig):
    """The gate would say no again, every thirty seconds; new labels may change that."""
    rig = rig({"name": "digits"})
    rig.label("digits", 5)
    rig.trainer.tick(0.0)
    rig.end_run("digits", Status.REFUSED)
    rig.builds[0].code = 2
    rig.trainer.tick(1.0)
    rig.trainer.tick(100.0)
    assert rig.started() == ["digits"]
    rig.label("digits", MIN_NEW)
    rig.trainer.tick(101.0)
    assert rig.reasons == ["first release", f"{MIN_NEW} new labels"]


def test_drift_makes_fewer_labels_enough(rig):
    """Also after a restart, which looks at all scores again."""
    rng = np.random.default_rng(5)
    rig = rig({"name": "digits", "new_labels": 500, "drift": {"new_labels": 2}})
    rig.report("digits", 1)
    rig.restart()
    rig.label("digits", 2)
    rig.audit("digits", rng.beta(1, 9, 1500).tolist())
    rig.trainer.tick(0.0)
    assert (rig.started(), rig.trainer.counters["drifted.digits"]) == ([], 0)
    rig.audit("digits", rng.beta(3, 5, 1500).tolist())
    rig.restart()
    rig.trainer.tick(1.0)
    assert (rig.reasons, rig.trainer.counters["drifted.digits"]) == (["drift, 2 new labels"], 1)


def test_close_ends_the_builds_that_run(rig):
    """No build outlives its trainer."""
    rig = rig({"name": "a"}, {"name": "b"})
    rig.trainer.tick(0.0)
    rig.report("a", 1)
    rig.builds[0].code = 0
    rig.trainer.tick(1.0)
    rig.trainer.close()
    assert [build.calls for build in rig.builds] == [[], ["terminate", "wait"]]


def test_run_is_a_process_of_its_own(tmp_path, capfd):
    """The default starter runs `cloud.pipelines` on the same file; a model that it lacks is exit status 2."""
    config = tmp_path / "cloud.toml"
    config.write_text(f'data_dir = "{tmp_path}"\nmodels = []\n')
    process = process_starter(config)("engine", "asked for")
    assert process.args[1:] == [
        *("-m", "cloud.pipelines", "--config", str(config)),
        *("--model", "engine", "--reason", "asked for"),
    ]
    assert process.wait(30) == 2
    assert f"{config} has no pipeline for model 'engine'" in capfd.readouterr().err
