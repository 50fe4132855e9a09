"""What every test may use: the shared data folder, tiny networks, a fixed number of threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_conditions() -> None:
    torch.set_num_threads(1)  # two thrash on a busy machine
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The shared data; tests that use it carry the marker `data`."""
    folder = Path(os.environ.get("SLIMDOWN_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10_test1000.npz").is_file():
        pytest.skip(f"no shared data in {folder}: set SLIMDOWN_DATA to its folder")
    return folder


@pytest.fixture
def tiny_net() -> nn.Module:
    """(N, 3, 16, 16) -> (N, 4): conv, batch norm, ReLU, a residual block, pooling, linear."""
    return randomize_(TinyNet()).eval()


class TinyNet(nn.Module):
    def __init__(self, channels: int = 16, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 1, stride=2)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.down(x) + self.conv2(torch.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))


def randomize_(model: nn.Module) -> nn.Module:
    """Give norms true-looking statistics and zero-initialized weights a value.

    Without it the outputs of an untrained network hardly depend on its input, and a comparison of
    two networks would pass whatever they compute.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean") or tensor.ndim == 1:
                offset = 1.0 if name.endswith("weight") else 0.0
                tensor.copy_(offset + 0.2 * torch.randn(tensor.shape, generator=generator))
            elif float(tensor.abs().max()) < 1e-3:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model
