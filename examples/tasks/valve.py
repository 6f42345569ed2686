"""A task of one's own: is a valve stuck? Three channels in, two classes out; classified by a tiny network."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from cloud.tasks.base import GateLimits, LabelledSamples, ShareRule, TrainingData, TrainingPlan, join, split_extra
from shoal.scoring import Scores
from shoal.v1 import release_pb2 as pb

PLAN = TrainingPlan(steps=300, batch_rows=64, learning_rate=1e-2)
LIMITS = GateLimits(min_metric=0.9, max_drop_from_float=0.02, max_drop_from_parent=0.02)


class Valve:
    """Pressure, flow and current: (3,). Class 1 is stuck."""

    shape, classes = (3,), 2
    score, metric_name = pb.SCORE_KIND_UNCERTAINTY, "accuracy"
    threshold_rule = ShareRule(device=0.2, gateway=0.1)
    plans = {pb.TIER_DEVICE: PLAN, pb.TIER_GATEWAY: PLAN}
    limits = {pb.TIER_DEVICE: LIMITS, pb.TIER_GATEWAY: LIMITS}

    def __init__(self, model: str, parameters: dict[str, float], base: Path) -> None:
        self.model, self.noise = model, parameters.get("noise", 0.3)

    def prepare(self, extra: LabelledSamples | None) -> TrainingData:
        rng = np.random.default_rng(0)
        stuck = rng.integers(2, size=2000)
        flow = np.where(stuck, 0.2, 1.0) + rng.normal(0, self.noise, 2000)
        rows = np.stack([2 - flow, flow, 1 + stuck + rng.normal(0, self.noise, 2000)], axis=1).astype(np.float32)
        train, holdout = split_extra(LabelledSamples(rows, stuck))
        if extra is not None:
            seen, held = split_extra(extra)
            train, holdout = join(train, seen), join(holdout, held)
        return TrainingData(train, holdout, train.x.mean(axis=0), train.x.std(axis=0))

    def build_model(self, tier: pb.Tier) -> nn.Module:
        width = 8 if tier == pb.TIER_DEVICE else 64
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    def augment(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return rows + 0.05 * torch.randn(rows.shape, generator=generator).to(rows.device)

    def loss(self, outputs: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, labels, label_smoothing=0.05)

    def metric(self, scores: Scores, labels: np.ndarray) -> float:
        return float((scores.labels == labels).mean())
