from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.errors import BadInput
from slimdown.load import ClassificationTask, DataSource, check_model, load_task


@pytest.fixture(scope="module")
def digits() -> ClassificationTask:
    return load_task(DataSource(kind="digits"))


def classifier(num_inputs: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, num_classes))


def test_accepts_a_model_that_fits(digits: ClassificationTask) -> None:
    model = classifier(32 * 32, 10).train()
    check_model(model, digits)
    assert model.training


def test_refuses_another_number_of_classes(digits: ClassificationTask) -> None:
    with pytest.raises(BadInput, match=r"1000 classes .* data have 10 \(0, 1, 2, 3, 4, …\)"):
        check_model(classifier(32 * 32, 1000), digits)


def test_refuses_another_input(digits: ClassificationTask) -> None:
    with pytest.raises(BadInput, match=r"cannot take an input of the data, \(1, 1, 32, 32\)"):
        check_model(nn.Conv2d(3, 8, 3), digits)


def test_refuses_outputs_that_are_not_finite(digits: ClassificationTask) -> None:
    model = classifier(32 * 32, 10)
    with torch.no_grad():
        model[1].bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(BadInput, match="NaN"):
        check_model(model, digits)
