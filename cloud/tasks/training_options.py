"""What a pipeline file may say of one tier's training, whatever the task."""

from typing import Annotated

import msgspec
from msgspec import Meta

from cloud.tasks.base import TrainingPlan

_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]


class TrainingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Takes the place of a plan's figures; what is left out stays."""

    steps: _Count | None = None
    batch_rows: _Count | None = None
    learning_rate: _Positive | None = None
    weight_decay: Annotated[float, Meta(ge=0)] | None = None

    def over(self, plan: TrainingPlan) -> TrainingPlan:
        return TrainingPlan(
            steps=self.steps or plan.steps,
            batch_rows=self.batch_rows or plan.batch_rows,
            learning_rate=self.learning_rate or plan.learning_rate,
            weight_decay=plan.weight_decay if self.weight_decay is None else self.weight_decay,
        )
