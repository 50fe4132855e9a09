from __future__ import annotations

import torch

from slimdown.capture import analyze, capture
from slimdown.capture.dims import leaves
from slimdown.prune.importance import IMPORTANCE, gather_weights, l1, l2


def test_norms_add_up_over_all_weights_of_a_group():
    made = torch.tensor([[3.0, 0.0], [1.0, -1.0]])
    read = torch.tensor([[4.0], [2.0]])
    assert l1([made, read]).tolist() == [7.0, 4.0]
    assert torch.allclose(l2([made, read]), torch.tensor([5.0, 6.0**0.5]))


def test_criteria_leave_their_input_as_it_was():
    weights = [torch.ones(2, 3), torch.ones(2, 1)]
    for criterion in IMPORTANCE.values():
        criterion(weights)
    assert torch.equal(weights[0], torch.ones(2, 3))


def test_every_weight_that_makes_or_reads_a_channel_counts(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    (leaf,) = leaves(analysis.tensors["conv1.weight"][0])
    found = l2(gather_weights(analysis)[leaf])
    made, read = tiny_net.conv1.weight, tiny_net.conv2.weight
    expected = (made.square().sum((1, 2, 3)) + read.square().sum((0, 2, 3))).sqrt()
    assert torch.allclose(found, expected)


def test_a_channel_that_is_flattened_counts_at_every_position(networks):
    model = networks["flat"]()
    analysis = analyze(capture(model, torch.zeros(1, 8, 8, 8)))
    (leaf,) = leaves(analysis.tensors["first.weight"][0])
    found = l1(gather_weights(analysis)[leaf])
    made = model.first.weight.abs().sum((1, 2, 3))
    read = model.last.weight.abs().view(5, 24, 4).sum((0, 2))
    assert torch.allclose(found, made + read)
