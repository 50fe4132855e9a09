"""From statistics to a grid: which range the levels of a quantizer should span."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slimdown.quantize.observe import RangeStatistics


class Grid(NamedTuple):
    """Level q stands for (q - zero_point) * scale."""

    scale: float
    zero_point: int


def minmax_range(seen: RangeStatistics, num_levels: int) -> tuple[float, float]:
    """All of what was seen, and zero."""
    return min(seen.low, 0.0), max(seen.high, 0.0)


def mse_range(seen: RangeStatistics, num_levels: int) -> tuple[float, float]:
    """The range around zero whose grid has the least mean squared error on what was seen.

    Each bound is searched in turn, coarsely and then around the best. Sung 2015, arXiv:1511.06488.
    """
    present = seen.counts > 0
    values, counts = seen.centers[present], seen.counts[present]
    low, high = minmax_range(seen, num_levels)
    lowest, highest = low, high
    for ratios in (_COARSE, _FINE, _COARSE, _FINE):
        if highest > 0:
            highs = (high * ratios).clamp(max=highest)
            high = float(highs[_squared_errors(values, counts, low, highs, num_levels).argmin()])
        if lowest < 0:
            lows = (low * ratios).clamp(min=lowest)
            low = float(lows[_squared_errors(values, counts, lows, high, num_levels).argmin()])
    return low, high


CALIBRATIONS: dict[str, Callable[[RangeStatistics, int], tuple[float, float]]] = {
    "mse": mse_range,
    "minmax": minmax_range,
}
"""How to choose the range (low, high) of an activation from its statistics and number of levels."""


def fit_grid(low: float, high: float, quant_min: int, quant_max: int) -> Grid:
    """The affine grid over [low, high] on which zero is a level."""
    if high <= low:
        return Grid(1.0, quant_min)  # only zero was seen: any scale holds it
    scale = float(torch.tensor((high - low) / (quant_max - quant_min)))  # as float32 stores it
    zero_point = round(quant_min - low / scale)
    return Grid(scale, min(max(zero_point, quant_min), quant_max))


def weight_scales(
    weight: Tensor, quant_max: int, *, bias: Tensor | None = None, input_scale: float = 1.0
) -> Tensor:
    """Symmetric scales of a weight (C_out, ...), one a channel: absmax / quant_max, (C_out,).

    A runtime keeps the bias as int32 in steps of `input_scale` times these scales. A channel with a
    large bias on tiny weights gets the smallest scale with which its bias still fits.
    """
    scales = weight.detach().double().flatten(1).abs().amax(1) / quant_max
    if bias is not None:
        scales = scales.maximum(bias.detach().double().abs() / (input_scale * 2.0**30))
    return torch.where(scales > 0, scales, 1.0).float()


_COARSE = torch.linspace(0.1, 1.2, 45, dtype=torch.float64)
_FINE = torch.linspace(0.96, 1.04, 17, dtype=torch.float64)


def _squared_errors(
    values: Tensor, counts: Tensor, lows: Tensor | float, highs: Tensor | float, num_levels: int
) -> Tensor:
    """The error of `values` (B,), `counts` times each, on the grids over K ranges, (K,)."""
    spans = torch.as_tensor(highs) - torch.as_tensor(lows)
    scales = (spans / (num_levels - 1)).clamp(min=1e-300)[:, None]
    zero_points = (-torch.as_tensor(lows).view(-1, 1) / scales).round()
    levels = (values / scales).round_().add_(zero_points).clamp_(0, num_levels - 1)
    return levels.sub_(zero_points).mul_(scales).sub_(values).square_() @ counts
