from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var
from slimdown.prune.probe import floating_outputs, make_probe, relative_error
from slimdown.prune.surgery import prune_graph
from slimdown.prune.verify import Unverified, check_surgery


@pytest.fixture
def surgery(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    kept = {leaf: torch.arange(leaf.size) % 2 == 0 for leaf in analysis.channels if not leaf.reason}
    return analysis, kept, prune_graph(analysis, kept)


def test_right_surgery_passes(surgery):
    analysis, kept, pruned = surgery
    assert check_surgery(analysis, kept, pruned, make_probe(analysis)) < 1e-5


def test_rounding_is_told_from_a_mistake(surgery, monkeypatch):
    # No float32 result is this exact, so the verdict is that of float64.
    analysis, kept, pruned = surgery
    monkeypatch.setattr("slimdown.prune.verify.TOLERANCE", 1e-12)
    assert check_surgery(analysis, kept, pruned, make_probe(analysis)) < 1e-12


def test_channels_that_do_not_match_are_noticed(surgery):
    # As if the algebra had missed that what conv1 makes is what conv2 reads.
    analysis, kept, _ = surgery
    made, read, *kernel = analysis.tensors["conv2.weight"]
    unrelated = Var(read.size)
    tensors = {**analysis.tensors, "conv2.weight": (made, unrelated, *kernel)}
    wrong = replace(analysis, tensors=tensors)
    kept = {**kept, unrelated: torch.arange(read.size) % 2 == 1}
    with pytest.raises(Unverified, match="differs from the masked original"):
        check_surgery(wrong, kept, prune_graph(wrong, kept), make_probe(analysis))


def test_a_wrong_operator_in_the_graph_is_noticed(surgery):
    analysis, kept, pruned = surgery
    relu = next(n for n in pruned.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.tanh.default
    with pytest.raises(Unverified, match="differs from the masked original"):
        check_surgery(analysis, kept, pruned, make_probe(analysis))


class Fresh(nn.Module):
    """As it is initialized: flat norms, a zero branch, a tiny layer scale, a zero head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(1e-6 * torch.ones(8, 1, 1))
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head((x + self.scale * self.branch(x)).mean((2, 3)))


def test_the_probe_leaves_nothing_flat_and_depends_on_the_input():
    analysis = analyze(capture(Fresh(), torch.zeros(1, 3, 8, 8)))
    probe = make_probe(analysis)
    for name, tensor in probe.state.items():
        assert tensor.std() > 1e-3, name
        assert tensor.abs().max() > 1e-2, name
    assert (probe.state["norm.running_var"] > 0).all()
    (output,) = probe.outputs(analysis.graph_module)
    assert (output - output.mean(0)).norm() > 1e-3 * output.norm()


def test_the_probe_is_the_same_each_time_and_keeps_trained_weights(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    one, other = make_probe(analysis), make_probe(analysis)
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)
    assert torch.equal(one.state["stem.weight"], tiny_net.stem.weight)
    assert torch.equal(one.state["bn.running_var"], tiny_net.bn.running_var)


def test_relative_error_is_told_on_centered_outputs():
    reference = torch.tensor([[1000.0, 1.0], [1000.0, 2.0]])
    assert relative_error([reference + 7], [reference]) == 0
    shifted = reference + torch.tensor([[0.5, 0.0], [-0.5, 0.0]])
    assert relative_error([shifted], [reference]) == pytest.approx(1.0)
    assert relative_error([reference[:1]], [reference]) == float("inf")


def test_outputs_that_do_not_depend_on_the_input_verify_nothing():
    constant = torch.ones(2, 3)
    assert not relative_error([constant], [constant]) <= 1e-5


def test_floating_outputs_are_found_in_whatever_holds_them():
    output = {"a": torch.zeros(2), "b": [torch.zeros(1), torch.zeros(2, dtype=torch.long), None]}
    assert [tensor.shape for tensor in floating_outputs(output)] == [(2,), (1,)]
