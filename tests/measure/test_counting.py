"""Counts against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.measure import count_macs, count_parameters

IMAGE = torch.randn(1, 3, 16, 16)


class Attention(nn.Module):
    """Self-attention over (1, S, D) tokens in the three ways that models write it."""

    def __init__(self, way: str, width: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.way = way
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.way == "module":
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]
        batch, length, width = tokens.shape
        heads = self.attention.num_heads
        fused = nn.functional.linear(tokens, self.attention.in_proj_weight)
        split = fused.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        if self.way == "sdpa":
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-2, -1)).softmax(-1) @ value
        return self.attention.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def test_convolutions_and_linear_layers_have_a_closed_form(tiny_net: nn.Module) -> None:
    # (kernel area x input channels) x output channels x output pixels
    stem, conv1, conv2, down = 27 * 16 * 256, 144 * 32 * 64, 288 * 16 * 64, 16 * 16 * 64
    head = 16 * 4
    assert count_macs(tiny_net, IMAGE) == stem + conv1 + conv2 + down + head


def test_grouped_convolutions_count_only_their_group() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_macs(depthwise, torch.randn(1, 8, 10, 10)) == 9 * 8 * 100


@pytest.mark.parametrize("way", ["module", "sdpa", "plain"])
def test_attention_counts_however_it_is_written(way: str) -> None:
    length, width = 20, 32
    projections = length * width * 4 * width
    products = 2 * length * length * width
    model = Attention(way).eval()
    assert count_macs(model, torch.randn(1, length, width)) == projections + products


def test_a_captured_graph_counts_as_its_module(tiny_net: nn.Module) -> None:
    graph = capture(tiny_net, IMAGE)
    assert count_macs(graph, IMAGE) == count_macs(tiny_net, IMAGE)
    assert count_parameters(graph) == count_parameters(tiny_net)


@pytest.mark.slow
def test_vit_b_16_agrees_with_the_analytic_figure() -> None:
    from torchvision.models import vit_b_16

    layers, width, hidden, tokens = 12, 768, 3072, 14 * 14 + 1
    block = 4 * tokens * width**2 + 2 * tokens * width * hidden + 2 * tokens**2 * width
    expected = 196 * (3 * 16 * 16) * width + layers * block + width * 1000
    assert count_macs(vit_b_16().eval(), torch.randn(1, 3, 224, 224)) == expected


def test_counting_leaves_the_model_as_it_was(tiny_net: nn.Module) -> None:
    tiny_net.train()
    tiny_net.bn.eval()  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in tiny_net.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    count_macs(tiny_net, IMAGE)
    assert tiny_net.training
    assert not tiny_net.bn.training  # type: ignore[union-attr]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_net.state_dict().items())


def test_tied_parameters_count_once_and_buffers_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.append(nn.BatchNorm1d(4))
    assert count_parameters(model) == 16 + 8
