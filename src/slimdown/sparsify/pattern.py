"""Which weights stay: the best of the whole tensor, of each row, or N of every M neighbors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdown.errors import RecipeError


@dataclass(frozen=True)
class Pattern:
    """Of every `group` neighbors along the input channels, at most `kept` are not zero."""

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group:
            raise RecipeError(
                "a pattern N:M keeps N of every M weights, with 1 <= N < M, such as 2:4; "
                f"got {self.kept}:{self.group}"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4". Raises RecipeError."""
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if match is None:
            raise RecipeError(f"a pattern is written N:M, such as 2:4 or 1:4, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def mask(self, scores: Tensor) -> Tensor:
        """Where the `kept` highest scores of each group are, (..., K) bool; of equals, the first.

        K is a multiple of `group`.
        """
        groups = scores.reshape(*scores.shape[:-1], -1, self.group)
        best = groups.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(-2)


def keep_largest(scores: Tensor, sparsity: float, *, dim: int | None = None) -> Tensor:
    """Where all but the lowest `sparsity` of the scores are, bool; of equals, the first stay.

    Of the whole tensor, or of each row along `dim`.
    """
    if dim is None:
        return keep_largest(scores.flatten(), sparsity, dim=0).view(scores.shape)
    num_zeros = round(sparsity * scores.shape[dim])
    order = scores.sort(dim=dim, descending=True, stable=True).indices
    lowest = order.narrow(dim, scores.shape[dim] - num_zeros, num_zeros)
    return torch.ones_like(scores, dtype=torch.bool).scatter(dim, lowest, False)
