"""The exponential moving average of a model: weights, and buffers such as batch statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, also the buffers that `state_dict` leaves out."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}


def clone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with copies that later steps leave alone."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def copy_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set every parameter and buffer of `model` to the value that `tensors` has for its name."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(tensors[name])


def decay_at(update: int, decay: float) -> float:
    """The decay of update number `update` >= 0: a short memory first, so that the start fades.

    With 0.999 from the start, a run of 500 steps would keep 61 % of the weights it began with.
    """
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def update_average_(
    average: Mapping[str, Tensor], current: Mapping[str, Tensor], *, decay: float
) -> None:
    """average ← decay · average + (1 − decay) · current; integers are taken as they are."""
    for name, mean in average.items():
        if mean.is_floating_point():
            mean.lerp_(current[name], 1 - decay)
        else:
            mean.copy_(current[name])
