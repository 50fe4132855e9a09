"""Numbers that a user's modules hold about sizes, in whatever form, are found from the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimdown.prune import Prune


class Product(nn.Module):
    """Holds the width of all heads together, as Hugging Face's `all_head_size`."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim, self.width = 3, 8, 24
        self.to_qkv, self.out = nn.Linear(8, 72), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        n, length, _ = x.shape
        qkv = self.to_qkv(x).view(n, length, 3, self.heads, self.dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, length, self.width)).mean(1)


class Halves(nn.Module):
    """Splits at half of a width that it holds, as timm's cross-stage blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 48
        self.first = nn.Conv2d(8, 48, 1)
        self.a, self.b, self.out = (nn.Conv2d(24, n, 1) for n in (24, 24, 5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.first(x)).split(self.width // 2, 1)
        return self.out(torch.relu(self.a(a) * self.b(b))).mean((2, 3))


class Tail(nn.Module):
    def forward(self, x: Tensor, width: int) -> Tensor:
        return x.view(len(x), width, -1).mean(2)


class Handed(nn.Module):
    """Holds the number that another module's forward is told."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.first, self.tail, self.out = nn.Conv2d(8, 24, 1), Tail(), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.tail(torch.relu(self.first(x)), self.width))


class Asked(nn.Module):
    """Is asked for a table rather than called, so that no operator is known to be its own."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.table = nn.Linear(3, 24)
        self.rows = nn.Parameter(torch.randn(2, 3))

    def look_up(self) -> Tensor:
        return self.table(self.rows).view(2, 1, self.width, 1, 1).sum(0)


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.asked, self.out = nn.Conv2d(8, 24, 1), Asked(), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.first(x) * self.asked.look_up())).mean((2, 3))


@pytest.mark.parametrize("kind", [Product, Halves, Handed, Asking])
def test_the_number_is_found(kind, task_for, masked_outputs):
    model = kind().eval()
    stage = Prune(macs=0.6, round_to=1, importance="l2", compensate=False)
    result = stage(model, task_for(8, 8, 8))
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert result.structure["traced"] == [], result.facts["reason"]
    assert result.facts["macs"][1] <= 0.6 * result.facts["macs"][0]
    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(model, result.structure, x)
    torch.testing.assert_close(result.model.double()(x.double()), reference)


def test_an_attribute_that_only_looks_like_a_size_is_left_alone(task_for):
    class Coincidence(Handed):
        """One of its numbers equals a width and decides how much is added."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = 24

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return self.out(y.mean((2, 3))) + self.gain * x.mean((1, 2, 3))[:, None]

    result = Prune(macs=0.5, round_to=1)(Coincidence().eval(), task_for(8, 8, 8))
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert result.model.gain == 24
