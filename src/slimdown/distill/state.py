"""Where a training run stands: everything that decides how it goes on, kept as a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from slimdown.distill.average import clone_tensors, copy_tensors_, tensors_of
from slimdown.distill.randomness import random_state


class EpochRecord(TypedDict):
    """What one epoch came to: averages over its images; None where a term was not in use."""

    epoch: int
    loss: float
    hard: float | None
    soft: float | None
    learning_rate: float
    validation: float | None


@dataclass(kw_only=True)
class TrainState:
    """The model in training, with the position in the run: `step` steps of `epoch` are done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    epoch: int = 0
    step: int = 0
    num_steps: int = 0
    """Of all epochs so far."""
    num_images: int = 0
    """Of this epoch so far, as `sums` and `epoch_seconds` are."""
    sums: dict[str, float] = field(default_factory=dict)
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    learning_rate: float = 0.0
    """Of the last step."""
    history: list[EpochRecord] = field(default_factory=list)
    random: dict[str, Any] | None = None
    """The random state of the checkpoint that was loaded; needed in the middle of an epoch only,
    as each epoch is seeded at its start."""

    def count_step_(self, num_images: int, terms: Mapping[str, Tensor | None]) -> None:
        """Note that a step is done; `terms` are averages over its images."""
        self.step += 1
        self.num_steps += 1
        self.num_images += num_images
        for name, term in terms.items():
            if term is not None:
                self.sums[name] = self.sums.get(name, 0.0) + float(term.detach()) * num_images

    def averages(self) -> dict[str, float]:
        """The loss and its terms, averaged over the images of this epoch so far."""
        return {name: total / self.num_images for name, total in self.sums.items()}

    def finish_epoch_(self, validation: float | None) -> None:
        """Record the epoch and stand at the start of the next one."""
        averages = self.averages()
        self.history.append(
            EpochRecord(
                epoch=self.epoch + 1,
                loss=averages["loss"],
                hard=averages.get("hard"),
                soft=averages.get("soft"),
                learning_rate=self.learning_rate,
                validation=validation,
            )
        )
        self.seconds += self.epoch_seconds
        self.epoch, self.step, self.num_images = self.epoch + 1, 0, 0
        self.epoch_seconds, self.sums = 0.0, {}

    def pack(self) -> dict[str, Any]:
        """Copy all of it into tensors and plain values, which load without running code."""
        plain = {name: copy.deepcopy(getattr(self, name)) for name in _PLAIN}
        return plain | {
            "model": clone_tensors(tensors_of(self.model)),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "average": None if self.average is None else clone_tensors(self.average),
            "random": random_state(),
        }

    def unpack_(self, packed: dict[str, Any]) -> None:
        """Stand where the run stood that `pack` was called on."""
        for name in _PLAIN:
            setattr(self, name, copy.deepcopy(packed[name]))
        copy_tensors_(self.model, packed["model"])
        self.optimizer.load_state_dict(packed["optimizer"])
        if self.average is not None:
            for name, mean in self.average.items():
                mean.copy_(packed["average"][name])
        self.random = packed["random"]


_PLAIN = (
    "epoch",
    "step",
    "num_steps",
    "num_images",
    "sums",
    "epoch_seconds",
    "seconds",
    "learning_rate",
    "history",
)
"""The fields of `TrainState` that are numbers, or lists and dictionaries of numbers."""
