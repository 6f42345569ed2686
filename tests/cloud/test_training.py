import pytest
import torch

from cloud.training import train
from shoal.errors import ModelError
from shoal.v1 import release_pb2 as pb


@pytest.fixture(scope="module")
def data(brief_task):
    return brief_task.prepare(None)


def run(task, data, path, *, seed=0, report=lambda _: None):
    return train(task, pb.TIER_DEVICE, data, seed=seed, checkpoint=path / "run.ckpt", report=report).state_dict()


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


def test_loss_that_is_not_finite_is_refused(brief_task, data, tmp_path):
    """A diverged model never reaches the gate."""

    class Diverging(type(brief_task)):
        def loss(self, outputs, rows, labels):
            return super().loss(outputs, rows, labels) * float("nan")

    with pytest.raises(ModelError, match="loss nan in epoch 1"):
        run(Diverging(), data, tmp_path)
