"""The images that evidence is gathered from, and the loss that a task judges them by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slimdown.capture import Analysis
from slimdown.core import Batch, Context, Progress, Task, batch_device
from slimdown.errors import Interrupted, RecipeError
from slimdown.images import as_input, take_images
from slimdown.prune.importance.gates import Loss
from slimdown.prune.running import images_at_once

DERIVATIVE_MACS = 250_000_000_000
"""Multiply-accumulates to spend on one run forward where derivatives are taken, which cost three
times as much: they settle with fewer images than statistics do. A ResNet-50 gets 64 images."""
MIN_DERIVATIVE_IMAGES = 64


@dataclass(frozen=True)
class Lookout:
    """A task's images, on the graph's device and in parts that fit into memory."""

    analysis: Analysis
    task: Task
    num_images: int
    context: Context

    def images(self, label: str, *, derivatives: bool = False) -> Iterator[Tensor]:
        """The calibration images; with `derivatives`, as many as `unlabeled` has."""
        count = self._num_derivatives() if derivatives else self.num_images
        batches = take_images(self.task.calibration_batches(), count)
        total, done = sum(map(len, batches)), 0
        if not total:
            raise RecipeError(
                "prune.importance looks at images, and the task has none to calibrate on: give "
                "some, or choose a criterion that looks at weights alone, such as 'l2'"
            )
        for batch in batches:
            for part in torch.split(batch, images_at_once(self.analysis)):
                self._show(f"prune: {label}", done, total)
                yield as_input(part, self.analysis.graph_module)
                done += len(part)

    def unlabeled(self) -> Iterator[Batch]:
        """The calibration images that derivatives are taken of."""
        return map(Batch, self.images("differentiate", derivatives=True))

    def labeled(self) -> Iterator[Batch]:
        """The training images that derivatives are taken of."""
        total, done = self._num_derivatives(), 0
        for batch in self.task.train_batches(0):
            for part in _parts(batch, images_at_once(self.analysis), limit=total - done):
                self._show("prune: differentiate", done, total)
                inputs = as_input(part.inputs, self.analysis.graph_module)
                yield Batch(inputs, self._to_device(part.targets))
                done += len(part.inputs)
            if done >= total:
                return

    def has_labels(self) -> bool:
        first = next(iter(self.task.train_batches(0)), None)
        return first is not None and first.targets is not None

    def _show(self, label: str, done: int, total: int) -> None:
        self.context.show(Progress(label, done, total))
        if self.context.stop_requested():
            raise Interrupted("stopped while looking at images; the next run begins this step anew")

    def _to_device(self, targets: Any) -> Any:
        device = batch_device(self.analysis.graph_module)
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, targets)

    def _num_derivatives(self) -> int:
        affordable = DERIVATIVE_MACS // max(1, self.analysis.count_macs({}))
        return min(self.num_images, max(MIN_DERIVATIVE_IMAGES, affordable))


def _parts(batch: Batch, size: int, *, limit: int) -> Iterator[Batch]:
    """The first `limit` samples of a batch in smaller ones.

    All of it at once where its targets are no tensor, so that nobody knows whose they are.
    """
    if not isinstance(batch.targets, Tensor) or len(batch.targets) != len(batch.inputs):
        yield batch
        return
    parts = (torch.split(each[:limit], size) for each in batch)
    for inputs, targets in zip(*parts, strict=True):
        yield Batch(inputs, targets)


def task_loss(task: Task) -> Loss:
    """The task's loss, summed over the samples: it is taken to be their mean."""

    def loss(outputs: Any, batch: Batch) -> Tensor:
        try:
            return task.loss(outputs, batch) * len(batch.inputs)
        except Exception as error:  # the user's code, given the outputs in eval mode
            raise RecipeError(
                "prune.importance asks for the task's loss, which fails on what the network gives "
                f"in eval mode ({type(error).__name__}: {error}); choose 'hessian', which asks "
                "for no loss"
            ) from error

    return loss
