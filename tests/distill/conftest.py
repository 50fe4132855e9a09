"""A task with a few random images, and a context that keeps checkpoints in memory."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.core import Batch, Context, Progress, Score

NUM_CLASSES = 4


@dataclass
class ToyTask:
    """Random 16x16 images in batches drawn from the global generator; labels by brightness."""

    num_batches: int = 4
    batch_size: int = 8
    labeled: bool = True
    images: Tensor = field(init=False)
    targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        num_images = self.num_batches * self.batch_size
        self.images = torch.randn(num_images, 3, 16, 16, generator=generator)
        self.targets = torch.randint(NUM_CLASSES, (num_images,), generator=generator)

    @property
    def example_input(self) -> Tensor:
        return self.images[:1]

    def train_batches(self, epoch: int) -> list[Batch]:
        order = torch.randperm(len(self.images)).split(self.batch_size)
        return [Batch(self.images[i], self.targets[i] if self.labeled else None) for i in order]

    def calibration_batches(self) -> list[Tensor]:
        return [self.images[:8]]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    def score(self, predict: Any) -> Score:
        right = (predict(self.images).argmax(1) == self.targets).double()
        return Score.from_outcomes("top1", right)


@dataclass
class Recorder:
    """What a run shows and saves; stops it after `stop_after` steps."""

    stop_after: int | None = None
    shown: list[Progress] = field(default_factory=list)
    saved: list[bytes] = field(default_factory=list)

    def context(self, original: nn.Module | None = None, *, resume: bytes | None = None) -> Context:
        """A context whose checkpoints go through `torch.load(weights_only=True)`, as on disk."""
        return replace(
            Context(original=original, seed=5),
            show=self.shown.append,
            save_checkpoint=self._save,
            load_checkpoint=lambda: None if resume is None else _load(resume),
            stop_requested=lambda: len(self.shown) == self.stop_after,
        )

    def _save(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.saved.append(buffer.getvalue())


def _load(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


@pytest.fixture
def toy_task() -> ToyTask:
    return ToyTask()


@pytest.fixture
def unlabeled_task() -> ToyTask:
    return ToyTask(labeled=False)


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder
