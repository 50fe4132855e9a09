"""Ridge regression in closed form: what to add to a layer's weights, and to its biases.

A layer reads x and misses what it should give by r. The correction D and c minimize
||r - D'x - c||² + λ||D||²: the penalty pulls toward the weights that the layer has, not toward
zero. He 2017, arXiv:1707.06168, section 3.1, without a penalty; Frantar 2023, arXiv:2301.00774,
section 3.1, on the inverse of the second moments.

With the rows of X, centered, as samples there are two equal ways to solve it: (X'X + λI)⁻¹X'r, of
a matrix as large as the inputs are many, and X'(XX' + λI)⁻¹r, of one as large as the samples are
(Saunders 1998, ICML, "Ridge regression in dual variables"). The smaller is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_EXACT = 1024
"""Up to so many inputs, products are made in float64; for more that would cost more than it gains.

Second moments are always added up in float64, and solved in it.
"""
LINES_AT_ONCE = 1024
"""Temporary copies are made of so many lines of a matrix at a time."""


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
    """Regressions on the same inputs; batches of x are (G, N, D).

    Without an intercept c is zero: for a layer that cannot take a constant.

    Beside the inputs it holds two float64 matrices of min(N, D)² values for each of G groups, the
    moments and the last factor of them: at most four times the bytes of float32 inputs, whatever
    N and D are, so 0.5 GB for 128 MB. A solution of (D, K) values and what it is made of come on
    top; for more than `MAX_EXACT` inputs it is float32.
    """

    def __init__(self, xs: Sequence[Tensor], *, intercept: bool) -> None:
        self.xs = xs
        self.intercept = intercept
        self.count = sum(x.shape[1] for x in xs)
        groups, _, self.size = xs[0].shape
        self.dtype = torch.float64 if self.size <= MAX_EXACT else torch.float32
        self.mean = torch.zeros(groups, 1, self.size, dtype=torch.float64)
        if intercept:
            for x in xs:
                self.mean += x.sum(1, keepdim=True, dtype=torch.float64) / self.count
        self.is_dual = self.count < self.size
        order = min(self.count, self.size)
        self.moments = torch.zeros(groups, order, order, dtype=torch.float64)
        """X'X, or XX' where that is smaller; not all above the diagonal, and a penalty on it."""
        parts = (x.mT for _, x in self._columns()) if self.is_dual else self._batches()
        for part in parts:
            for rows in _slices(order):  # at once, their float64 form would be another matrix
                left = slice(0, rows.stop)
                self.moments[:, rows, left] += part.mT[:, rows] @ part[:, :, left]
        self.squares = self.moments.diagonal(dim1=1, dim2=2).clone()
        self._factor: tuple[float, Tensor | None] = (float("nan"), None)

    def solve(self, rs: Sequence[Tensor], strength: float) -> Correction | None:
        """The best correction for misses r, batches of (G, N, K).

        The penalty of each regression is `strength` times the mean square of its inputs; an
        infinite one leaves the weights as they are. None where it is too small for the rounding.
        """
        if strength < float("inf"):
            factor = self._factorize(strength)
            if factor is None:
                return None
            weight = self._dual(rs, factor) if self.is_dual else self._primal(rs, factor)
        else:
            weight = torch.zeros(len(self.mean), self.size, rs[0].shape[2], dtype=self.dtype)
        bias = torch.zeros(len(self.mean), rs[0].shape[2], dtype=torch.float64)
        if self.intercept:
            bias += self._mean(rs)[:, 0]
            bias -= (self.mean.to(weight) @ weight)[:, 0]
        return Correction(weight=weight, bias=bias, strength=strength)

    def _primal(self, rs: Sequence[Tensor], factor: Tensor) -> Tensor:
        products = torch.zeros(len(factor), self.size, rs[0].shape[2], dtype=torch.float64)
        for x, r in zip(self._batches(), rs, strict=True):
            products += x.mT @ r.to(x)
        return _substitute(factor, products).to(self.dtype)

    def _dual(self, rs: Sequence[Tensor], factor: Tensor) -> Tensor:
        misses = torch.cat([r.double() for r in rs], 1)
        if self.intercept:
            misses -= self._mean(rs)  # centered x let no constant through, but rounding would
        shares = _substitute(factor, misses).to(self.dtype)  # (G, N, K)
        weight = shares.new_empty(len(factor), self.size, shares.shape[2])
        for columns, x in self._columns():
            weight[:, columns] = x.mT @ shares
        return weight

    def _factorize(self, strength: float) -> Tensor | None:
        """The Cholesky factor of the moments with a penalty; the last one is kept for the next."""
        if self._factor[0] != strength:
            self._factor = (strength, None)  # frees the other
            mean_square = self.squares.sum(1, keepdim=True) / self.size
            penalized = self.squares + strength * mean_square.clamp_min(1e-30)
            self.moments.diagonal(dim1=1, dim2=2).copy_(penalized)  # a copy would be one more
            factor, failed = torch.linalg.cholesky_ex(self.moments)
            self._factor = (strength, None if bool(failed.any()) else factor)
        return self._factor[1]

    def _mean(self, rs: Sequence[Tensor]) -> Tensor:
        total = rs[0].new_zeros(len(rs[0]), 1, rs[0].shape[2], dtype=torch.float64)
        for r in rs:
            total += r.sum(1, keepdim=True, dtype=torch.float64)
        return total / self.count

    def _batches(self) -> Iterator[Tensor]:
        """Centered inputs, batch by batch: (G, N, D)."""
        for x in self.xs:
            yield x.to(self.dtype) - self.mean.to(self.dtype)

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Some of the centered inputs, of all batches: their slice, and (G, N, inputs)."""
        for columns in _slices(self.size):
            joined = torch.cat([x[:, :, columns].to(self.dtype) for x in self.xs], 1)
            yield columns, joined - self.mean[:, :, columns].to(self.dtype)


def _slices(size: int) -> list[slice]:
    starts = range(0, size, LINES_AT_ONCE)
    return [slice(start, start + LINES_AT_ONCE) for start in starts]


def _substitute(factor: Tensor, right: Tensor) -> Tensor:
    """(LL')⁻¹ right, without the copy of the factor that `cholesky_solve` makes."""
    half: Tensor = torch.linalg.solve_triangular(factor, right, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole
