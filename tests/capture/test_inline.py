from __future__ import annotations

import copy

import torch
from torch import nn

from slimdown.capture import capture
from slimdown.capture.inline import inline_regions_


class Regions(nn.Module):
    """A layer without autocast in a region without autocast, and one that it is on for."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.a(x.float())
            with torch.autocast("cpu", enabled=False):
                x = torch.relu(self.b(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.c(x)
        return x.float()


class Frozen(nn.Module):
    """A layer that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return self.b(torch.relu(y))


def layers(graph_module):
    return [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.linear.default]


def test_regions_become_a_part_of_the_graph_unless_autocast_is_on():
    model, x = Regions().eval(), torch.randn(2, 8)
    graph_module = capture(model, x[:1])
    assert [node.args[1].target for node in layers(graph_module)] == ["a.weight", "b.weight"]
    assert all("val" in node.meta and node.meta["nn_module_stack"] for node in layers(graph_module))
    assert set(graph_module.state_dict()) == set(model.state_dict())
    for again in (graph_module, copy.deepcopy(graph_module), capture(graph_module, x[:1])):
        assert torch.equal(again(x), model(x))


def test_a_region_keeps_its_precision():
    model, x = Regions().eval(), torch.randn(2, 8)
    graph_module = capture(model, x[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(graph_module(x), model(x))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_a_region_without_gradients_keeps_them_out():
    model, x = Frozen().eval(), torch.randn(2, 8)
    graph_module = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    assert len(layers(graph_module)) == 1
    inline_regions_(graph_module)
    assert len(layers(graph_module)) == 2
    graph_module(x).sum().backward()
    gradients = {name: p.grad is not None for name, p in graph_module.named_parameters()}
    assert gradients == {"a.weight": False, "a.bias": False, "b.weight": True, "b.bias": True}
    assert torch.is_grad_enabled()
    with torch.no_grad():
        graph_module(x)
        assert not torch.is_grad_enabled()


def test_a_graph_without_regions_stays_as_it_was():
    graph_module = capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.zeros(1, 8))
    code = graph_module.code
    inline_regions_(graph_module)
    assert graph_module.code == code
