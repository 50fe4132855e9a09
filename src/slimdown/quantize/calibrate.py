"""From statistics to a grid: which range the levels of a quantizer should span."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from slimdown.quantize.observe import RangeStatistics, bin_edges


class RangeOf(Protocol):
    """Chooses (low, high) around zero, within what was seen, for a number of levels.

    Of a symmetric grid low is -high, and the levels are as many below zero as above it.
    """

    def __call__(
        self, seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
    ) -> tuple[float, float]: ...


Calibration: TypeAlias = Literal[
    "mse", "minmax", "moving_average", "percentile", "percentile_99.9", "entropy", "auto"
]

WeightScaling: TypeAlias = Literal["absmax", "mse"]


class Grid(NamedTuple):
    """Level q stands for (q - zero_point) * scale."""

    scale: float
    zero_point: int


def minmax_range(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
) -> tuple[float, float]:
    """All of what was seen, and zero."""
    return _around_zero(seen.low, seen.high, symmetric)


def moving_average_range(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
) -> tuple[float, float]:
    """The mean over images of the extremes of each, and zero. Jacob 2018, arXiv:1712.05877.

    A plain mean where training takes an exponential one: the network stands still, so that no image
    counts more for coming last.
    """
    return _around_zero(seen.mean_low, seen.mean_high, symmetric)


def percentile_range(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False, share: float = 0.9999
) -> tuple[float, float]:
    """The range around zero beyond which 1 - `share` of the values lie on each side."""
    total = seen.counts.cumsum(0).double()
    total = torch.cat([total.new_zeros(1), total])  # at each edge of the bins
    edges = bin_edges().clamp(*minmax_range(seen, num_levels))
    low, high = (_value_at(part, edges, total) for part in (1 - share, share))
    return _around_zero(low, high, symmetric)


def mse_range(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
) -> tuple[float, float]:
    """The range around zero whose grid has the least mean squared error on what was seen.

    Each bound is searched in turn, coarsely and then around the best, and of a symmetric grid both
    at once. Sung 2015, arXiv:1511.06488.
    """
    values, counts = seen.histogram()
    low, high = minmax_range(seen, num_levels, symmetric=symmetric)
    lowest, highest = low, high
    for ratios in (_COARSE, _FINE, _COARSE, _FINE):
        if symmetric:
            highs = (high * ratios).clamp(max=highest)
            high = float(highs[squared_errors(values, counts, -highs, highs, num_levels).argmin()])
            low = -high
            continue
        if highest > 0:
            highs = (high * ratios).clamp(max=highest)
            high = float(highs[squared_errors(values, counts, low, highs, num_levels).argmin()])
        if lowest < 0:
            lows = (low * ratios).clamp(min=lowest)
            low = float(lows[squared_errors(values, counts, lows, high, num_levels).argmin()])
    return low, high


def entropy_range(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
) -> tuple[float, float]:
    """The range around zero whose grid loses the least information: least KL divergence.

    Of what was seen, clipped, from what its levels tell of it. Each bound is searched in turn over
    the bins that hold the outer tenth of the values, and of a symmetric grid both at once. Migacz
    2017, "8-bit Inference with TensorRT".
    """
    values, widths, counts = _coarse_histogram(seen)
    low, high = minmax_range(seen, num_levels, symmetric=symmetric)

    def best(ranges: list[tuple[float, float]]) -> tuple[float, float]:
        lost = [_divergence(values, widths, counts, *each, num_levels) for each in ranges]
        return ranges[lost.index(min(lost))] if ranges else (low, high)

    if symmetric:
        sizes, order = values.abs().sort()
        return best([(-bound, bound) for bound in _outer_values(sizes, counts[order])])
    for _ in range(2):
        low, high = best([(low, bound) for bound in _outer_values(values, counts)])
        mirrored = _outer_values(-values.flip(0), counts.flip(0))
        low, high = best([(-bound, high) for bound in mirrored])
    return low, high


def auto_range(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
) -> tuple[float, float]:
    """The range of the calibration that is best for this tensor: `best_calibration`."""
    best = best_calibration(seen, num_levels, symmetric=symmetric)
    return CALIBRATIONS[best](seen, num_levels, symmetric=symmetric)


def best_calibration(
    seen: RangeStatistics, num_levels: int, *, symmetric: bool = False
) -> Calibration:
    """The calibration that, fitted to some images, has the least squared error on held-out ones.

    With fewer than four images none is held out: "mse", which is the best on what was fitted.
    """
    if not bool(seen.held_out.any()):
        return "mse"
    fitted = _fitted(seen)
    present = seen.held_out > 0
    values, counts = seen.middles()[present], seen.held_out[present].double()

    def error(name: Calibration) -> float:
        low, high = CALIBRATIONS[name](fitted, num_levels, symmetric=symmetric)
        return float(squared_errors(values, counts, low, high, num_levels))

    return min(_TRIED, key=error)


CALIBRATIONS: dict[Calibration, RangeOf] = {
    "mse": mse_range,
    "minmax": minmax_range,
    "moving_average": moving_average_range,
    "percentile": percentile_range,
    "percentile_99.9": partial(percentile_range, share=0.999),
    "entropy": entropy_range,
    "auto": auto_range,
}
"""How to choose the range (low, high) of an activation from its statistics and number of levels."""

_TRIED = tuple(name for name in CALIBRATIONS if name != "auto")  # of equals, the first one wins


def num_levels_of(quant_min: int, quant_max: int, *, symmetric: bool) -> int:
    """How many levels a calibration may count on: of a symmetric grid as many on each side."""
    return 2 * quant_max + 1 if symmetric else quant_max - quant_min + 1


def fit_grid(
    low: float, high: float, quant_min: int, quant_max: int, *, symmetric: bool = False
) -> Grid:
    """The grid over [low, high] on which zero is a level, and level 0 where it is symmetric."""
    span, num_steps = high - low, quant_max - quant_min
    if symmetric:
        span, num_steps = max(-low, high), quant_max
    scale = float(torch.tensor(span / num_steps))  # as float32 stores it
    if scale < _SMALLEST_SCALE:  # only zero was seen, which any scale holds; biases want a fine one
        scale = float(torch.tensor(1 / num_steps))
    if symmetric:
        return Grid(scale, 0)
    zero_point = round(quant_min - low / scale)
    return Grid(scale, min(max(zero_point, quant_min), quant_max))


def weight_scales(
    weight: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    scaling: WeightScaling | None = None,
    bias: Tensor | None = None,
    input_scale: float = 1.0,
) -> Tensor:
    """Symmetric scales of a weight (C_out, ...), one a channel, (C_out,).

    `scaling`: "absmax" lets the levels reach the largest weight of a channel, "mse" lets them have
    the least squared error; None is "absmax" with 128 levels or more, where clipping gains nothing.
    A channel of zeros gets 1. A runtime keeps the bias as int32 in steps of `input_scale` times
    these scales: a channel with a large bias on tiny weights gets the smallest scale with which its
    bias still fits. Raises ValueError on weights that are not finite.
    """
    rows = weight.detach().float().flatten(1)  # (C_out, weights of a channel)
    scales = rows.double().amax(1).div(quant_max).maximum(rows.double().amin(1).div(quant_min))
    if not bool(scales.isfinite().all()):
        raise ValueError(f"weights must be finite, got NaN or infinity in one of {weight.shape}")
    if scaling is None:
        scaling = "absmax" if quant_max - quant_min >= 126 else "mse"
    if scaling == "mse":
        scales = _least_squares_scales(rows, scales, quant_min, quant_max)
    if bias is not None:
        scales = scales.maximum(least_scale(bias.detach().double(), input_scale))
    return torch.where(scales >= _SMALLEST_SCALE, scales, 1.0).float()


def least_scale(bias: Tensor, input_scale: Tensor | float) -> Tensor:
    """The smallest weight scales, (C_out,), with which a bias (C_out,) fits into int32."""
    return bias.abs() / (input_scale * 2.0**30)


_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # runtimes may flush what is smaller to zero

_COARSE = torch.linspace(0.1, 1.2, 45, dtype=torch.float64)
_FINE = torch.linspace(0.96, 1.04, 17, dtype=torch.float64)
_CLIPPED_TO = torch.linspace(1.0, 0.2, 33, dtype=torch.float64).tolist()
_MERGED = 4  # bins in one for the entropy: 64 an octave, each with enough values to tell a density
_MOST_CANDIDATES = 64


def squared_errors(
    values: Tensor, counts: Tensor, lows: Tensor | float, highs: Tensor | float, num_levels: int
) -> Tensor:
    """The error of `values` (B,), `counts` times each, on the grids over K ranges, (K,)."""
    spans = torch.as_tensor(highs) - torch.as_tensor(lows)
    scales = (spans / (num_levels - 1)).clamp(min=1e-300).view(-1, 1)
    zero_points = (-torch.as_tensor(lows).view(-1, 1) / scales).round()
    levels = (values / scales).round_().add_(zero_points).clamp_(0, num_levels - 1)
    return levels.sub_(zero_points).mul_(scales).sub_(values).square_() @ counts


def _around_zero(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """The range from `low` to `high` with zero in it, and as far below it as above if symmetric."""
    low, high = min(low, 0.0), max(high, 0.0)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def _value_at(share: float, edges: Tensor, total: Tensor) -> float:
    """The value below which `share` of the values lie, evenly spread within bins."""
    wanted = share * total[-1]
    right = int(torch.searchsorted(total, wanted).clamp(1, len(total) - 1))
    start, end = total[right - 1], total[right]
    part = (wanted - start) / (end - start) if end > start else end.new_zeros(())
    return float(edges[right - 1] + part * (edges[right] - edges[right - 1]))


def _fitted(seen: RangeStatistics) -> RangeStatistics:
    """Without the images held out: extremes, too, as the bins tell them."""
    counts = seen.counts - seen.held_out
    present = counts.nonzero().flatten()
    edges = bin_edges().clamp(seen.low, seen.high)
    low, high = float(edges[present[0]]), float(edges[present[-1] + 1])
    return replace(seen, counts=counts, held_out=torch.zeros_like(counts), low=low, high=high)


def _coarse_histogram(seen: RangeStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Middles, widths and counts of the bins that hold values other than zero, float64, (B,) each.

    Zero is left out, as every grid has it: the peak that a ReLU makes there would drown the rest.
    """
    middle = len(seen.counts) // 2
    sides = [slice(0, middle), slice(middle + 1, None)]
    counts = torch.cat([seen.counts[side].view(-1, _MERGED).sum(1) for side in sides]).double()
    edges = bin_edges()
    starts = torch.cat([edges[:-1][side][::_MERGED] for side in sides])
    ends = torch.cat([edges[1:][side][_MERGED - 1 :: _MERGED] for side in sides])
    present = counts > 0
    middles = ((starts + ends) / 2).clamp(seen.low, seen.high)
    return middles[present], (ends - starts)[present], counts[present]


def _outer_values(values: Tensor, counts: Tensor) -> list[float]:
    """Bounds worth trying: positive ones of ascending `values`, a tenth at most beyond each."""
    values, counts = values[values > 0], counts[values > 0]
    beyond = counts.sum() - counts.cumsum(0)
    outer = values[beyond <= 0.1 * counts.sum()]
    spread = torch.linspace(0, len(outer) - 1, min(len(outer), _MOST_CANDIDATES))
    bounds: list[float] = outer[spread.round().long()].flip(0).tolist()
    return bounds


def _divergence(
    values: Tensor, widths: Tensor, counts: Tensor, low: float, high: float, num_levels: int
) -> float:
    """KL divergence of what was seen, clipped to [low, high], from what its levels tell of it.

    A level tells how many values it stands for, not where they lie in it: they are spread evenly
    over its bins. What is clipped lies on the bounds, and no level tells of it.
    """
    inside = (values >= low) & (values <= high)
    kept, widths = counts[inside], widths[inside]
    scale = (high - low) / (num_levels - 1)
    levels = ((values[inside] - low) / scale).round().long().clamp(0, num_levels - 1)
    zeros = torch.zeros(num_levels, dtype=torch.float64)
    told = zeros.index_add(0, levels, kept) / zeros.index_add(0, levels, widths)
    spread = told[levels] * widths
    clipped = kept.clone()
    clipped[0] += counts[values < low].sum()
    clipped[-1] += counts[values > high].sum()
    p, q = clipped / clipped.sum(), spread / spread.sum()
    return float((p * (p / q).log()).sum())


def _least_squares_scales(rows: Tensor, largest: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The scales (C,) of `rows` (C, K) with the least squared error, none above `largest` (C,).

    A search over ratios of the largest, then twice the scale that is best for the levels and the
    levels that are best for the scale.
    """

    def levels_and_errors(scales: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.where(scales > 0, scales, 1.0).float().view(-1, 1)
        levels = (rows / steps).round_().clamp_(quant_min, quant_max)
        return levels, (levels * steps).sub_(rows).square_().sum(1, dtype=torch.float64)

    best, least = largest, levels_and_errors(largest)[1]
    for ratio in _CLIPPED_TO[1:]:
        errors = levels_and_errors(largest * ratio)[1]
        best, least = torch.where(errors < least, largest * ratio, best), least.minimum(errors)
    for _ in range(2):
        levels, _ = levels_and_errors(best)
        products = (levels * rows).sum(1, dtype=torch.float64)
        scales = products / levels.square_().sum(1, dtype=torch.float64).clamp(min=1)
        errors = levels_and_errors(scales)[1]
        best, least = torch.where(errors < least, scales, best), least.minimum(errors)
    return best
