from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimdown.core import Batch, Task
from slimdown.errors import BadInput
from slimdown.load import ClassificationTask, DataSource, load_task
from slimdown.load.classification import as_logits, score_top1


@pytest.fixture
def task(write_npz: Callable[..., Path]) -> ClassificationTask:
    """90 training and 30 test images of three classes."""
    source = DataSource(
        kind="npz",
        train=write_npz("train.npz", 90),
        test=write_npz("test.npz", 30),
        batch_size=16,
        calibration=20,
    )
    return load_task(source)


class Constant(nn.Module):
    """Always predicts class 1; counts how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))
        self.dropout = nn.Dropout()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.weight.expand(len(x), 3)


def test_is_a_task(task: ClassificationTask) -> None:
    assert isinstance(task, Task)
    assert task.example_input.shape == (1, 3, 16, 16)
    assert task.num_classes == 3


def test_epochs_are_shuffled_and_repeatable(task: ClassificationTask) -> None:
    def epoch(number: int) -> Tensor:
        return torch.cat([batch.targets for batch in task.train_batches(number)])

    torch.manual_seed(7)
    first = epoch(0)
    torch.rand(3)  # what else was drawn does not matter
    assert torch.equal(epoch(0), first)
    assert not torch.equal(epoch(1), first)
    torch.manual_seed(8)
    assert not torch.equal(epoch(0), first)
    assert len(first) == 80  # 81 to train on, whole batches of 16
    assert len(task.train_batches(0)) == 5


def test_batches_are_preprocessed(task: ClassificationTask) -> None:
    batch = next(iter(task.train_batches(0)))
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.shape == (16, 3, 16, 16)
    assert batch.targets.dtype == torch.int64
    everything = torch.cat([batch.inputs for batch in task.train_batches(0)])
    assert abs(float(everything.mean())) < 0.6
    assert 1 < float(everything.std()) < 1.6  # uniform noise over ImageNet's std


def test_calibration_images_are_training_images(task: ClassificationTask) -> None:
    batches = list(task.calibration_batches())
    assert sum(len(batch) for batch in batches) == 20
    assert torch.equal(torch.cat(batches), torch.cat(list(task.calibration_batches())))
    assert task.train is not None
    assert set(task.calibration.indices) <= set(task.train.indices)


def test_loss_is_cross_entropy(task: ClassificationTask) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([0, 2, 1, 1])
    loss = task.loss(logits, Batch(torch.zeros(4, 3, 16, 16), targets))
    expected = -torch.log_softmax(logits, 1)[torch.arange(4), targets].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()


def test_score_leaves_a_module_as_it_was(task: ClassificationTask) -> None:
    model = Constant().train()
    model.frozen.eval()
    score = task.score(model)
    assert model.calls == [(False, False)]
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    assert score.metric == "top1"
    assert score.num_samples == 30
    assert score.value == pytest.approx(100 / 3)
    assert score.predictions is not None
    assert score.predictions.tolist() == [1] * 30
    assert score.outcomes is not None
    np.testing.assert_array_equal(score.outcomes, np.arange(30) % 3 == 1)


def test_score_takes_any_predict_and_feeds_it_in_order(task: ClassificationTask) -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.eye(3)[torch.arange(len(x)) % 3]

    assert task.score(predict).value == 100.0
    again: list[Tensor] = seen.copy()
    seen.clear()
    task.score(predict)
    assert torch.equal(torch.cat(seen), torch.cat(again))
    assert max(len(x) for x in seen) <= 64


def test_nan_is_never_right() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [-float("inf"), 0.0]])
    score = score_top1(lambda x: logits, [Batch(torch.zeros(3, 1), torch.tensor([1, 0, 1]))])
    assert score.predictions is not None
    assert score.predictions.tolist() == [1, -1, 1]
    assert score.outcomes is not None
    assert score.outcomes.tolist() == [1, 0, 1]


def test_validates_on_held_out_training_images(task: ClassificationTask) -> None:
    assert task.validate is not None
    assert task.validation is not None
    assert task.validate(Constant()).num_samples == len(task.validation) == 9
    assert task.train is not None
    assert not set(task.validation.indices) & set(task.train.indices)


def test_works_without_labels(write_npz: Callable[..., Path]) -> None:
    source = DataSource(
        kind="npz",
        train=write_npz("train.npz", 90, Y=None),
        test=write_npz("test.npz", 30),
        calibration=20,
    )
    task = load_task(source)
    assert next(iter(task.train_batches(0))).targets is None
    assert task.validate is None
    assert len(task.calibration) == 20


def test_without_training_images_it_scores_but_does_not_train(
    write_npz: Callable[..., Path],
) -> None:
    source = DataSource(
        kind="npz", test=write_npz("test.npz", 30), calibration=9, calibration_from_test=True
    )
    with pytest.warns(UserWarning, match="9 of 30 test images calibrate"):
        task = load_task(source)
    assert task.score(Constant()).num_samples == 21
    with pytest.raises(BadInput, match="no training images"):
        task.train_batches(0)


@pytest.mark.parametrize("outputs", [(torch.zeros(2, 3),), torch.zeros(2, 3, 4, 4), {"out": 1}])
def test_refuses_outputs_that_are_no_logits(outputs: Any) -> None:
    with pytest.raises(BadInput, match=r"one tensor of logits, \(N, num_classes\), got"):
        as_logits(outputs)


def test_takes_the_logits_out_of_a_structured_output() -> None:
    logits = torch.randn(2, 3)
    assert as_logits(SimpleNamespace(logits=logits)) is logits
    assert as_logits(logits) is logits
    with pytest.raises(BadInput, match=r"got \(2, 3, 4\)"):
        as_logits(SimpleNamespace(logits=torch.randn(2, 3, 4)))
