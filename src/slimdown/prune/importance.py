"""How much a channel matters, told from the weights alone.

A criterion takes all weights that make or read the channels of a group, as one (C, n) matrix for
each weight tensor, and returns one value a channel, (C,). To add one: a function and its line in
`IMPORTANCE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from slimdown.capture import Analysis
from slimdown.capture.dims import Var, is_frozen, rows_of_leaves

Criterion: TypeAlias = Callable[[Sequence[Tensor]], Tensor]


def l1(weights: Sequence[Tensor]) -> Tensor:
    """Sum of |w|, (C,). Li 2017, arXiv:1608.08710, over the whole group."""
    return sum_up([weight.abs().sum(1) for weight in weights])


def l2(weights: Sequence[Tensor]) -> Tensor:
    """Root of the sum of w², (C,). As in DepGraph: Fang 2023, arXiv:2301.12900, eq. 4."""
    return sum_up([weight.square().sum(1) for weight in weights]).sqrt()


IMPORTANCE: dict[str, Criterion] = {"l1": l1, "l2": l2}


def sum_up(terms: Sequence[Tensor]) -> Tensor:
    """Add (C,) terms in their order."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def gather_weights(analysis: Analysis) -> Mapping[Var, list[Tensor]]:
    """For each channel leaf, the weights of the layers that make or read it, (leaf.size, n) each.

    Biases and norms are left out: they say how large an activation is, not how much it matters.
    """
    gathered: dict[Var, list[Tensor]] = {}
    for name in dict.fromkeys(layer.weight for layer in analysis.layers):
        weight = analysis.tensor(name).detach().float().cpu()
        for axis, dim in enumerate(analysis.tensors[name]):
            for leaf, rows in rows_of_leaves(dim, weight.movedim(axis, 0)):
                if not is_frozen(leaf):
                    gathered.setdefault(leaf, []).append(rows)
    return gathered
