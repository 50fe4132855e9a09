"""When a weight is sparse: the one rule by which stages know what others made zero on purpose."""

from __future__ import annotations

from torch import Tensor

SPARSE_FROM = 0.1
"""The share of exact zeros from which on a weight counts as sparse."""


def is_sparse(weight: Tensor) -> bool:
    """Whether a weight's zeros are meant, and shall stay.

    No dense weight has a tenth of exact zeros after any training. One that is all zeros was not
    made sparse: many layers start like that. Biases and norms, (C,), are never sparse.
    """
    return weight.ndim >= 2 and SPARSE_FROM <= share_of_zeros(weight) < 1


def share_of_zeros(tensor: Tensor) -> float:
    """The share of a tensor's values that are exactly zero, in [0, 1]."""
    return float((tensor.detach() == 0).double().mean()) if tensor.numel() else 0.0
