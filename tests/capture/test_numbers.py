from __future__ import annotations

import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import leaves


class Attention(nn.Module):
    """Queries, keys and values projected one by one, as transformers does it."""

    def __init__(self, *, value_width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)
        self.v, self.o = nn.Linear(24, 3 * value_width), nn.Linear(3 * value_width, 24)
        self.value_width = value_width

    def forward(self, x):
        n, length, _ = x.shape
        q = self.q(x).view(n, length, -1, 8).transpose(1, 2)
        k = self.k(x).view(n, length, -1, 8).transpose(1, 2)
        v = self.v(x).view(n, length, -1, self.value_width).transpose(1, 2)
        y = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, length, -1))


def ties(*modules: nn.Module) -> list[list[int]]:
    """The sizes of the dims that are tied."""
    analysis = analyze(capture(nn.Sequential(*modules), torch.zeros(1, 5, 24)))
    assert all(len([*leaves(dim)]) == 1 for tie in analysis.ties for dim in tie)
    return [[dim.size for dim in tie] for tie in analysis.ties]


def test_a_module_says_the_width_of_heads_by_one_number():
    assert ties(Attention(value_width=8)) == [[8, 8]]  # queries and keys are one dim already


def test_other_numbers_and_other_modules_are_free():
    assert ties(Attention(value_width=6)) == []
    two = ties(Attention(value_width=8), nn.ReLU(), Attention(value_width=8))
    assert two == [[8, 8], [8, 8]]


def test_a_view_as_another_type_says_no_number():
    class Bits(nn.Module):
        def forward(self, x):
            return x.view(torch.int32).view(torch.float32)

    assert ties(nn.Linear(24, 6), Bits(), nn.Linear(6, 24)) == []
