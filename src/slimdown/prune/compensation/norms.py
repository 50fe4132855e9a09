"""Batch norms whose input has drifted: statistics under which they give what they gave.

Jordan 2023, arXiv:2211.08403, resets them after merging networks. Here the original's own output
is the target, so that what a batch norm has learned of other data is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and variance of each channel, (C,) each, in float64."""

    mean: Tensor
    variance: Tensor

    def normalize(self, value: Tensor) -> Tensor:
        """(N, C, …) with each channel's mean taken off and its deviation divided by."""
        shape = (-1, *[1] * (value.ndim - 2))
        return (value - self.mean.view(shape)) / self.variance.sqrt().view(shape)


def statistics_of(batches: Iterable[Tensor]) -> Statistics:
    """The statistics of (N, C, …) batches over all images and places; variances by the count."""
    count = 0
    shift = total = squares = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        rows = _exact(batch).movedim(1, 0).flatten(1)
        if count == 0:
            shift = rows.mean(1, keepdim=True)  # near the mean, so that little cancels
        count += rows.shape[1]
        total = total + (rows - shift).sum(1)
        squares = squares + (rows - shift).square().sum(1)
    mean = total / count
    return Statistics(mean=mean + shift[:, 0], variance=squares / count - mean.square())


def restore_statistics(old: Statistics, new: Statistics, running: Statistics) -> Statistics:
    """The running statistics that give the outputs the mean and variance that they had.

    `old` are those of the input on the original's stream, `new` on the pruned one's, `running`
    those that the norm has, eps included. A channel that does not vary keeps its variance.
    """
    varies = (old.variance > 0) & (new.variance > 0)
    ratio = torch.where(varies, new.variance / old.variance, 1.0)
    return Statistics(
        mean=new.mean - (old.mean - running.mean) * ratio.sqrt(),
        variance=running.variance * ratio,
    )


def renew(old: Statistics, new: Statistics, *, eps: float) -> tuple[Tensor, Tensor]:
    """What makes good for other running statistics: w (x - m) / s + b stays the same function.

    Returns the factor of the weight w and what to add to the bias b, in units of the old weight.
    """
    deviation = (old.variance + eps).sqrt()
    return (new.variance + eps).sqrt() / deviation, (new.mean - old.mean) / deviation


def drift(
    old: Sequence[Tensor], new: Sequence[Tensor], before: Statistics, after: Statistics
) -> float:
    """The squared difference of the normalized inputs, `old` by `before` and `new` by `after`."""
    pairs = zip(old, new, strict=True)
    return sum(
        float((before.normalize(_exact(a)) - after.normalize(_exact(b))).square().sum())
        for a, b in pairs
    )


def _exact(value: Tensor) -> Tensor:
    return value.cpu().double()
