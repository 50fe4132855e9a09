"""When a weight is sparse: the one rule by which stages know what others made zero on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

SPARSE_FROM = 0.01
"""The share of scattered zeros from which on a weight counts as sparse."""


def is_sparse(weight: Tensor) -> bool:
    """Whether a weight's zeros are meant, and shall stay: at least a hundredth, and scattered.

    No dense weight has so many exact zeros after any training, but many start with some. So zeros
    that fill whole rows or columns do not count, those of an untrained projection or of a dead
    channel, and an identity is not sparse. Biases and norms, (C,), are never sparse.

    It goes by the values alone, and so it has limits: a start with scattered zeros, such as
    `nn.init.sparse_` or a triangle, is taken for sparse; a weight whose zeros were all asked for
    and happen to fill whole rows or columns is not.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        return False
    zeros = weight.detach().reshape(*weight.shape[:2], -1) == 0
    if _is_identity(~zeros.all(2)):
        return False
    scattered = _without_whole_slices(zeros)
    return scattered.numel() > 0 and bool(scattered.double().mean() >= SPARSE_FROM)


def share_of_zeros(tensor: Tensor) -> float:
    """The share of a tensor's values that are exactly zero, in [0, 1]."""
    return float((tensor.detach() == 0).double().mean()) if tensor.numel() else 0.0


def _without_whole_slices(zeros: Tensor) -> Tensor:
    """What is left of (R, C, T) without rows and columns that are all zeros.

    Those of one value each say nothing: all zeros of a linear layer with one output would go.
    """
    num_rows, num_columns, num_taps = zeros.shape
    left = zeros
    if num_columns * num_taps > 1:
        left = left[~zeros.all(2).all(1)]
    if num_rows * num_taps > 1:
        left = left[:, ~zeros.all(2).all(0)]
    return left


def _is_identity(reads: Tensor) -> bool:
    """Whether the rows read one column each, in turn, as `dirac_`, `eye_` and bilinear upsampling.

    (R, C) bool. In groups the columns start anew; rows may read nothing.
    """
    columns = reads.nonzero()[:, 1]
    if len(columns) == 0 or int(reads.sum(1).max()) > 1:
        return False
    period = int(columns.max()) + 1
    in_turn = torch.arange(len(columns), device=columns.device) % period
    return period > 1 and torch.equal(columns, in_turn)
