from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from slimdown.capture import analyze, capture
from slimdown.prune import Prune
from slimdown.prune.delivery.deliver import deliver
from slimdown.prune.probe import make_probe
from slimdown.prune.surgery import prune_graph


def pruned(model, task, **settings):
    plain = {"macs": 0.5, "round_to": 1, "importance": "l2", "compensate": False}
    return Prune(**{**plain, **settings})(model, task)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "batch norm",
        "depthwise",
        "depth multiplier",
        "grouped",
        "transposed",
        "prelu",
        "shuffle",
        "squeeze and excite",
        "padded shortcut",
        "dense",
        "flat",
        "attention by matmul",
        "tied",
        "scaled",
        "unknown",
    ],
)
def test_the_users_own_module_comes_back_where_it_can(name, networks, task_for):
    model = networks[name]()
    result = pruned(model, task_for(8, 8, 8))
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert type(result.model) is type(model)
    assert not result.model.training
    x = torch.randn(4, 8, 8, 8)
    result.model.train()(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in result.model.parameters() if p.grad is not None)


def test_attributes_of_torchs_layers_tell_the_new_sizes(networks, task_for):
    model = pruned(networks["grouped"](), task_for(8, 8, 8)).model
    for conv in (model.first, model.middle):
        assert conv.out_channels == conv.weight.shape[0]
        assert conv.in_channels == conv.weight.shape[1] * conv.groups
    assert model.last.in_features == model.last.weight.shape[1]
    norm = pruned(networks["batch norm"](), task_for(8, 8, 8)).model.middle[0]
    assert norm.num_features == len(norm.running_mean) == len(norm.weight)


def test_attributes_of_the_users_own_modules_are_found(networks, task_for):
    padded = pruned(networks["padded shortcut"](), task_for(8, 8, 8)).model.middle
    assert padded.padding < 8
    assert padded.conv.out_channels > 2 * padded.padding
    # Two heads of three go, and the module still says what a head is wide.
    attention = networks["attention by matmul"]()
    model = pruned(attention, task_for(8, 8, 8), macs=0.6, min_keep=0.3).model.middle
    assert (model.num_heads, model.head_dim) != (3, 8)
    assert model.proj.in_features == model.num_heads * model.head_dim


def test_attributes_come_in_the_order_of_the_graph(task_for):
    class Unfolds(nn.Module):
        """Holds its width by itself, since torch's layers come before all others."""

        def __init__(self):
            super().__init__()
            self.channels = 24

        def forward(self, x):
            return x.reshape(-1, self.channels, 8, 8)

    names = [f"{letter}_unfolds" for letter in "dbfaec"]
    model = nn.Sequential()
    for name in names:  # each after another convolution
        model.append(nn.Conv2d(24 if len(model) else 8, 24, 1))
        model.add_module(name, Unfolds())
    model.append(nn.Flatten())
    model.append(nn.Linear(24 * 64, 5))
    result = pruned(model.eval(), task_for(8, 8, 8))
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert [name for name in result.structure["attributes"] if name in names] == names


class Refuses(nn.Module):
    """Asserts its own widths, so that it cannot be edited."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = torch.relu(self.inner.first(x))
        if y.shape[1] != 24:
            raise ValueError("24 channels, or nothing")
        return self.inner.last(y.mean((2, 3)))


class RescalesItself(nn.Module):
    """Computes a number from a width: an edited copy runs, and is silently wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y * y.shape[1] ** -0.5).mean((2, 3))


def test_a_module_that_refuses_comes_back_as_a_trainable_graph(networks, task_for):
    model = Refuses(networks["plain"]()).eval()
    result = pruned(model, task_for(8, 8, 8))
    assert result.facts["delivery"] == "graph"
    assert "24 channels, or nothing" in result.facts["reason"]
    assert isinstance(result.model, GraphModule)
    for batch_size in (1, 3):
        assert result.model(torch.zeros(batch_size, 8, 8, 8)).shape == (batch_size, 5)
    result.model.train()(torch.randn(3, 8, 8, 8)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in result.model.parameters())


def test_a_module_that_would_be_silently_wrong_comes_back_as_a_graph(task_for, masked_outputs):
    model = RescalesItself().eval()
    result = pruned(model, task_for(8, 8, 8))
    assert result.facts["delivery"] == "graph"
    assert "differs from the pruned graph" in result.facts["reason"]
    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(model, result.structure, x)
    assert torch.allclose(result.model.double()(x.double()), reference)


class DropPath(nn.Module):
    """Leaves whole samples out in training, and no trace in a graph that was taken in eval mode."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) < 0.5) * 2 if self.training else x


def test_what_is_lost_with_the_users_own_code_is_told(task_for):
    class Stochastic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 5, 1)
            self.drop_path, self.unused = DropPath(), nn.Softmax(1)

        def forward(self, x):
            y = self.drop_path(torch.relu(self.a(x)))
            if y.shape[1] != 24:
                raise ValueError("24 channels, or nothing")
            return self.b(y).mean((2, 3))

    result = pruned(Stochastic().eval(), task_for(8, 8, 8))
    assert result.facts["delivery"] == "graph"
    assert result.facts["reason"].endswith("what acts in training only is gone: drop_path")


def test_a_graph_that_cannot_be_trained_says_so(task_for):
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 5, 1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))).detach().mean((2, 3))

    result = pruned(Detached().eval(), task_for(8, 8, 8))
    assert result.facts["delivery"] == "graph"
    assert "the graph cannot be trained: no gradient" in result.facts["reason"]


def test_a_graph_comes_back_as_a_graph(tiny_net, task_for):
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16))
    result = pruned(graph, task_for(3, 16, 16))
    assert isinstance(result.model, GraphModule)
    assert result.facts["reason"] == "the model is itself a captured graph"


def test_the_model_is_left_as_it_was(networks, task_for):
    model = networks["padded shortcut"]().train()
    before = copy.deepcopy(model.state_dict())
    pruned(model, task_for(8, 8, 8))
    assert model.training
    assert model.middle.padding == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_channels_that_are_dead_for_the_probe_are_compared_on_other_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
    nn.init.constant_(net[0].bias, -5)  # nine times the spread of what it is added to
    analysis = analyze(capture(net, torch.zeros(1, 3, 4, 4)))
    (leaf,) = (leaf for leaf in analysis.channels if not leaf.reason)
    kept = {leaf: torch.arange(8) == 1}
    probe = make_probe(analysis)
    delivered = deliver(net, analysis, kept, oracle=prune_graph(analysis, kept), probe=probe)
    assert delivered.plan.delivery == "in_place"
