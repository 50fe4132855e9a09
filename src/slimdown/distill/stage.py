"""The stage that trains a smaller or quantized model to answer as the original does."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from slimdown.core import Context, Json, StageResult, Target, Task
from slimdown.distill.loop import Trained, train
from slimdown.distill.settings import TrainSettings
from slimdown.distill.zeros import share_of_sparse


@dataclass(frozen=True, kw_only=True)
class Distill(TrainSettings):
    """Train the model on α · labels + (1 − α) · the original's answers; its structure stays."""

    @property
    def kind(self) -> str:
        return "distill"

    def for_target(self, target: Target) -> Distill:
        """Training is the same for every target."""
        return self

    def __call__(self, model: nn.Module, task: Task, context: Context = Context()) -> StageResult:
        """Return a trained copy of `model`. Raises what `train` raises."""
        trained = train(model, task, self, context=context)
        return StageResult(model=trained.model, facts=self._tell(trained))

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """A copy of `model`: training changes weights only."""
        return copy.deepcopy(model)

    def _tell(self, trained: Trained) -> Json:
        return {
            "history": [dict(record) for record in trained.history],
            "alpha": self.alpha,
            "temperature": self.temperature,
            "seconds_per_epoch": trained.seconds / self.epochs,
            "teacher": "none" if self.alpha == 1.0 else "original",
            "num_steps": trained.num_steps,
            "zeros": share_of_sparse(trained.model),
        }
