"""Ridge regression in closed form: what to add to a layer's weights, and to its biases.

A layer reads x and misses what it should give by r. The correction D and c minimize
||r - D'x - c||² + λ||D||²: the penalty pulls toward the weights that the layer has, not toward
zero. He 2017, arXiv:1707.06168, section 3.1, without a penalty; Frantar 2023, arXiv:2301.00774,
section 3.1, on the inverse of the second moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_EXACT = 1024
"""Up to so many inputs, products are made in float64; for more that would cost more than it gains.

They are always added up in float64.
"""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What to add to the weights (G, D, K) and to the biases (G, K) of G regressions."""

    weight: Tensor
    bias: Tensor
    strength: float
    """The penalty; infinite where the biases alone are corrected."""

    @property
    def scope(self) -> str:
        """What it changes, in words."""
        return "weights" if self.strength < float("inf") else "constant"

    def __call__(self, x: Tensor) -> Tensor:
        """What it adds to the outputs for inputs x (G, N, D): (G, N, K)."""
        return x @ self.weight.to(x) + self.bias.to(x)[:, None]


class Ridge:
    """The second moments of inputs, for regressions on them; batches of x are (G, N, D).

    Without an intercept c is zero: for a layer that cannot take a constant.
    """

    def __init__(self, xs: Sequence[Tensor], *, intercept: bool) -> None:
        self.xs = xs
        self.intercept = intercept
        self.count = sum(x.shape[1] for x in xs)
        self.mean = torch.zeros(xs[0].shape[0], 1, xs[0].shape[2], dtype=torch.float64)
        if intercept:
            for x in xs:
                self.mean += x.double().sum(1, keepdim=True) / self.count
        size = xs[0].shape[2]
        self.gram = torch.zeros(xs[0].shape[0], size, size, dtype=torch.float64)
        for x in xs:
            centered = self._centered(x)
            self.gram += (centered.mT @ centered).double()
        self._factors: dict[float, Tensor | None] = {}

    def solve(self, rs: Sequence[Tensor], strength: float) -> Correction | None:
        """The best correction for misses r, batches of (G, N, K).

        The penalty of each regression is `strength` times the mean square of its inputs; an
        infinite one leaves the weights as they are. None where it is too small for the rounding.
        """
        weight = torch.zeros(*self.gram.shape[:2], rs[0].shape[2], dtype=torch.float64)
        if strength < float("inf"):
            factor = self._factorize(strength)
            if factor is None:
                return None
            for x, r in zip(self.xs, rs, strict=True):
                centered = self._centered(x)
                weight += (centered.mT @ r.to(centered)).double()
            weight = torch.cholesky_solve(weight, factor)
        bias = torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.float64)
        if self.intercept:
            for r in rs:
                bias += r.double().sum(1) / self.count
            bias -= (self.mean @ weight)[:, 0]
        return Correction(weight=weight, bias=bias, strength=strength)

    def _factorize(self, strength: float) -> Tensor | None:
        if strength not in self._factors:
            squares = self.gram.diagonal(dim1=1, dim2=2)
            penalty = (strength * squares.mean(1, keepdim=True).clamp_min(1e-30)).expand_as(squares)
            factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag_embed(penalty))
            self._factors[strength] = None if bool(failed.any()) else factor
        return self._factors[strength]

    def _centered(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.shape[2] <= MAX_EXACT else torch.float32
        return x.to(dtype) - self.mean.to(dtype)
