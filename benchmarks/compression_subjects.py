"""The four networks of `make bench-compression`: trained, pruned and with the rows on which they are judged."""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cloud.models.layers import fold_for_export
from cloud.models.resnet import resnet8, resnet18
from cloud.prune import PruningPlan, prune_and_tune, prune_weights
from cloud.quantize import calibration_rows
from cloud.tasks.base import GateLimits, LabelledSamples, Task, TrainingData, TrainingPlan
from cloud.tasks.datasets import SHUTTLE_STREAM, digits_images, digits_stream, shuttle_rows
from cloud.tasks.sensor import SensorTask
from cloud.tasks.vision import VisionTask
from cloud.training import train
from shoal.scoring import scale, score_rows
from shoal.v1 import release_pb2 as pb

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "image_cifar10_jpeg"
_TIER = pb.TIER_GATEWAY
_CALIBRATION_ROWS = 256
_RATIO = 0.5
_ZEROED = 0.3
_ENLARGED = 4
_SIDE = 224
_PHOTOS = 3000
_PHOTO_CALIBRATION = 32
_PHOTO_TEST = 160
_PIXEL_MEAN, _PIXEL_STD = 120.0, 60.0
# What int8 may cost of a metric.
_MAX_DROP = 0.005
_DIGITS: Mapping[str, object] = MappingProxyType({"data": "digits"})

# Of outputs (n, ...) on the test rows with these numbers.
Metric = Callable[[NDArray[np.float32], NDArray[np.int64]], float]


@dataclass(frozen=True, slots=True)
class Subject:
    """One network with everything that is measured of it.

    Attributes:
        modules: float, ready for export, by variant: `float`, `pruned`, and `zeroed` for one of them.
        calibration, search, rows: scaled; for int8's ranges, for mixed precision's score, and for judging.
        metric_name: what the metrics are.
        metrics: of every variant on `rows`; `float` is also what `int8` uses, and `pruned` what `pruned_int8` uses.
        search_metric: of outputs on `search`; None where no row has a label.
        limits: what int8 may cost.
        resamples: of the metric's interval.
    """

    name: str
    shape: tuple[int, ...]
    modules: Mapping[str, nn.Module]
    calibration: NDArray[np.float32]
    rows: NDArray[np.float32]
    metric_name: str
    metrics: Mapping[str, Metric]
    limits: GateLimits
    search: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    search_metric: Metric | None = None
    resamples: int = 1000


class LargeDigitsTask(VisionTask):
    """The digits, every pixel repeated to 4x4, so that a ResNet-8 costs what it does on the 32x32 it was made for."""

    def __init__(self) -> None:
        super().__init__("resnet8", _DIGITS, Path())
        self.shape = (8 * _ENLARGED, 8 * _ENLARGED, 1)

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        data = super().prepare(extra)
        return TrainingData(_enlarge(data.train), _enlarge(data.holdout), data.mean, data.std)

    def build_model(self, tier: pb.Tier) -> nn.Module:
        del tier
        return resnet8(channels=1, classes=self.classes)


class PhotosTask(VisionTask):
    """Photographs of ten classes at 64x64, on which a ResNet-18 takes minutes to train; those that judge it left out."""

    def __init__(self) -> None:
        super().__init__("resnet18", _DIGITS, Path())
        self.shape = (64, 64, 3)

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        del extra
        photos = _photos(self.shape[0], _PHOTOS)
        held = _PHOTO_CALIBRATION + _PHOTO_TEST
        scaling = np.full(3, _PIXEL_MEAN, np.float32), np.full(3, _PIXEL_STD, np.float32)
        return TrainingData(photos.take(slice(held, None)), photos.take(slice(held)), *scaling)

    def build_model(self, tier: pb.Tier) -> nn.Module:
        del tier
        return resnet18(channels=3, classes=self.classes)

    def augment(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mirror every other picture."""
        is_mirrored = torch.rand(len(rows), generator=generator).to(rows.device) < 0.5
        return torch.where(is_mirrored[:, None, None, None], rows.flip(2), rows)


def _enlarge(samples: LabelledSamples) -> LabelledSamples:
    return LabelledSamples(samples.x.repeat(_ENLARGED, axis=1).repeat(_ENLARGED, axis=2), samples.y)


def autoencoder(seed: int, threads: int, share: float) -> Subject:
    """The gateway's of the shuttle task, judged on every fourth reading of the fleet's stream."""
    task = SensorTask("autoencoder", {"data": "shuttle"}, Path())
    plan = task.plans[_TIER]
    tuning = TrainingPlan(plan.steps, plan.batch_rows, plan.learning_rate / 2)
    test = shuttle_rows().take(SHUTTLE_STREAM).take(slice(None, None, 4))
    return _trained("autoencoder", task, test, plan, tuning, (seed, threads, share), resamples=300)


def cnn(seed: int, threads: int, share: float) -> Subject:
    """The gateway's of the digits task, judged on the 1,097 images of the fleet's stream."""
    task = VisionTask("cnn", _DIGITS, Path())
    plan, tuning = task.plans[_TIER], TrainingPlan(steps=1000, batch_rows=64, learning_rate=4e-3)
    test = digits_images().take(digits_stream())
    return _trained("cnn", task, test, plan, tuning, (seed, threads, share), zeroed=True)


def small_resnet(seed: int, threads: int, share: float) -> Subject:
    """ResNet-8 on enlarged digits, judged on the same images as the CNN."""
    plan = TrainingPlan(steps=260, batch_rows=64, learning_rate=4e-3)
    tuning = TrainingPlan(steps=180, batch_rows=64, learning_rate=2e-3)
    test = _enlarge(digits_images().take(digits_stream()))
    return _trained("resnet8", LargeDigitsTask(), test, plan, tuning, (seed, threads, share))


def _trained(
    name: str,
    task: Task,
    test: LabelledSamples,
    plan: TrainingPlan,
    tuning: TrainingPlan,
    effort: tuple[int, int, float],
    *,
    zeroed: bool = False,
    resamples: int = 1000,
) -> Subject:
    seed = effort[0]
    data = task.prepare(None)
    modules = _train_and_prune(task, data, plan, tuning, effort)
    if zeroed:
        modules["zeroed"] = prune_weights(modules["float"], _ZEROED)
    rows, search = scale(test.x, data.schema()), scale(data.holdout.x, data.schema())
    metric = _metric(task, rows, test.y)
    limits = GateLimits(task.limits[_TIER].min_metric, max_drop_from_float=_MAX_DROP, max_drop_from_parent=1.0)
    return Subject(
        name,
        task.shape,
        {variant: fold_for_export(each) for variant, each in modules.items()},
        calibration_rows(scale(data.train.x, data.schema()), _CALIBRATION_ROWS, seed),
        rows,
        task.metric_name,
        dict.fromkeys(("float", "pruned", "zeroed"), metric),
        limits,
        search,
        _metric(task, search, data.holdout.y),
        resamples,
    )


def _train_and_prune(
    task: Task, data: TrainingData, plan: TrainingPlan, tuning: TrainingPlan, effort: tuple[int, int, float]
) -> dict[str, nn.Module]:
    seed, threads, share = effort
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.ckpt"
        module = train(task, _TIER, data, seed=seed, checkpoint=path, plan=_brief(plan, share), threads=threads)
        pruning = PruningPlan(_RATIO, _brief(tuning, share))
        pruned = prune_and_tune(module, pruning, task, _TIER, data, seed=seed, checkpoint=path, threads=threads)
    return {"float": module, "pruned": pruned}


def _brief(plan: TrainingPlan, share: float) -> TrainingPlan:
    return TrainingPlan(max(1, round(plan.steps * share)), plan.batch_rows, plan.learning_rate, plan.weight_decay)


def _metric(task: Task, rows: NDArray[np.float32], labels: NDArray[np.int64]) -> Metric:
    def metric(outputs: NDArray[np.float32], drawn: NDArray[np.int64]) -> float:
        return task.metric(score_rows(task.score, rows[drawn], outputs[drawn]), labels[drawn])

    return metric


def large_resnet(seed: int, threads: int, share: float) -> Subject:
    """ResNet-18, briefly trained on small photographs; judged at 224x224 by agreement with its float self.

    Too few photographs to learn them well, so accuracy would say little. With random weights agreement says little
    either: their answers to all pictures are nearly the same, and int8's error is as large as what tells them apart.
    """
    task, sized = PhotosTask(), _photos(_SIDE, _PHOTO_CALIBRATION + max(8, round(_PHOTO_TEST * share)))
    scaled = ((sized.x - _PIXEL_MEAN) / _PIXEL_STD).astype(np.float32)
    calibration, rows = scaled[:_PHOTO_CALIBRATION], scaled[_PHOTO_CALIBRATION:]
    data = task.prepare(None)
    plan = TrainingPlan(steps=200, batch_rows=64, learning_rate=3e-3)
    tuning = TrainingPlan(steps=120, batch_rows=64, learning_rate=1.5e-3)
    modules = _train_and_prune(task, data, plan, tuning, (seed, threads, share))
    folded = {variant: fold_for_export(_settle(module, calibration)) for variant, module in modules.items()}
    return Subject(
        "resnet18",
        (_SIDE, _SIDE, 3),
        folded,
        calibration,
        rows,
        "agreement",
        {variant: _agreement(each, rows) for variant, each in folded.items()},
        GateLimits(min_metric=0.0, max_drop_from_float=0.02, max_drop_from_parent=1.0),
    )


def _photos(side: int, count: int) -> LabelledSamples:
    """Return CIFAR-10 photographs of all ten classes in mixed order; smooth noise by brightness where there are none."""
    rng = np.random.default_rng(0)
    paths = sorted(PHOTOS.rglob("*.jpg"))
    if paths:
        chosen = [paths[index] for index in rng.permutation(len(paths))[:count]]
        pictures = [Image.open(path).convert("RGB") for path in chosen]
        names = sorted({path.parent.name for path in paths})
        labels = np.array([names.index(path.parent.name) for path in chosen])
    else:
        print(f"photographs: {PHOTOS} is not there, smooth noise instead", flush=True)
        noise = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        pictures = [Image.fromarray(each) for each in noise]
        labels = noise.mean(axis=(1, 2, 3)).argsort().argsort() * PhotosTask.classes // count
    pixels = np.stack([np.asarray(each.resize((side, side), Image.Resampling.BILINEAR)) for each in pictures])
    return LabelledSamples(pixels.astype(np.float32), labels.astype(np.int64))


def _settle(module: nn.Module, rows: NDArray[np.float32]) -> nn.Module:
    """Fit batch norms to rows of the size that is judged, which is not the one that was trained on."""
    settled = copy.deepcopy(module)
    with torch.no_grad():
        for part in settled.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
                part.momentum = None
        settled.train()(torch.from_numpy(rows))
    return settled.eval()


def _agreement(module: nn.Module, rows: NDArray[np.float32]) -> Metric:
    with torch.no_grad():
        exact = torch.cat([module(batch) for batch in torch.from_numpy(rows).split(16)]).argmax(dim=1).numpy()

    def metric(outputs: NDArray[np.float32], drawn: NDArray[np.int64]) -> float:
        return float((outputs[drawn].argmax(axis=1) == exact[drawn]).mean())

    return metric


MAKERS: Mapping[str, Callable[[int, int, float], Subject]] = {
    "autoencoder": autoencoder,
    "cnn": cnn,
    "resnet8": small_resnet,
    "resnet18": large_resnet,
}
NAMES: Sequence[str] = tuple(MAKERS)
