from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cloud.tasks import datasets, load_task
from cloud.tasks.base import LabelledSamples, split_extra
from cloud.tasks.datasets import (
    SHUTTLE_SELECT,
    SHUTTLE_STREAM,
    SHUTTLE_TRAIN,
    digits_images,
    digits_initial,
    digits_stream,
    shuttle_rows,
)
from shoal.errors import ConfigError, ModelError
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb
from tests.cloud.toolchain import task_of


def image_keys(samples):
    return {row.tobytes() for row in samples.x}


def test_digits_are_those_of_scikit_learn():
    """Reading the packed file gives what the public loader gives."""
    bunch = load_digits()
    assert np.array_equal(digits_images().x[..., 0], bunch.images)
    assert np.array_equal(digits_images().y, bunch.target)


def test_shuttle_has_the_published_anomalies():
    """3,511 of 49,097 readings are anomalies, as its authors say."""
    rows = shuttle_rows()
    assert rows.x.shape == (49097, 9)
    assert rows.y.sum() == 3511


@pytest.mark.parametrize(
    ("path", "why"), [("datasets/none.csv.gz", "is missing"), ("datasets/shuttle.csv.gz", "expected")]
)
def test_package_without_the_data_is_a_configuration_error(path, why):
    """Another version of a package may lack the file or hold another table."""
    with pytest.raises(ConfigError, match=why):
        datasets._load_table("river", path, (1, 10), skip_rows=1)


def test_splits_part_the_data_without_overlap():
    """Every row has one role."""
    assert np.array_equal(np.sort(np.concatenate([digits_initial(), digits_stream()])), np.arange(1797))
    assert (SHUTTLE_TRAIN.start, SHUTTLE_STREAM.stop) == (0, 49097)
    assert (SHUTTLE_TRAIN.stop, SHUTTLE_SELECT.stop) == (SHUTTLE_SELECT.start, SHUTTLE_STREAM.start)


def test_shuttle_trains_on_normal_rows_and_selects_on_later_ones():
    """No anomaly and no later row reaches training."""
    data, rows = task_of("shuttle").prepare(None), shuttle_rows()
    assert np.array_equal(data.train.x, rows.x[:9000][rows.y[:9000] == 0])
    assert np.array_equal(data.holdout.x, rows.x[9000:12000])
    assert data.holdout.y.sum() == rows.y[9000:12000].sum() > 0


def test_digits_hold_out_the_last_140():
    """The stream is not in either part."""
    data, images = task_of("digits").prepare(None), digits_images()
    assert np.array_equal(data.train.x, images.x[digits_initial()[:560]])
    assert np.array_equal(data.holdout.x, images.x[digits_initial()[560:]])
    assert data.mean == pytest.approx(data.train.x.mean())


def test_field_samples_outnumber_the_initial_ones_and_their_holdout_stays_out():
    """What came back from the field counts most, and a part of it judges the result."""
    extra = digits_images().take(digits_stream()[:400])
    plain, data = task_of("digits").prepare(None), task_of("digits").prepare(extra)
    seen, held = split_extra(extra)
    assert len(data.train) - len(plain.train) >= 2 * len(plain.train)
    assert image_keys(data.train) == image_keys(plain.train) | image_keys(seen)
    assert image_keys(data.holdout) == image_keys(plain.holdout) | image_keys(held)
    assert not image_keys(seen) & image_keys(held)
    assert 40 < len(held) < 120


def test_side_of_a_field_sample_never_changes():
    """A later release with more samples keeps the holdout of the one before."""
    extra = digits_images().take(digits_stream())
    _, early = split_extra(extra.take(slice(200)))
    _, late = split_extra(extra)
    assert np.array_equal(late.x[: len(early)], early.x)


def test_few_field_samples_are_not_repeated_without_end():
    """Ten labels must not drown five hundred."""
    plain = task_of("digits").prepare(None)
    data = task_of("digits").prepare(digits_images().take(digits_stream()[:10]))
    assert len(plain.train) < len(data.train) <= len(plain.train) + 80


def test_shuttle_learns_only_normal_field_samples():
    """Anomalies from the field judge; they never train an autoencoder."""
    rows = shuttle_rows().take(slice(12000, 13000))
    plain, data = task_of("shuttle").prepare(None), task_of("shuttle").prepare(rows)
    seen, held = split_extra(rows)
    assert image_keys(data.train) == image_keys(plain.train) | image_keys(seen.take(seen.y == 0))
    assert len(data.holdout) == len(plain.holdout) + len(held)


@pytest.mark.parametrize("model", ["digits", "shuttle"])
@pytest.mark.parametrize("fault", ["shape", "value", "label"])
def test_field_samples_that_do_not_fit_are_refused(model, fault):
    """A wrong label or a broken camera keeps the old model."""
    task = task_of(model)
    x, y = np.ones((3, *task.shape), np.float32), np.zeros(3, np.int64)
    if fault == "shape":
        x = x[..., :0]
    elif fault == "value":
        x[1] = np.nan
    else:
        y[2] = 10
    with pytest.raises(ModelError, match="label"):
        task.prepare(LabelledSamples(x, y))


def test_labels_must_match_readings():
    """A mismatch is our own mistake, caught at once."""
    with pytest.raises(ValueError, match="one label for each"):
        LabelledSamples(np.ones((3, 9), np.float32), np.zeros(2, np.int64))


def test_unknown_task_is_named():
    """The operator reads which tasks there are."""
    with pytest.raises(ConfigError, match=r"'visions'.*vision"):
        load_task("visions", "digits", {}, Path())


@pytest.mark.parametrize("model", ["digits", "shuttle"])
def test_gateway_model_is_larger_and_both_answer_in_shape(model):
    """Tiny on the device, larger on the gateway; rows in, outputs that can be scored out."""
    task, sizes = task_of(model), []
    for tier in (pb.TIER_DEVICE, pb.TIER_GATEWAY):
        module = task.build_model(tier)
        sizes.append(sum(weights.numel() for weights in module.parameters()))
        with torch.no_grad():
            assert module(torch.zeros(3, *task.shape)).shape == ((3, 9) if model == "shuttle" else (3, 10))
    assert sizes[0] * 4 < sizes[1]


def test_augmented_digits_stay_close_and_follow_the_generator():
    """An image moves by less than a pixel or so, differently each time, the same for a seed."""
    task = task_of("digits")
    images = torch.from_numpy(digits_images().x[:50])
    first, again, other = (task.augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, images)
    assert (first - images).abs().mean() < images.std() / 2


def test_metrics_of_perfect_and_useless_scores():
    """1 for a perfect ranking or labelling; accuracy without labels is refused."""
    labels = np.array([0, 0, 1, 1])
    ranked = Scores(np.array([0.1, 0.2, 0.8, 0.9], np.float32), None)
    assert task_of("shuttle").metric(ranked, labels) == 1
    assert task_of("shuttle").metric(Scores(-ranked.scores, None), labels) < 0.5
    assert task_of("digits").metric(Scores(ranked.scores, np.array([0, 0, 1, 0])), labels) == 0.75
    with pytest.raises(ModelError, match="labels"):
        task_of("digits").metric(ranked, labels)
