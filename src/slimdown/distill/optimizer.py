"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn

from slimdown.distill.settings import TrainSettings
from slimdown.errors import BadInput


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the parameters that require a gradient.

    Norms, biases and scales (all with at most one dimension) keep out of weight decay. Raises
    BadInput where every parameter is frozen, or some are too coarse to be trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise BadInput(
            "the model has no parameter that requires a gradient, so there is nothing to train: "
            "call model.requires_grad_(True) first"
        )
    if not all(parameter.dtype in (torch.float32, torch.float64) for parameter in trained):
        raise BadInput(
            "the model's parameters are in half precision, in which small steps are lost: distill "
            "before the model is made float16"
        )
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.peak_rate)
    return torch.optim.SGD(
        groups,
        lr=settings.peak_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def set_learning_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_at(step: int, *, num_steps: int, peak: float, warmup: float) -> float:
    """Rise linearly to `peak` over the fraction `warmup` of all steps, then fall as a cosine.

    The rate would be 0 at `num_steps`, which is never reached: the last step still moves.
    Loshchilov 2017, arXiv:1608.03983.
    """
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + cos(pi * (step - num_warmup) / (num_steps - num_warmup)))
