"""Learning to which neighbor on its grid each weight is rounded. Nagel 2020, arXiv:2004.10568."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdown.quantize.fake_quantize import FakeQuantizePerChannel

STRETCH = 0.1
"""The sigmoid reaches so far beyond 0 and 1, so that choices can be made in full."""
WARM_UP = 0.2
"""The share of the steps in which the choices are free."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How roundings are learned."""

    num_steps: int = 500
    rows_a_step: int = 512
    rate: float = 0.03
    """Of Adam."""
    pressure: float = 1.0
    """How strongly choices are pressed to be made, against an error of 1 for the nearest ones."""


class Rounding:
    """For each weight a number in [0, 1]: how far it is rounded up. Zeros stay zeros."""

    def __init__(self, weight: Tensor, quantizer: FakeQuantizePerChannel) -> None:
        self.low, self.high = quantizer.quant_min, quantizer.quant_max
        shape = [-1 if axis == quantizer.axis else 1 for axis in range(weight.ndim)]
        self.scale = quantizer.scale.detach().view(shape)
        levels = weight.detach().float() / self.scale
        self.floor = levels.floor()
        self.is_free = weight != 0
        share = (levels - self.floor + STRETCH) / (1 + 2 * STRETCH)
        self.logits = share.logit().requires_grad_()

    def share(self) -> Tensor:
        """How far each weight is rounded up."""
        stretched = self.logits.sigmoid() * (1 + 2 * STRETCH) - STRETCH
        return stretched.clamp(0, 1) * self.is_free

    def soft(self) -> Tensor:
        """The weight with its choices as far as they are made."""
        return (self.floor + self.share()).clamp(self.low, self.high) * self.scale

    def hard(self) -> Tensor:
        """The weight on its grid."""
        up = (self.share() >= 0.5).float()
        return ((self.floor + up).clamp(self.low, self.high) * self.scale).detach()

    def undecided(self, power: float) -> Tensor:
        """0 where all choices are made, 1 where none is; added up over the weights, ()."""
        return (1 - (2 * self.share() - 1).abs().pow(power))[self.is_free].sum()


def learn_(
    roundings: Sequence[Rounding],
    loss: Callable[[], Tensor],
    learning: Learning,
    *,
    others: Sequence[Tensor] = (),
    after: Callable[[], None],
) -> None:
    """Lower `loss` of the soft weights, ever more strongly pressed to decide.

    `others` are leaves that are learned with the roundings.
    """
    optimizer = torch.optim.Adam([*(each.logits for each in roundings), *others], lr=learning.rate)
    count = sum(each.floor.numel() for each in roundings)
    for step in range(learning.num_steps):
        progress = (step / learning.num_steps - WARM_UP) / (1 - WARM_UP)
        total = loss()
        if progress >= 0:
            power = 20 - 18 * progress
            undecided = torch.stack([each.undecided(power) for each in roundings]).sum() / count
            total = total + learning.pressure * undecided
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after()
