"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi

import torch
from torch import nn
from torch.fx import GraphModule

from slimdown.distill.settings import DEFAULT_RATES, TrainSettings
from slimdown.errors import BadInput

QUANTIZED_SHARE = 0.05
"""Of the default rate, for a quantized student: with its batch norms folded, a ResNet-20 fell from
91.5 to 15 points at AdamW's 0.002 and rose to 91.9 at 0.0001."""


def choose_rate(model: nn.Module, settings: TrainSettings) -> TrainSettings:
    """Fill in the learning rate where none is given."""
    if settings.learning_rate is not None:
        return settings
    share = QUANTIZED_SHARE if _is_quantized(model) else 1.0
    return replace(settings, learning_rate=share * DEFAULT_RATES[settings.optimizer])


def _is_quantized(model: nn.Module) -> bool:
    """Whether there are fake quantizers in a model, as modules or as operators of its graphs.

    Known by what they have, since this room is upstream of the one that makes them.
    """
    graphs = (module.graph for module in model.modules() if isinstance(module, GraphModule))
    operators = (node.target for graph in graphs for node in graph.nodes)
    return any(hasattr(module, "quant_min") for module in model.modules()) or any(
        isinstance(operator, torch._ops.OpOverload) and operator.namespace == "slimdown"
        for operator in operators
    )


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
