"""When a weight counts as sparse."""

from __future__ import annotations

import torch

from slimdown.zeros import is_sparse, share_of_zeros


def test_zeros_are_counted() -> None:
    assert share_of_zeros(torch.tensor([0.0, -0.0, 1.0, 2.0])) == 0.5
    assert share_of_zeros(torch.zeros(0)) == 0.0


def test_a_tenth_of_zeros_is_meant_and_all_zeros_are_a_start() -> None:
    weight = torch.ones(10, 10)
    assert not is_sparse(weight)
    weight[0, :9] = 0
    assert not is_sparse(weight)
    weight[0] = 0
    assert is_sparse(weight)
    weight[:] = 0
    assert not is_sparse(weight)
    assert not is_sparse(torch.tensor([0.0, 1.0]))
