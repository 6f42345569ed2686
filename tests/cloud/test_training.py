from copy import copy
from functools import partial
from itertools import count

import pytest
import torch

from cloud.compute import Device, Precision
from cloud.hardware import CPU, Hardware, choose_hardware
from cloud.tasks import load_task
from cloud.tasks.base import TrainingPlan
from cloud.train_job import Job, run_job
from cloud.training import train
from shoal.errors import ConfigError, ModelError
from shoal.scoring import scale
from shoal.v1 import release_pb2 as pb


@pytest.fixture(scope="module")
def data(brief_task):
    return brief_task.prepare(None)


def run(task, data, path, *, seed=0, report=lambda _: None):
    # With a clock that stands still a checkpoint costs nothing, and every epoch has one.
    module = train(
        task, pb.TIER_DEVICE, data, seed=seed, checkpoint=path / "run.ckpt", report=report, clock=lambda: 0.0
    )
    return module.state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def weights(brief_task, data, tmp_path_factory):
    return run(brief_task, data, tmp_path_factory.mktemp("whole"))


def test_seed_decides_the_weights(brief_task, data, weights, tmp_path):
    """The same seed gives the same model, another seed another, whatever the global generator holds."""
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert same(weights, run(brief_task, data, tmp_path))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not same(weights, run(brief_task, data, tmp_path, seed=1))


def test_killed_run_resumes_to_the_same_weights(brief_task, data, weights, tmp_path):
    """A kill after the second epoch costs nothing but the time since the last checkpoint."""

    def die(line):
        if "epoch=2/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(brief_task, data, tmp_path, report=die)
    lines = []
    resumed = run(brief_task, data, tmp_path, report=lines.append)
    assert [line.split("epoch=")[1].split()[0] for line in lines] == ["3/4", "4/4"]
    assert same(weights, resumed)


@pytest.mark.parametrize("stale", ["other seed", "other data", "other start", "torn"])
def test_checkpoint_of_another_run_is_ignored(brief_task, data, weights, tmp_path, stale):
    """Only a checkpoint of this very run is used; a torn file counts as none."""
    if stale == "other seed":
        run(brief_task, data, tmp_path, seed=1)
    elif stale == "other data":
        run(brief_task, brief_task.prepare(data.holdout), tmp_path)
    elif stale == "other start":
        train(
            brief_task,
            pb.TIER_DEVICE,
            data,
            seed=0,
            checkpoint=tmp_path / "run.ckpt",
            start=brief_task.build_model(pb.TIER_DEVICE),
        )
    else:
        run(brief_task, data, tmp_path)
        path = tmp_path / "run.ckpt"
        path.write_bytes(path.read_bytes()[:-500])
    assert same(weights, run(brief_task, data, tmp_path))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_loss_falls_and_threads_are_given_back(brief_task, data, tmp_path):
    """Training learns, one line an epoch, on one thread unless told, and leaves torch's setting as it was."""
    lines, threads = [], set()

    def report(line):
        lines.append(line)
        threads.add(torch.get_num_threads())

    run(brief_task, data, tmp_path, report=report)
    losses = [float(line.split("loss=")[1]) for line in lines]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert threads == {1}
    assert torch.get_num_threads() == 2


def test_killed_in_the_middle_of_an_epoch_it_resumes_to_the_same_weights(brief_task, data, weights, tmp_path):
    """Checkpoints come by the clock too; whatever the step, what follows is what would have followed."""
    now, steps = [0.0], count(1)

    def die(*batch):
        # Nine steps make an epoch, and after the third of the third epoch the clock leaps.
        step = next(steps)
        if step == 21:
            now[0] += 20
        if step == 23:
            raise KeyboardInterrupt
        return type(brief_task).augment(brief_task, *batch)

    dying = copy(brief_task)
    dying.augment = die
    call = partial(train, tier=pb.TIER_DEVICE, data=data, seed=0, checkpoint=tmp_path / "run.ckpt")
    with pytest.raises(KeyboardInterrupt):
        call(dying, clock=lambda: now[0])
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert (state["epoch"], len(state["losses"])) == (2, 3)
    assert same(weights, call(brief_task).state_dict())


def test_checkpoints_take_a_twentieth_of_the_time_at_most(brief_task, data, tmp_path, monkeypatch):
    """Those of a large network take longer than an epoch: then not every epoch has one, but the first."""
    now, saved = [0.0], []

    def save(run, path):
        now[0] += 1.0
        saved.append(run.epoch)

    monkeypatch.setattr("cloud.training._Run.save", save)
    plan = TrainingPlan(steps=9 * 50, batch_rows=64, learning_rate=1e-3)

    def one_second(*_):
        now[0] += 1.0

    train(
        brief_task,
        pb.TIER_DEVICE,
        data,
        seed=0,
        checkpoint=tmp_path / "c",
        plan=plan,
        clock=lambda: now[0],
        on_epoch=one_second,
    )
    assert saved == [1, 20, 40]


def test_mixed_precision_learns_too(brief_task, data, tmp_path):
    """In bfloat16 with channels last, as on a GPU; other weights than in float32, and about as good."""
    losses = {}
    for mixed in (False, True):
        module = train(
            brief_task,
            pb.TIER_GATEWAY,
            data,
            seed=0,
            checkpoint=tmp_path / f"{mixed}.ckpt",
            hardware=Hardware("cpu", mixed=mixed),
            on_epoch=lambda _, __, loss, mixed=mixed: losses.update({mixed: loss}),
        )
        assert next(module.parameters()).dtype == torch.float32
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


def test_precision_follows_the_device():
    """Without a GPU, auto is the CPU in float32, and asking for one is an error of the operator."""
    assert choose_hardware(Device.AUTO, Precision.AUTO) == CPU
    assert choose_hardware(Device.CPU, Precision.BFLOAT16) == Hardware("cpu", mixed=True)
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        choose_hardware(Device.CUDA, Precision.AUTO)


def job_of(folder, **changes):
    plan = TrainingPlan(steps=60, batch_rows=64, learning_rate=4e-3)
    told = {"task": "vision", "model": "digits", "parameters": {"data": "digits"}, "base": str(folder)}
    told |= {"tier": pb.TIER_DEVICE, "seed": 0, "threads": 1, "device": Device.CPU, "precision": Precision.AUTO}
    return Job(**(told | {"plan": plan} | changes))


def test_two_processes_train_one_model(tmp_path):
    """By torchrun, each on a part of every batch: one module comes of it, as good as that of one process alone."""
    job = job_of(tmp_path)
    task = load_task(job.task, job.model, job.parameters, tmp_path)
    data = task.prepare(None)
    epochs = list(run_job(tmp_path, job, data, processes=2))
    assert [epoch for epoch, last, _ in epochs] == list(range(1, epochs[0][1] + 1))
    together = torch.load(tmp_path / "module.pt", weights_only=False)
    alone = train(task, pb.TIER_DEVICE, data, seed=0, checkpoint=tmp_path / "alone.ckpt", plan=job.plan)
    rows, labels = torch.from_numpy(scale(data.holdout.x, data.schema())), torch.from_numpy(data.holdout.y)
    shares = [float((module(rows).argmax(1) == labels).float().mean()) for module in (together, alone)]
    assert shares[0] == pytest.approx(shares[1], abs=0.08)
    # Nothing is left to train.
    assert list(run_job(tmp_path, job, data, processes=2)) == []


def test_process_that_fails_is_an_error(tmp_path, data):
    """The others are ended; the message says how many there were."""
    with pytest.raises(ModelError, match="digits in 2 processes: one ended with status"):
        list(run_job(tmp_path, job_of(tmp_path, task="no such task"), data, processes=2))


def test_loss_that_is_not_finite_is_refused(brief_task, data, tmp_path, monkeypatch):
    """A diverged model never reaches the gate."""
    monkeypatch.setattr(type(brief_task), "loss", lambda _, outputs, *__: outputs.sum() * float("nan"))
    with pytest.raises(ModelError, match="loss nan in epoch 1"):
        run(brief_task, data, tmp_path)
