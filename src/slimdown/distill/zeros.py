"""Zeros that stay: a sparse weight keeps its zeros while it is trained, or gets more on the way.

No mask is stored anywhere. Which weights are sparse is told as training begins (see
`slimdown.zeros`), and what of them is exactly zero before a step is set to zero after it. So zeros
outlive resuming, averaging, and being rebuilt or quantized in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimdown.capture import capture
from slimdown.errors import BadInput
from slimdown.sparsify import find_weights, keep_largest
from slimdown.zeros import is_sparse, share_of_zeros

RAMP = 0.5
"""The share of all steps over which zeros become more; the rest mends what that broke."""
NUM_INCREASES = 100


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """Which weights of a student are sparse, and how sparse the growing ones shall become."""

    kept: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()
    sparsity: float = 0.0
    """Of the growing ones, in the end."""

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """Where the zeros are, bool, by the weight's name."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() == 0 for name in (*self.kept, *self.growing)}

    @torch.no_grad()
    def grow_(self, model: nn.Module, *, step: int, num_steps: int) -> None:
        """Set the least weights to zero as far as the schedule has come after step `step` >= 0."""
        ramp = max(1, round(RAMP * num_steps))
        interval = max(1, ramp // NUM_INCREASES)
        done = step + 1
        if done > ramp or (done % interval > 0 and done < ramp):
            return
        sparsity = sparsity_at(done / ramp, self.sparsity)
        for name, parameter in model.named_parameters():
            if name in self.growing:
                parameter.mul_(keep_largest(parameter.abs(), sparsity))


def find_zeros(model: nn.Module) -> Zeros:
    """The sparse weights that will be trained."""
    return Zeros(kept=tuple(name for name, weight in _trained(model) if is_sparse(weight)))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


def share_of_sparse(model: nn.Module) -> float | None:
    """The share of zeros among all values of the sparse weights; None where there are none."""
    kept = find_zeros(model).kept
    sparse = [parameter for name, parameter in model.named_parameters() if name in kept]
    if not sparse:
        return None
    return sum(int((p == 0).sum()) for p in sparse) / sum(p.numel() for p in sparse)


def grow_zeros(model: nn.Module, example_input: Tensor, sparsity: float) -> Zeros:
    """All convolutions and linear layers shall become sparse. Raises BadInput, CannotCapture."""
    weights, _ = find_weights(capture(model, example_input))
    startable = {id(each): name for name, each in _trained(model) if share_of_zeros(each) < 1}
    # The graph may know a weight that layers share by another of its names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = (id(parameters.get(weight.name)) for weight in weights)
    growing = tuple(startable[each] for each in found if each in startable)
    if not growing:
        raise BadInput(
            "distill.sparsity: no convolution or linear layer of this model can get zeros: they "
            "are frozen or quantized; put this distill before quantize"
        )
    kept = tuple(name for name in find_zeros(model).kept if name not in growing)
    return Zeros(kept=kept, growing=growing, sparsity=sparsity)


def sparsity_at(progress: float, final: float) -> float:
    """The share of zeros after `progress` of the ramp, [0, 1]. Zhu 2017, arXiv:1710.01878, eq. 1.

    Fast at first, while there is plenty that does not matter, and slowly in the end.
    """
    return final * (1 - (1 - min(progress, 1.0)) ** 3)


@torch.no_grad()
def set_zero_(tensors: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> None:
    """Set values to zero where `zeros` says, in the tensors that it names."""
    for name, where in zeros.items():
        tensors[name].masked_fill_(where, 0.0)


def gradients_of(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of some parameters; none for those that the loss did not reach."""
    parameters = dict(model.named_parameters())
    grads = {name: parameters[name].grad for name in names}
    return {name: grad for name, grad in grads.items() if grad is not None}
