"""How much a channel should be scaled, and shifted, for a layer to lose least on INT8 grids.

A tensor has one step for all its channels, and a weight one for each channel that it makes: a
channel with a small range is rounded coarsely, and a channel with small weights as well. A factor
moves range from one to the other. The families of factors tried are those of SmoothQuant,
w^(1-s) / r^s with r the channel's range and w its largest weight (Xiao 2023, arXiv:2211.10438; s of
one half is the cross-layer equalization of Nagel 2019, arXiv:1906.04721); the shifts center a
channel's range (RepQ-ViT, Li 2023, arXiv:2212.08254). Which s, and whether to shift, is decided by
the noise that uniform rounding adds to the readers' outputs: for each, as a share of its signal,

    noise = step_x^2 / 12 * sum of W^2  +  sum over rows of step_w^2 / 12 * sum of x^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdown.quantize.rewrites.makers import spread_over_rows

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the range that a factor takes from activations, the rest staying with weights."""

LEAST_RANGE = 1e-4
"""As a share of the component's largest: channels that are dead on the images are not blown up."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A quantized layer that reads channels: all that the noise of its output depends on."""

    channels: Tensor
    """(C_in,) the number of each channel that it reads; 0 is of those that stay as they are."""
    low: Tensor
    """(C_in,) the least value of each channel."""
    high: Tensor
    """(C_in,) the largest value of each channel."""
    mean: Tensor
    """(C_in,) the mean."""
    square: Tensor
    """(C_in,) the mean of the square."""
    peaks: Tensor
    """(C_out, C_in / groups) the largest magnitude of the weights of a channel, in each row."""
    squares: Tensor
    """(C_out, C_in / groups) the sum of their squares."""
    kernel_size: int
    num_input_levels: int
    num_weight_levels: int
    symmetric: bool = False
    """Whether the grid of the input reaches as far below zero as above it."""

    def noise(self, factors: Tensor, shifts: Tensor) -> float:
        """The noise of the output over its signal if channels are made factor * (x + shift)."""
        factor, shift = factors[self.channels], shifts[self.channels]
        lows, highs = factor * (self.low + shift), factor * (self.high + shift)
        span = _spans(lows.min(), highs.max(), self.symmetric)
        input_step = span / (self.num_input_levels - 1)
        per_weight = self._spread(factor)
        of_inputs = input_step.square() * (self.squares / per_weight.square()).sum()
        weight_steps = 2 * (self.peaks / per_weight).amax(1) / (self.num_weight_levels - 1)
        energy = factor.square() * (self.square + 2 * shift * self.mean + shift.square())
        of_weights = (weight_steps.square() * self._spread(energy).sum(1)).sum() * self.kernel_size
        return float((of_inputs + of_weights) / 12 / self.signal().clamp(min=1e-30))

    def signal(self) -> Tensor:
        """The energy of the output, as if the inputs did not depend on each other."""
        return (self.squares * self._spread(self.square)).sum()

    def weights_of_channels(self) -> Tensor:
        """(C_in,) the largest weight of each channel, beside the largest of its row."""
        shares = self.peaks / self.peaks.amax(1, keepdim=True).clamp(min=1e-30)
        groups = len(self.channels) // shares.shape[1]
        return shares.view(groups, -1, shares.shape[1]).amax(1).flatten()

    def _spread(self, of_channels: Tensor) -> Tensor:
        """From one value a channel, (C_in,), to one a row and channel, as `peaks` has them."""
        return spread_over_rows(of_channels, *self.peaks.shape)


def balance(
    readings: Sequence[Reading], can_scale: Tensor, can_shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The factors and shifts with the least noise, (count,) float64 each, of the kind described.

    `can_scale` and `can_shift`, (count,) bool, say to which channels they may be given. Channels
    that one layer reads together, and those they are read with elsewhere, are decided on together.
    """
    factors = torch.ones(len(can_scale), dtype=torch.float64)
    shifts = torch.zeros_like(factors)
    for numbers, together in _components(readings, can_scale):
        kept = sum(each.noise(factors, shifts) for each in together)
        best, least = (factors, shifts), kept
        for shift in _shifts(together, numbers, can_shift):
            for share in SHARES:
                factor = _factors(together, numbers, shift, share)
                noise = sum(each.noise(factor, shift) for each in together)
                if noise < least:
                    best, least = (factor, shift), noise
        factors[numbers], shifts[numbers] = best[0][numbers], best[1][numbers]
    return factors, shifts


def _components(
    readings: Sequence[Reading], can_scale: Tensor
) -> list[tuple[Tensor, list[Reading]]]:
    """Numbers that must be decided on together, and the layers that read them."""
    least = torch.arange(len(can_scale))
    numbers = [torch.unique(each.channels) for each in readings]
    numbers = [each[can_scale[each]] for each in numbers]
    while True:
        before = least.clone()
        for each in numbers:
            if len(each):
                least[each] = least[each].min()
        if torch.equal(before, least):
            break
    found: dict[int, list[Reading]] = {}
    for reading, each in zip(readings, numbers, strict=True):
        if len(each):
            found.setdefault(int(least[each[0]]), []).append(reading)
    return [((least == first) & can_scale, together) for first, together in found.items()]


def _shifts(readings: Sequence[Reading], numbers: Tensor, can_shift: Tensor) -> list[Tensor]:
    """None, and those that center each channel's range where that is possible."""
    none = torch.zeros(len(numbers), dtype=torch.float64)
    movable = numbers & can_shift
    if not bool(movable.any()):
        return [none]
    low, high = _ranges(readings, none)
    return [none, torch.where(movable, -(low + high) / 2, none)]


def _factors(readings: Sequence[Reading], numbers: Tensor, shifts: Tensor, share: float) -> Tensor:
    """w^(1-s) / r^s for `numbers`, such that the largest range of all stays what it is."""
    low, high = _ranges(readings, shifts)
    spans = _spans(low, high, readings[0].symmetric)[numbers]
    spans = spans.clamp(min=float(spans.max()) * LEAST_RANGE).clamp(min=1e-30)
    weights = torch.zeros_like(low)
    for each in readings:
        weights.scatter_reduce_(0, each.channels, each.weights_of_channels(), "amax")
    sizes = weights[numbers].clamp(min=LEAST_RANGE)
    chosen = sizes ** (1 - share) / spans**share
    factors = torch.ones_like(low)
    factors[numbers] = chosen * (spans.max() / (chosen * spans).max())
    return factors


def _spans(low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    """How wide a grid around zero must be to hold what lies between `low` and `high`."""
    if symmetric:
        return 2 * torch.maximum(-low, high).clamp(min=0)
    return high.clamp(min=0) - low.clamp(max=0)


def _ranges(readings: Sequence[Reading], shifts: Tensor) -> tuple[Tensor, Tensor]:
    """The least and largest value that any layer reads of each channel, (count,) float64."""
    low, high = torch.zeros_like(shifts), torch.zeros_like(shifts)
    for each in readings:
        shift = shifts[each.channels]
        low.scatter_reduce_(0, each.channels, each.low + shift, "amin", include_self=False)
        high.scatter_reduce_(0, each.channels, each.high + shift, "amax", include_self=False)
    return low, high
