"""When a weight counts as sparse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimdown.zeros import is_sparse, share_of_zeros


def test_zeros_are_counted() -> None:
    assert share_of_zeros(torch.tensor([0.0, -0.0, 1.0, 2.0])) == 0.5
    assert share_of_zeros(torch.zeros(0)) == 0.0


def with_zeros(shape: tuple[int, ...], share: float) -> Tensor:
    """A weight of which a share, spread evenly, is zero."""
    weight = torch.ones(shape)
    count = round(share * weight.numel())
    weight.view(-1)[torch.randperm(weight.numel())[:count]] = 0
    return weight


@pytest.mark.parametrize("shape", [(32, 64), (1, 400), (400, 1), (16, 8, 3, 3), (64, 1, 3, 3)])
@pytest.mark.parametrize("share", [0.015, 0.05, 0.5, 0.9])
def test_scattered_zeros_are_meant(shape: tuple[int, ...], share: float) -> None:
    assert is_sparse(with_zeros(shape, share))
    assert not is_sparse(with_zeros(shape, 0.005))
    assert not is_sparse(torch.ones(shape))
    assert not is_sparse(torch.zeros(shape))


def test_extremely_sparse_weights_and_patterns_are_meant() -> None:
    assert is_sparse(with_zeros((1000, 1000), 0.999))
    one_of_four = torch.zeros(16, 4).scatter(1, torch.randint(0, 4, (16, 1)), 1.0)
    assert is_sparse(one_of_four)
    assert is_sparse(torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(16, 4).roll(1, 1) + torch.eye(16))


def test_whole_rows_and_columns_are_a_start() -> None:
    weight = torch.ones(12, 8, 3, 3)
    weight[:4] = 0
    weight[:, 5] = 0
    assert not is_sparse(weight)
    weight[5:, 0, 0, 0] = 0
    assert is_sparse(weight)
    embedding = torch.ones(1, 10, 8)
    embedding[:, 0] = 0
    assert not is_sparse(embedding)


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (32, 16, 3, 3), (8, 16, 1, 1), (9, 6, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_identity_is_a_start(shape: tuple[int, ...], groups: int) -> None:
    if shape[0] % groups == 0:
        assert not is_sparse(nn.init.dirac_(torch.empty(shape), groups))


def test_what_is_never_sparse() -> None:
    for tensor in (torch.eye(5), torch.eye(4, 9), torch.zeros(0, 3), torch.tensor([0.0, 1.0])):
        assert not is_sparse(tensor)
