"""A loss without labels: the outputs, seen from random directions.

For random signs v, the mean square of v·J is the squared length of J, a channel's derivative of
all outputs: its place on the diagonal of the Gauss-Newton matrix of the outputs' squared error.
Hutchinson 1990, doi:10.1080/03610919008812866; with a diagonal Hessian, LeCun 1989 pruned first
("Optimal Brain Damage").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimdown.core import Batch
from slimdown.errors import RecipeError
from slimdown.prune.probe import batched_outputs, floating_outputs


def project(seed: int) -> Callable[[Any, Batch], Tensor]:
    """The sum of all outputs that list samples with random signs, new ones for each batch.

    Each tensor of the outputs counts alike: its mean square is one, about its mean. Raises
    RecipeError where no output has any spread.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: list[float] = []

    def loss(outputs: Any, batch: Batch) -> Tensor:
        tensors = floating_outputs(outputs)
        if not factors:  # those of the first batch: all images must be judged alike
            size = len(batch.inputs)
            which = batched_outputs([outputs], [size])
            given = enumerate(tensors)
            factors.extend(_factor(t, size) if index in which else 0.0 for index, t in given)
            if not any(factors):
                raise RecipeError(
                    "the network gives the same outputs whatever it is shown, so that they do not "
                    "tell which channels matter: train it first (is its last layer still at "
                    "zero?), or set prune.importance to one that looks at weights, such as 'l2'"
                )
        terms = [
            factor * (_signs(tensor, generator) * tensor).float().sum()
            for factor, tensor in zip(factors, tensors, strict=True)
        ]
        return torch.stack(terms).sum()

    return loss


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    signs: Tensor = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
    return signs.to(tensor)


def _factor(tensor: Tensor, num_samples: int) -> float:
    """One over the spread of the values and the root of their number in a sample."""
    spread = float(tensor.detach().float().std(correction=0))
    return (num_samples / tensor.numel()) ** 0.5 / spread if spread > 0 else 0.0
