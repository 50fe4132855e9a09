"""Fitting one layer of the pruned network to what the original gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdown.prune.compensation.following import Following
from slimdown.prune.compensation.readers import Reader
from slimdown.prune.compensation.regression import Correction, Ridge

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
"""Penalties to choose from, over the mean square of an input; the last leaves weights alone."""
MAX_ROUNDS = 20
"""Of further regressions for a layer with an activation."""
RELAXATION = 1.6
"""Each such round goes this much farther than it asks for, which saves many of them."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a layer reads and gives at some positions of one batch."""

    x: Tensor
    """(G, N, D), on the pruned stream."""
    y: Tensor
    """(N, G·K): what it gives for that so far."""
    skip: Tensor | None
    """(N, G·K): what is added to it, on the pruned stream."""
    total: Tensor
    """(N, G·K): what the original puts into the activation."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a layer is to be corrected, and its error on held-out samples without and with that.

    Errors are mean squares, over the variance of what the original gives.
    """

    correction: Correction | None
    error_before: float
    error_after: float


def fit_layer(
    train: Sequence[Samples],
    held_out: Sequence[Samples],
    *,
    reader: Reader,
    following: Following,
    intercept: bool,
) -> Fit:
    """The correction that is best on held-out samples; none where none is better than that.

    One regression makes right what goes into the activation. Where there is one, more follow for
    what is still missing behind it: where a ReLU lets nothing through, nothing is. Zhang 2015,
    arXiv:1505.06798, section 2.2, goes there by an auxiliary variable.
    """
    ridge = Ridge([samples.x for samples in train], intercept=intercept)
    layer = _Layer(reader, following)
    misses = [layer.miss_of_total(samples) for samples in train]
    before = layer.error(held_out, None)
    best = _Best(correction=None, error=before)
    for strength in STRENGTHS:
        best = best.or_better(ridge, misses, strength, layer=layer, held_out=held_out)
    for _ in range(MAX_ROUNDS if following.activation is not None else 0):
        if best.correction is None:
            break
        misses = [layer.miss_of_activation(samples, best.correction) for samples in train]
        strength, last = best.correction.strength, best
        best = best.or_better(ridge, misses, strength, layer=layer, held_out=held_out)
        if best is last:
            break
    spread = layer.variance((*train, *held_out))
    return Fit(
        correction=best.correction,
        error_before=before / spread,
        error_after=best.error / spread,
    )


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The best correction so far, and its error on held-out samples; the others are let go."""

    correction: Correction | None
    error: float

    def or_better(
        self,
        ridge: Ridge,
        misses: Sequence[Tensor],
        strength: float,
        *,
        layer: _Layer,
        held_out: Sequence[Samples],
    ) -> _Best:
        """The solution for these misses where it is better than this one."""
        correction = ridge.solve(misses, strength)
        if correction is None:
            return self
        error = layer.error(held_out, correction)
        return _Best(correction=correction, error=error) if error < self.error else self


@dataclass(frozen=True)
class _Layer:
    """What samples say of a layer under a correction."""

    reader: Reader
    following: Following

    def miss_of_total(self, samples: Samples) -> Tensor:
        """The change of y that makes the total right: (G, N, K)."""
        missing = samples.total - self.following.add_up(samples.y, samples.skip)
        return self.reader.by_group(self.following.unscale(missing))

    def miss_of_activation(self, samples: Samples, correction: Correction) -> Tensor:
        """The change of y so far, and what is missing yet behind the activation: (G, N, K)."""
        missing = self.following.unscale(self._missing(samples, correction))
        return correction(samples.x) + RELAXATION * self.reader.by_group(missing)

    def error(self, samples: Sequence[Samples], correction: Correction | None) -> float:
        """The mean square of what is missing behind the activation, added up over the outputs."""
        missing = torch.cat([self._missing(each, correction) for each in samples])
        return float(missing.double().square().mean(0).sum())

    def variance(self, samples: Sequence[Samples]) -> float:
        """That of what the original gives, added up over the outputs."""
        wanted = torch.cat([self.following.activate(each.total) for each in samples])
        return max(float(wanted.double().var(0, correction=0).sum()), 1e-30)

    def _missing(self, samples: Samples, correction: Correction | None) -> Tensor:
        y = samples.y
        if correction is not None:
            y = y + self.reader.ungrouped(correction(samples.x))
        wanted = self.following.activate(samples.total)
        return wanted - self.following.activate(self.following.add_up(y, samples.skip))
