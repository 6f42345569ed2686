"""The gate of a pipeline on what the field brought: hard samples, teachers' labels, and limits of the file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.pipelines.evaluate import RefusedError, evaluate_model, with_overrides
from cloud.pipelines.file import EvaluateParameters, Kind, TierLimits
from cloud.pipelines.snapshot import FieldSamples, PublishedRelease, field_tree, read_samples, samples_tree
from cloud.pipelines.work import TIERS, TaskOrigin, Work, artefact_name
from cloud.tasks.base import GateLimits, LabelledSamples, split_extra
from tests.cloud.toolchain import task_of

LAX = TierLimits(min_metric=0.0, max_drop_from_float=1.0, max_drop_from_parent=1.0, max_slowdown=1e6)


@pytest.fixture
def evaluate(tmp_path):
    """Evaluate what one release ships, against another in the field."""

    def run(candidate, parent, hard, **parameters):
        task = task_of("digits")
        files = {
            artefact_name(tier, p): candidate.files[f"{tier.name}.{tier.suffix}"]
            for tier in TIERS
            for p in ("float", "int8")
        }
        inputs = {Kind.ARTEFACTS: files, Kind.FIELD: field_tree(PublishedRelease(parent.spec, parent.files))}
        work = Work(task, TaskOrigin("", {}, tmp_path), task.prepare(None), inputs, 0, 1, tmp_path, hard=hard)
        return evaluate_model(work, EvaluateParameters(device=LAX, gateway=LAX, **parameters))

    return run


def test_release_that_is_worse_on_hard_samples_is_refused(evaluate, digits, retrained, unseen):
    """As good as the field's on the common rows, and lost on those that made trouble: the old trouble again."""
    hard = unseen.take(slice(200))
    with pytest.raises(RefusedError, match=r"device: metric 0\.\d+ on 200 hard samples, parent 0\.9") as error:
        evaluate(digits, retrained, hard)
    report = error.value.figures["tiers"]["device"]
    assert report["metric_hard"] + 0.2 < report["metric_hard_parent"]
    assert evaluate(digits, retrained, hard, max_drop_on_hard=1.0).figures["tiers"]["device"]["hard_rows"] == 200
    better = evaluate(retrained, digits, hard).figures["tiers"]["gateway"]
    assert better["metric_hard"] > better["metric_hard_parent"] + 0.2


@pytest.mark.parametrize("count", [0, 5])
def test_few_hard_samples_decide_nothing(evaluate, digits, retrained, unseen, count):
    """A handful does not tell two models apart; the report says how many there were."""
    hard = unseen.take(slice(count)) if count else None
    report = evaluate(digits, retrained, hard).figures["tiers"]["device"]
    assert (report["hard_rows"], report["metric_hard"]) == (count, None)


def test_file_overrides_the_limits_that_it_names():
    """The others stay the task's."""
    limits = GateLimits(min_metric=0.9, max_drop_from_float=0.01, max_drop_from_parent=0.02)
    assert with_overrides(limits, TierLimits()) == limits
    changed = with_overrides(limits, TierLimits(min_metric=0.5, latency_rows=8))
    assert (changed.min_metric, changed.latency_rows, changed.max_drop_from_float) == (0.5, 8, 0.01)


@given(trusted=st.integers(0, 60), taught=st.integers(0, 60), seed=st.integers(0, 9))
def test_teachers_words_train_and_never_judge(trusted, taught, seed):
    """What people labelled is dealt to both sides as ever; what a teacher labelled never judges."""
    rng = np.random.default_rng(seed)

    def some(count):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        return LabelledSamples(x, np.zeros(count, np.int64)) if count else None

    people, teacher = some(trusted), some(taught)
    samples = read_samples(samples_tree(FieldSamples(trusted=people, taught=teacher)))
    everything = samples.labelled()
    if everything is None:
        assert (trusted, taught) == (0, 0)
        return
    assert len(everything) == trusted + taught
    seen, held = split_extra(everything)
    alone = split_extra(people)[1].x if people is not None else np.zeros((0, 3), np.float32)
    assert np.array_equal(held.x, alone)
    assert len(seen) + len(held) <= trusted + taught
