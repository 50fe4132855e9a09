from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import is_frozen, is_same, leaves, mask


class Inverted(nn.Module):
    """Two convolutions with an operator between them that the op table does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.linalg.inv(self.a(x)))))


class BySize(nn.Module):
    def forward(self, x):
        return x[x > 0].sum()


@pytest.fixture
def analysis(tiny_net):
    return analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))


def test_residual_branches_share_their_channels(analysis):
    tensors = analysis.tensors
    assert is_same(tensors["down.weight"][0], tensors["conv2.weight"][0])
    assert is_same(tensors["down.weight"][0], tensors["head.weight"][1])
    assert is_same(tensors["stem.weight"][0], tensors["bn.running_mean"][0])
    assert is_same(tensors["stem.weight"][0], tensors["conv1.weight"][1])
    assert not is_same(tensors["stem.weight"][0], tensors["conv1.weight"][0])


def test_inputs_and_outputs_are_frozen(analysis):
    assert {leaf.reason for leaf in leaves(analysis.tensors["stem.weight"][1])} == {"input"}
    assert {leaf.reason for leaf in leaves(analysis.tensors["head.weight"][0])} == {"output"}


def test_layers_come_in_the_order_of_the_graph(analysis):
    assert analysis.layers[0].name == "stem"
    assert analysis.layers[-1].name == "head"
    assert {layer.weight for layer in analysis.layers} >= {"conv1.weight", "down.weight"}


def test_costs_at_full_and_at_other_widths(analysis, tiny_net):
    assert analysis.count_parameters({}) == sum(p.numel() for p in tiny_net.parameters())
    stem = 16 * 16 * 16 * 3 * 9
    conv1, conv2, down = 8 * 8 * 32 * 16 * 9, 8 * 8 * 16 * 32 * 9, 8 * 8 * 16 * 16
    assert analysis.count_macs({}) == stem + conv1 + conv2 + down + 16 * 4
    (leaf,) = leaves(analysis.tensors["conv1.weight"][0])
    assert analysis.count_macs({leaf: 8}) == stem + (conv1 + conv2) // 4 + down + 16 * 4


def test_an_unknown_operator_freezes_what_it_touches_and_is_counted():
    analysis = analyze(capture(Inverted(), torch.zeros(1, 3, 4, 4)))
    assert is_frozen(analysis.tensors["a.weight"][0])
    assert is_frozen(analysis.tensors["b.weight"][1])
    assert not is_frozen(analysis.tensors["b.weight"][0])
    shares = analysis.frozen_shares()
    total = 8 * 3 + 8 + 8 * 8 + 8 + 4 * 8 + 4
    assert shares["aten::linalg_inv"] == pytest.approx((8 * 3 + 8 + 8 * 8) / total)
    assert shares["output"] == pytest.approx((4 * 8 + 4) / total)


def test_a_frozen_part_of_a_concatenation_counts_as_that_part():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(9, 4, 1, bias=False)

        def forward(self, x):
            return self.b(torch.cat([x, self.a(x)], 1))

    analysis = analyze(capture(Joined(), torch.zeros(1, 3, 4, 4)))
    total = 6 * 3 + 4 * 9
    expected = {"input": (6 * 3 + 4 * 3) / total, "output": 4 * 9 / total}
    assert analysis.frozen_shares() == pytest.approx(expected)


def test_what_is_behind_a_frozen_dim_counts_too():
    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.c = nn.Linear(8, 2, bias=False)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + self.b(x).cumsum(1))

    analysis = analyze(capture(Chained(), torch.zeros(1, 4)))
    total = 4 * 8 + 8 * 8 + 2 * 8
    assert analysis.frozen_shares()["cumsum"] == 1.0
    assert analysis.frozen_shares()["input"] == pytest.approx(4 * 8 / total)


def test_the_choice_for_another_batch_size():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x).view(-1, 2)  # three heads in the batch
            return self.b(torch.relu(x).view(-1, 6))

    analysis = analyze(capture(Folded(), torch.zeros(1, 4)))
    view = next(n for n in analysis.shapes if n.target is torch.ops.aten.view.default)
    heads = next(leaf for leaf in leaves(analysis.shapes[view][0]) if leaf.size == 3)
    kept = {heads: torch.tensor([True, False, True])}
    there = mask(analysis.shapes[view][0], analysis.at_batch_size(kept, 2))
    assert there.tolist() == [True, False, True] * 2


def test_sizes_that_depend_on_values_are_left_alone():
    analysis = analyze(capture(BySize(), torch.zeros(1, 3)))
    assert analysis.channels == ()


def test_tied_weights_have_the_same_dims_under_both_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    analysis = analyze(capture(Tied(), torch.zeros(1, 8)))
    assert analysis.tensors["a.weight"] is analysis.tensors["b.weight"]
    assert analysis.count_parameters({}) == 64 + 8 + 8


def test_the_batch_is_no_channel(analysis):
    assert analysis.batch_size > 1
    assert all(leaf.reason != "batch" for leaf in analysis.channels)


def test_a_part_without_autocast_is_looked_into():
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x)
            with torch.autocast("cpu", enabled=False):
                x = x.float().cumsum(1)
            return self.c(torch.relu(self.b(x)))

    analysis = analyze(capture(Guarded(), torch.zeros(1, 8)))
    assert {leaf.reason for leaf in leaves(analysis.tensors["a.weight"][0])} == {"cumsum"}
    assert not is_frozen(analysis.tensors["b.weight"][0])


def test_a_part_under_autocast_is_left_whole():
    class Lower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = torch.relu(x @ x.T) @ x
            return self.c(torch.relu(self.b(x.float())))

    analysis = analyze(capture(Lower(), torch.zeros(1, 8)))
    assert is_frozen(analysis.tensors["a.weight"][0])
    assert not is_frozen(analysis.tensors["b.weight"][0])
    assert "wrap_with_autocast" in analysis.frozen_shares()
