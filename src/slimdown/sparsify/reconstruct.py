"""Choosing zeros and mending the other weights of the layer, so that its output stays.

Frantar 2023, arXiv:2301.00774 (SparseGPT): column after column, what is taken out of a row is made
up for by its columns further on, as the inverse Hessian of the layer's squared error says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimdown.sparsify.pattern import Pattern, keep_largest

BLOCK = 128
"""Columns whose zeros are chosen together; the paper's choice."""
DAMPING = 0.01
"""Of the mean diagonal, added to it: the paper's choice."""
EPSILON = 1e-12
"""The least damping, for a layer whose inputs are all zero."""


def reconstruct(weight: Tensor, moments: Tensor, amount: float | Pattern) -> Tensor:
    """Return a weight with zeros whose outputs are close to those of `weight`.

    `weight` (G, R, K), one matrix a group; `moments` (G, K, K) are the sums of x xᵀ over the
    inputs. `amount` is the share of zeros, or an N:M pattern along K. Computed in float64.
    """
    w = weight.detach().double().clone()
    factor = _inverse_factor(moments.double())
    num_columns = w.shape[-1]
    block = BLOCK - BLOCK % amount.group if isinstance(amount, Pattern) else BLOCK
    block = max(block, amount.group) if isinstance(amount, Pattern) else block
    for start in range(0, num_columns, block):
        end = min(start + block, num_columns)
        rows = factor[:, start:end]
        errors = _solve_block_(w[..., start:end], rows[..., start:end], amount)
        w[..., end:] -= errors @ rows[..., end:]
    return w.to(weight.dtype)


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse Hessian, (G, K, K).

    An input that is always zero gets the damping alone, so that its weights are the first to go.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    damping = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp_min(EPSILON).expand_as(diagonal)
    damped = moments + torch.diag_embed(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _solve_block_(w: Tensor, factor: Tensor, amount: float | Pattern) -> Tensor:
    """Put zeros into a block of columns (G, R, B); return its errors for the columns after it."""
    gains = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)  # (G, 1, B)
    errors = torch.zeros_like(w)
    keep = torch.ones_like(w, dtype=torch.bool)
    if not isinstance(amount, Pattern):
        scores = (w / gains).square()
        keep = keep_largest(scores.flatten(1), amount, dim=1).view(w.shape)
    for column in range(w.shape[-1]):
        if isinstance(amount, Pattern) and column % amount.group == 0:
            group = slice(column, column + amount.group)  # as mended so far
            keep[..., group] = amount.mask((w[..., group] / gains[..., group]).square())
        value = w[..., column]
        kept = value * keep[..., column]
        errors[..., column] = (value - kept) / gains[..., column]
        rest = factor[:, column, column + 1 :].unsqueeze(1)  # (G, 1, B')
        w[..., column + 1 :] -= errors[..., column : column + 1] * rest
        w[..., column] = kept
    return errors
