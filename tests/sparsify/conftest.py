"""A task with a few images, and layers of every kind with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def images() -> Tensor:
    """(24, 3, 16, 16), smooth enough that neighboring pixels depend on each other."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(24, 3, 5, 5, generator=generator)
    noise = 0.3 * torch.randn(24, 3, 16, 16, generator=generator)
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") + noise


@pytest.fixture
def task(images: Tensor) -> Any:
    return make_task(images)


def make_task(images: Tensor) -> Any:
    """What Sparsify asks of a task."""
    return SimpleNamespace(
        example_input=images[:1], calibration_batches=lambda: list(images.split(8))
    )


@pytest.fixture
def task_of() -> Callable[[Tensor], Any]:
    return make_task


@pytest.fixture
def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Name -> a layer, and the shape of one of its inputs."""
    return {
        "linear": (nn.Linear(8, 6), (8,)),
        "tokens": (nn.Linear(8, 6), (5, 8)),
        "conv": (nn.Conv2d(8, 4, 3, padding=1), (8, 9, 7)),
        "uneven": (nn.Conv2d(8, 4, (3, 2), (1, 2), (1, 0), (1, 2)), (8, 9, 9)),
        "same": (nn.Conv2d(8, 4, 4, padding="same"), (8, 9, 9)),
        "valid": (nn.Conv2d(8, 4, 3, padding="valid"), (8, 9, 9)),
        "grouped": (nn.Conv2d(16, 8, 3, groups=2), (16, 6, 6)),
        "depthwise": (nn.Conv2d(8, 16, 3, groups=8), (8, 6, 6)),
        "conv1d": (nn.Conv1d(8, 4, 3, stride=2, padding=1, dilation=2, groups=2), (8, 11)),
        "conv3d": (nn.Conv3d(8, 4, 2), (8, 3, 4, 5)),
        "transposed": (nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), (8, 5, 4)),
        "grouped transposed": (nn.ConvTranspose1d(8, 4, 3, groups=2), (8, 5)),
        "conv1d same": (nn.Conv1d(8, 4, 4, padding="same"), (8, 11)),
    }
