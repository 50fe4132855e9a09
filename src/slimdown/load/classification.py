"""Classification: one label an image, judged by top-1 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.core import Batch, Batches, Predict, Preprocess, Score, batch_device, logits_of
from slimdown.errors import BadInput
from slimdown.load.batches import ImageBatches, Samples, in_order, shuffled

SCORE_BATCH_SIZE = 64
"""What every runtime takes: exported graphs allow batches of 1 to 64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassificationTask:
    """A `Task` of images and class labels; `load_task` makes it from a `DataSource`.

    Training batches are shuffled and not augmented. Calibration images are training images and
    never test images.
    """

    train: Samples | None
    """None where there are only test images."""
    validation: Samples | None
    """Training images that are held out; None where none are, or where they have no labels."""
    calibration: Samples
    test: Samples | None
    """None where no image has a label: nothing is judged."""
    labels: tuple[str, ...]
    """The classes; none are known where nothing is judged."""
    preprocess: Preprocess
    batch_size: int
    flip: bool
    """Whether training may mirror the images."""
    calibration_hash: str
    """Of the choice of calibration images."""
    fingerprint: str
    """Changes whenever the images, labels, preprocessing or split do."""
    notes: tuple[str, ...] = ()
    """What the user should know about the data; `load_task` also warns of each."""

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def example_input(self) -> Tensor:
        """The first test image that can be read, (1, C, H, W) float32; one to calibrate with where
        there are no test images.
        """
        samples = self.calibration if self.test is None else self.test
        one_by_one = in_order(samples, batch_size=1)
        return next(iter(ImageBatches(samples, one_by_one, self.preprocess))).inputs

    def train_batches(self, epoch: int) -> Batches:
        """One epoch of shuffled batches, in an order of torch's seed and of `epoch` alone.

        Raises BadInput where there are no training images.
        """
        if self.train is None:
            raise BadInput(
                "this step trains, and the data have no training images: give data.train, or "
                "leave the step out"
            )
        # The seed that was set and not the generator's state: a resumed run shuffles the same.
        seed = (torch.initial_seed() + 1_000_003 * epoch) % 2**63
        return ImageBatches(
            self.train, shuffled(self.train, self.batch_size, seed=seed), self.preprocess
        )

    def calibration_batches(self) -> Iterable[Tensor]:
        """The calibration images, (N, C, H, W), in a fixed order that mixes the classes."""
        order = in_order(self.calibration, SCORE_BATCH_SIZE)
        return [batch.inputs for batch in ImageBatches(self.calibration, order, self.preprocess)]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross-entropy of logits (N, K) and labels (N,), or class probabilities (N, K)."""
        return F.cross_entropy(as_logits(outputs), batch.targets)

    def score(self, predict: Predict) -> Score | None:
        """Top-1 accuracy on the test images; None where there are none."""
        return None if self.test is None else self._score(predict, self.test)

    @property
    def validate(self) -> Callable[[Predict], Score] | None:
        """Top-1 accuracy on the held-out training images; None where there are none."""
        held_out = self.validation
        return None if held_out is None else lambda predict: self._score(predict, held_out)

    def _score(self, predict: Predict, samples: Samples) -> Score:
        order = in_order(samples, SCORE_BATCH_SIZE)
        return score_top1(predict, ImageBatches(samples, order, self.preprocess))


def score_top1(predict: Predict, batches: Iterable[Batch]) -> Score:
    """Percent of the labeled images whose highest logit is their label's; NaN is never right."""
    predictions, targets = [], []
    with judging(predict) as device:
        for batch in batches:
            logits = as_logits(predict(batch.inputs.to(device))).cpu()
            failed = logits.isnan().any(dim=1)
            predictions.append(logits.argmax(dim=1).masked_fill(failed, -1))
            targets.append(batch.targets)
    predicted, expected = torch.cat(predictions), torch.cat(targets)
    return Score.from_outcomes("top1", predicted == expected, predictions=predicted)


def as_logits(outputs: Any) -> Tensor:
    """The logits among a classifier's outputs, checked to be (N, K)."""
    logits = logits_of(outputs)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise BadInput(
        "a classifier's output, or its field .logits, must be one tensor of logits, "
        f"(N, num_classes), got {found}; wrap the model so that it returns only those"
    )


@contextmanager
def judging(predict: Predict) -> Iterator[torch.device]:
    """Put a module in eval mode for a while, without gradients; lends the device of its inputs."""
    if not isinstance(predict, nn.Module):
        yield torch.device("cpu")
        return
    modes = [(module, module.training) for module in predict.modules()]
    if any(training for _, training in modes):
        predict.eval()
    try:
        with torch.no_grad():
            yield batch_device(predict)
    finally:
        for module, training in modes:
            module.training = training
