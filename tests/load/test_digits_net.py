from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimdown.load import DataSource, ModelSource, check_model, load_model, load_task

REFERENCE = ModelSource("slimdown.load.digits_net:digits_net")


def test_fits_the_digits() -> None:
    model = load_model(REFERENCE)
    check_model(model, load_task(DataSource(kind="digits")))
    assert 0.2e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.5e6
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(32 <= width <= 128 and width % 16 == 0 for width in widths)


def test_takes_other_numbers_of_classes() -> None:
    model = load_model(ModelSource(REFERENCE.reference, options={"num_classes": 3}))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.slow
def test_learns_the_digits() -> None:
    task, model = load_task(DataSource(kind="digits")), load_model(REFERENCE).train()
    num_epochs = 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=num_epochs * len(task.train_batches(0))
    )
    for epoch in range(num_epochs):
        for batch in task.train_batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            schedule.step()
    assert task.score(model).value >= 97
