"""How much a weight matters, told of each weight alone."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|. Han 2015, arXiv:1506.02626."""
    return weight.abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|w| · ‖x‖₂ of the input that it multiplies. Sun 2023, arXiv:2306.11695, eq. 1.

    `weight` (G, R, K), `norms` (G, K).
    """
    return weight.abs() * norms.unsqueeze(1)
