"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from slimdown.distill.settings import DEFAULT_RATES, TrainSettings
from slimdown.errors import BadInput
from slimdown.quantize import is_fake_quantized

QUANTIZED_SHARE = 0.05
"""Of the default rate, for a quantized student: with its batch norms folded, a ResNet-20 fell from
91.5 to 15 points at AdamW's 0.002 and rose to 91.9 at 0.0001."""

WEIGHT_SCALE_SHARE, ACTIVATION_SCALE_SHARE = 10.0, 50.0
"""Of AdamW's rate, for a scale, times the scale. AdamW moves everything by its rate, whatever the
gradient, and a scale shall move by a share of its size: as a weight of 0.1 or 0.02 does. Tried on a
ResNet-20: 50 for weights ended at a higher loss than fixed scales at W4A8 (one seed), 10 did not.
SGD gets no share, as in the paper."""


def choose_rate(model: nn.Module, settings: TrainSettings) -> TrainSettings:
    """Fill in the learning rate where none is given."""
    if settings.learning_rate is not None:
        return settings
    share = QUANTIZED_SHARE if is_fake_quantized(model) else 1.0
    return replace(settings, learning_rate=share * DEFAULT_RATES[settings.optimizer])


def make_optimizer(
    model: nn.Module, settings: TrainSettings, *, scales: Sequence[Tensor] = ()
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over the parameters that require a gradient.

    `scales` are those of quantizers that are trained too, each at a rate of its own. They, norms
    and biases (all with at most one dimension) keep out of weight decay. Raises BadInput where
    every parameter is frozen, or some are too coarse to be trained.
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
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups += [
        {"params": [scale], "weight_decay": 0.0, "share": _share_of(scale, settings)}
        for scale in scales
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.peak_rate)
    return torch.optim.SGD(
        groups,
        lr=settings.peak_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def _share_of(scale: Tensor, settings: TrainSettings) -> float:
    """Of the learning rate, for the scales of a weight, (C,), or the scale of an activation, ()."""
    if settings.optimizer != "adamw":
        return 1.0
    share = WEIGHT_SCALE_SHARE if scale.ndim else ACTIVATION_SCALE_SHARE
    return share * float(scale.detach().median())  # a channel of zeros has one that says nothing


def set_learning_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter, and its share for every scale, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)


def learning_rate_at(step: int, *, num_steps: int, peak: float, warmup: float) -> float:
    """Rise linearly to `peak` over the fraction `warmup` of all steps, then fall as a cosine.

    The rate would be 0 at `num_steps`, which is never reached: the last step still moves.
    Loshchilov 2017, arXiv:1608.03983.
    """
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + cos(pi * (step - num_warmup) / (num_steps - num_warmup)))


def trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that the optimizer moves."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
