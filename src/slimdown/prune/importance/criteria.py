"""How much a channel matters: one function a criterion, from what `prune.evidence` gathers.

A criterion says for each member of a group (a layer that makes or reads its channels, a batch
norm, or all of them at once) how much each channel matters to it, (C,); a reduction joins them. To
add one: a function, its name in `Importance` and its line in `IMPORTANCE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from slimdown.capture.dims import Var
from slimdown.prune.importance.evidence import Evidence, Need
from slimdown.prune.importance.ranking import Unit

Members: TypeAlias = Sequence[Tensor]
"""(C,) of each member; none where nothing is known."""

Importance: TypeAlias = Literal[
    "random",
    "l1",
    "l2",
    "lamp",
    "geometric_median",
    "batch_norm_scale",
    "activation_mean",
    "activation_variance",
    "wanda",
    "taylor",
    "fisher",
    "hessian",
]
Reduction: TypeAlias = Literal["sum", "mean", "max", "product", "first"]


# ------------------------------------------------------------------------------ from the weights


def random(evidence: Evidence) -> Members:
    """A number drawn at random: the baseline that every criterion must beat."""
    return [] if evidence.noise is None else [evidence.noise]


def l1(evidence: Evidence) -> Members:
    """Sum of |w| of each layer. Li 2017, arXiv:1608.08710, for all that make and read a channel."""
    return [_norms(weight, 1) for weight in evidence.weights]


def l2(evidence: Evidence) -> Members:
    """Sum of w² of each layer. As DepGraph has it: Fang 2023, arXiv:2301.12900."""
    return [_norms(weight, 2).square() for weight in evidence.weights]


def lamp(evidence: Evidence) -> Members:
    """Sum of w² over that of all channels that have no less. Lee 2021, arXiv:2010.07611.

    There for single weights; here for the channels of each layer.
    """
    return [_over_no_less(square) for square in l2(evidence)]


def geometric_median(evidence: Evidence) -> Members:
    """Sum of the distances to the others' weights, of each layer that makes the channels.

    He 2019, arXiv:1811.00250: what lies near the geometric median, others can replace.
    """
    rows = [weight.flatten(1).double() for weight in evidence.makers]  # distances cancel in float32
    return [torch.cdist(each, each).sum(1) for each in rows]


def batch_norm_scale(evidence: Evidence) -> Members:
    """|γ| of each batch norm. Network Slimming: Liu 2017, arXiv:1708.06519."""
    return [_norms(scale, 1) for scale in evidence.scales]


def _norms(weight: Tensor, order: int) -> Tensor:
    """The norm of each channel's weights, (C, …) -> (C,), without a copy of them."""
    axes = tuple(range(1, weight.ndim))
    return torch.linalg.vector_norm(weight, order, dim=axes) if axes else weight.abs()


def _over_no_less(values: Tensor) -> Tensor:
    order = values.argsort(stable=True)
    ascending = values[order]
    no_less = ascending.flip(0).cumsum(0).flip(0)
    tiny = torch.finfo(values.dtype).tiny
    return torch.empty_like(values).index_copy_(0, order, ascending / no_less.clamp_min(tiny))


# --------------------------------------------------------------------------- from the activations


def activation_mean(evidence: Evidence) -> Members:
    """Mean |x| that each layer reads. Molchanov 2017, arXiv:1611.06440."""
    return [inputs.mean_abs.mean(1) for inputs in evidence.inputs]


def activation_variance(evidence: Evidence) -> Members:
    """Variance of the x that each layer reads. Berisha 2025, arXiv:2507.12988."""
    return [inputs.variance.mean(1) for inputs in evidence.inputs]


def wanda(evidence: Evidence) -> Members:
    """Sum of |w|·‖x‖ of each layer that reads the channel. Sun 2024, arXiv:2306.11695.

    ‖x‖ is over the root of the number of values, so that it does not grow with the images.
    """
    return [
        (inputs.weight.abs() * inputs.root_mean_square[:, :, None]).sum((1, 2))
        for inputs in evidence.inputs
    ]


# --------------------------------------------------------------------------- from the derivatives


def taylor(evidence: Evidence) -> Members:
    """Mean |Σ w·∂L/∂w|, over the samples. Molchanov 2019, arXiv:1906.10771."""
    return [] if evidence.loss_gates is None else [evidence.loss_gates.mean_abs]


def fisher(evidence: Evidence) -> Members:
    """Half the mean square of Σ w·∂L/∂w over the samples: the diagonal of the empirical Fisher.

    Theis 2018, arXiv:1801.05787; for groups Liu 2021, arXiv:2108.00708.
    """
    return [] if evidence.loss_gates is None else [evidence.loss_gates.mean_square / 2]


def hessian(evidence: Evidence) -> Members:
    """Mean square change of the outputs, to the first order, when the channel becomes its mean.

    The diagonal of the Gauss-Newton matrix of the outputs' squared error: see `prune.projection`.
    """
    return [] if evidence.output_gates is None else [evidence.output_gates.mean_square]


# -------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A way to tell how much channels matter, and how its values compare between groups."""

    members: Callable[[Evidence], Members]
    needs: tuple[Need, ...]
    unit: Unit = "group"


IMPORTANCE: dict[Importance, Criterion] = {
    "random": Criterion(members=random, needs=("noise",)),
    "l1": Criterion(members=l1, needs=("weights",)),
    "l2": Criterion(members=l2, needs=("weights",)),
    "lamp": Criterion(members=lamp, needs=("weights",), unit="common"),
    "geometric_median": Criterion(members=geometric_median, needs=("weights",)),
    "batch_norm_scale": Criterion(members=batch_norm_scale, needs=("scales",)),
    "activation_mean": Criterion(members=activation_mean, needs=("inputs",)),
    "activation_variance": Criterion(members=activation_variance, needs=("inputs",)),
    "wanda": Criterion(members=wanda, needs=("inputs",)),
    "taylor": Criterion(members=taylor, needs=("loss_gates",), unit="common"),
    "fisher": Criterion(members=fisher, needs=("loss_gates",), unit="damage"),
    "hessian": Criterion(members=hessian, needs=("output_gates",), unit="damage"),
}

REDUCTION: dict[Reduction, Callable[[Tensor], Tensor]] = {
    "sum": lambda members: members.sum(0),
    "mean": lambda members: members.mean(0),
    "max": lambda members: members.amax(0),
    "product": lambda members: members.prod(0),
    "first": lambda members: members[0],
}
"""(members, C) -> (C,). The first member is the first layer that makes the channels, or else that
reads them."""


def score(
    criterion: Criterion, evidence: Mapping[Var, Evidence], *, reduction: Reduction
) -> dict[Var, Tensor]:
    """How much each channel of each group matters, (C,) in float64, never negative.

    A group that the criterion knows nothing of (without a batch norm, say) is missing: nobody can
    say which of its channels to remove, so all of them stay.
    """
    members = {leaf: criterion.members(known) for leaf, known in evidence.items()}
    return {
        leaf: REDUCTION[reduction](torch.stack([each.double() for each in several]))
        for leaf, several in members.items()
        if several
    }
