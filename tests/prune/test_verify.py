from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var
from slimdown.errors import BadInput
from slimdown.prune.probe import (
    batched_outputs,
    floating_outputs,
    has_spread,
    in_rows,
    make_probe,
    relative_error,
)
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


def prune_to(net, channels):
    """Keep these of the 8 channels between the two layers."""
    analysis = analyze(capture(net, torch.zeros(1, 3, 4, 4)))
    (leaf,) = (leaf for leaf in analysis.channels if not leaf.reason)
    kept = {leaf: torch.tensor([channel in channels for channel in range(8)])}
    return analysis, kept, prune_graph(analysis, kept)


def test_channels_that_are_dead_for_the_probe_are_tried_on_other_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    nn.init.constant_(net[0].bias, -5)  # nine times the spread of what it is added to
    analysis, kept, pruned = prune_to(net, {1})
    probe = make_probe(analysis)
    (outputs,) = probe.outputs(pruned)
    assert torch.equal(outputs[0], outputs[1])
    assert check_surgery(analysis, kept, pruned, probe) <= 1e-5


def test_layers_that_are_dead_for_every_input_verify_nothing():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    nn.init.constant_(net[0].bias, -1e6)
    analysis, kept, pruned = prune_to(net, {1, 4})
    with pytest.raises(Unverified, match="nothing can be verified"):
        check_surgery(analysis, kept, pruned, make_probe(analysis))


class Logarithm(nn.Module):
    def forward(self, x):
        return x.abs().mean((2, 3)).log()


def test_a_removed_channel_that_has_no_logarithm_spoils_nothing():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Logarithm(), nn.Linear(8, 2))
    analysis, kept, pruned = prune_to(net, {1, 4, 5})
    probe = make_probe(analysis)
    assert check_surgery(analysis, kept, pruned, probe) <= 1e-5
    made, read = analysis.tensors["2.weight"]
    unrelated = Var(read.size)  # as many channels are kept, but others
    wrong = replace(analysis, tensors={**analysis.tensors, "2.weight": (made, unrelated)})
    kept = {**kept, unrelated: next(iter(kept.values())).flip(0)}
    with pytest.raises(Unverified, match="differs from the masked original"):
        check_surgery(wrong, kept, prune_graph(wrong, kept), probe)


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
    with pytest.raises(BadInput, match="output 0 of this model, float32"):
        has_spread([constant / 0])


def test_outputs_that_list_no_samples_are_compared_as_they_are():
    logits, anchors, mean = torch.randn(2, 3), 1e6 * torch.rand(7, 4), torch.tensor(2.0)
    reference = [(logits, anchors, mean)]
    assert relative_error(reference, reference) == 0
    assert relative_error([(logits, anchors * 1.5, mean)], reference) == pytest.approx(0.5)
    assert relative_error([(logits, anchors, mean * 3)], reference) > 0
    assert relative_error([(logits * 1.25, anchors, mean)], reference) == pytest.approx(0.25)
    assert relative_error([(logits, mean, anchors)], reference) == float("inf")
    assert relative_error([anchors * 1.5], [anchors]) == pytest.approx(0.5)
    assert not has_spread([(torch.ones(2, 3), anchors, mean)])


def test_outputs_that_list_the_samples_are_told_from_others():
    batches = [5, 4]
    outputs = [(torch.zeros(n, 3), torch.zeros(5, 2), torch.zeros(2, n)) for n in batches]
    assert batched_outputs(outputs, batches) == (0,)
    assert in_rows(outputs[0], 5, (0,)).shape == (5, 3)
    crops = [(torch.zeros(3 * n, 2), torch.zeros(())) for n in batches]
    assert batched_outputs(crops, batches) == (0,)
    assert in_rows(crops[0], 5, (0,)).shape == (5, 6)
    with pytest.raises(BadInput, match=r"a batch of 5 this model gives int64 \(5,\), str, float32"):
        batched_outputs([(torch.arange(5), "a", torch.zeros(()))], [5])


def test_floating_outputs_are_found_in_whatever_holds_them():
    output = {"a": torch.zeros(2), "b": [torch.zeros(1), torch.zeros(2, dtype=torch.long), None]}
    assert [tensor.shape for tensor in floating_outputs(output)] == [(2,), (1,)]
