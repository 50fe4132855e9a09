"""Submodules that run as graphs inside of the user's own module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimdown.capture.trainable import TrainableGraph
from slimdown.errors import BadInput
from slimdown.prune import Prune


class StubbornAttention(nn.Module):
    """timm's classic: the width of the output is taken from the input, which is not pruned."""

    def __init__(self, *, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.drop = nn.Dropout(drop)
        self.register_buffer("unused", torch.ones(3))
        self.register_buffer("order", torch.arange(3), persistent=False)

    def forward(self, x, bias=None, *, scale: float = 1.0):
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias) * torch.tensor([0.5])
        return self.drop(self.proj(scale * y.transpose(1, 2).reshape(n, length, width))), length


class Transformer(nn.Module):
    """Two blocks for (N, 8, 8, 8), with a table of biases that both of them are handed."""

    def __init__(self, *, drop: float = 0.0, calls: int = 1) -> None:
        super().__init__()
        self.embed = nn.Conv2d(8, 24, 2, 2)
        self.bias = nn.Parameter(torch.randn(1, 16, 16))
        self.attentions = nn.ModuleList(StubbornAttention(drop=drop) for _ in range(2))
        self.head = nn.Linear(24, 5)
        self.calls = calls

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention in self.attentions:
            for _ in range(self.calls):
                x = x + attention(x, self.bias, scale=2.0)[0]
        return self.head(x.mean(1))


def prune(model, task_for, **settings):
    settings = {"macs": 0.6, "round_to": 1, "include": ("attentions.*",), **settings}
    settings["compensate"] = False  # it would change the weights
    return Prune(**settings)(model, task_for(8, 8, 8))


class AnySize(Transformer):
    """The same without the table, so that it takes images of any size."""

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention in self.attentions:
            x = x + attention(x)[0]
        return self.head(x.mean(1))


def test_the_reason_says_where_only_one_image_size_is_left(task_for):
    result = prune(AnySize(), task_for)
    assert "as graphs run attentions.0, attentions.1" in result.facts["reason"]
    assert result.facts["reason"].endswith(
        "it takes images of 8 x 8 pixels only, unlike the original"
    )
    assert "pixels" not in prune(Transformer(), task_for).facts["reason"]


def test_only_what_cannot_say_its_sizes_runs_as_a_graph(task_for, masked_outputs):
    model = Transformer().eval()
    result = prune(model, task_for)
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert "as graphs run attentions.0, attentions.1" in result.facts["reason"]
    assert type(result.model) is Transformer
    assert all(isinstance(each, TrainableGraph) for each in result.model.attentions)
    assert result.structure["traced"] == ["attentions.0", "attentions.1"]
    assert result.model.attentions[0].proj.weight.shape[1] < 24

    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(model, result.structure, x)
    torch.testing.assert_close(result.model.double()(x.double()), reference)


def test_the_state_keeps_its_names_also_in_copies(task_for):
    model = Transformer().eval()
    pruned = prune(model, task_for).model
    for each in (pruned, copy.deepcopy(pruned), copy.deepcopy(copy.deepcopy(pruned))):
        assert each.state_dict().keys() == model.state_dict().keys()
        assert each.attentions[0].num_heads == 3  # plain attributes stay, too
        assert set(dict(each.named_buffers())) >= set(dict(model.named_buffers()))


def test_gradients_reach_every_parameter_and_dropout_follows_the_mode(task_for):
    pruned = prune(Transformer(drop=0.5).eval(), task_for).model
    x = torch.randn(4, 8, 8, 8)
    assert torch.equal(pruned(x), pruned(x))
    pruned.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())
    assert not torch.equal(pruned(x), pruned(x))
    assert torch.equal(pruned.eval()(x), pruned(x))


def test_the_plan_makes_it_again_from_any_weights(task_for):
    stage = Prune(macs=0.6, round_to=1, include=("attentions.*",))
    task = task_for(8, 8, 8)
    result = stage(Transformer().eval(), task)
    again = stage.rebuild(Transformer().eval(), result.structure, task.example_input)
    again.load_state_dict(result.model.state_dict())
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(again(x), result.model(x))


def test_it_can_be_pruned_again(task_for, masked_outputs):
    once = prune(Transformer().eval(), task_for, macs=0.8).model
    twice = prune(once, task_for, macs=0.8)
    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(once, twice.structure, x)
    torch.testing.assert_close(twice.model.double()(x.double()), reference)


def test_a_submodule_that_is_called_twice_is_not_traced(task_for, masked_outputs):
    model = Transformer(calls=2).eval()
    result = prune(model, task_for)
    assert result.facts["delivery"] == "graph"
    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(model, result.structure, x)
    torch.testing.assert_close(result.model.double()(x.double()), reference)


def test_the_plan_of_another_model_names_what_is_missing(task_for):
    structure = prune(Transformer().eval(), task_for).structure
    structure["traced"] = ["elsewhere"]
    with pytest.raises(BadInput, match="no module elsewhere"):
        Prune(macs=0.5).rebuild(Transformer().eval(), structure, torch.zeros(1, 8, 8, 8))
