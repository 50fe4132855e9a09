"""A task without data, and the trained ResNet-20 on its real images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimdown.core import Batch, Predict, Score

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # networks as small as these gain nothing from a second one


class ToyTask:
    """Calibration images and nothing else: what Quantize asks a task for."""

    def __init__(self, batches: Sequence[Tensor], example_input: Tensor | None = None) -> None:
        self.batches = batches
        self.example_input = batches[0][:1] if example_input is None else example_input

    def train_batches(self, epoch: int) -> list[Batch]:
        return []

    def calibration_batches(self) -> Sequence[Tensor]:
        return self.batches

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        raise AssertionError("quantize does not train")

    def score(self, predict: Predict) -> Score:
        raise AssertionError("quantize does not judge")


@pytest.fixture
def make_task() -> Callable[..., ToyTask]:
    return ToyTask


@pytest.fixture
def toy_task() -> ToyTask:
    """24 noisy images that differ in color and contrast, so that pooled features differ too."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(24, 3, 16, 16, generator=generator)
    colors = torch.randn(24, 3, 1, 1, generator=generator)
    contrasts = 0.2 + torch.rand(24, 1, 1, 1, generator=generator)
    return ToyTask((contrasts * noise + colors).split(8))


@pytest.fixture(scope="session")
def resnet20(data_folder: Path) -> nn.Module:
    """The trained network of recipes/models, 91.5 % on the images of `cifar_test`."""
    path = ROOT / "recipes" / "models" / "cifar_resnet.py"
    spec = importlib.util.spec_from_file_location("cifar_resnet", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.resnet20()
    network.load_state_dict(load_file(data_folder / "weights" / "cifar10_resnet20.safetensors"))
    return network.eval()


@pytest.fixture(scope="session")
def cifar_test(data_folder: Path) -> tuple[Tensor, Tensor]:
    """The 1,000 test images, normalized, and their classes."""
    return _read(data_folder / "cifar10_test1000.npz")


@pytest.fixture(scope="session")
def cifar_task(data_folder: Path) -> ToyTask:
    images, _ = _read(data_folder / "cifar10_train4000.npz")
    return ToyTask(images[:256].split(64))


def _read(path: Path) -> tuple[Tensor, Tensor]:
    arrays = np.load(path)
    images = torch.from_numpy(arrays["X"]).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    return ((images - mean) / std).contiguous(), torch.from_numpy(arrays["Y"]).long()
