"""A real trained network whose weights were disturbed gets its accuracy back without labels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimdown.core import Batch, Context
from slimdown.distill import Distill

NUM_TRAIN, NUM_TEST = 768, 400
MODELS = Path(__file__).resolve().parents[2] / "recipes" / "models" / "cifar_resnet.py"


def _images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    with np.load(path) as arrays:
        pixels, labels = arrays["X"][:count], arrays["Y"][:count]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (torch.from_numpy(pixels).float() / 255 - mean) / std
    return inputs.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long().flatten()


def _teacher(folder: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("cifar_resnet", MODELS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.resnet20()
    model.load_state_dict(load_file(folder / "weights" / "cifar10_resnet20.safetensors"))
    return model.eval()


def _disturb(model: nn.Module, share: float) -> nn.Module:
    """Add noise of `share` of each weight tensor's own deviation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return model


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.data
def test_a_disturbed_resnet_recovers(data_folder: Path, toy_task: Any) -> None:
    images, _ = _images(data_folder / "cifar10_train4000.npz", NUM_TRAIN)
    judged = _images(data_folder / "cifar10_test1000.npz", NUM_TEST)
    teacher, student = _teacher(data_folder), _disturb(_teacher(data_folder), 0.5)
    toy_task.train_batches = lambda epoch: [
        Batch(images[chosen]) for chosen in torch.randperm(len(images)).split(64)
    ]
    before, original = _accuracy(student, *judged), _accuracy(teacher, *judged)
    recovered = Distill(epochs=2)(student, toy_task, Context(original=teacher)).model
    after = _accuracy(recovered, *judged)
    assert original > 88
    assert before < original - 20
    assert after > before + 0.7 * (original - before)
