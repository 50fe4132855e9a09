from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.quantize.assembly import Network
from slimdown.quantize.judge import Judge
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine import adaround_, correct_biases_, reconstruct_
from slimdown.quantize.refine.bias_correction import certain_mean
from slimdown.quantize.refine.layers import find_layers
from slimdown.quantize.refine.rounding import Learning

BRIEF = Learning(num_steps=50)

Quantized = tuple[Network, Placement, list[Tensor]]


@pytest.fixture
def quantize(tiny_net: nn.Module, toy_task: Any, assemble: Any) -> Callable[[int], Quantized]:
    def build(bits: int) -> Quantized:
        return *assemble(tiny_net, toy_task.batches, bits=bits), toy_task.batches

    return build


def refined(network: Network, refine_: Any, *others: Any, **settings: Any) -> GraphModule:
    changed = copy.deepcopy(network.quantized)
    refine_(changed, network.reference, *others, **settings)
    return changed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("refine_", [adaround_, correct_biases_, reconstruct_])
def test_the_output_comes_nearer_and_the_reference_stays(
    quantize: Callable[[int], Quantized], bits: int, refine_: Any
) -> None:
    network, placement, images = quantize(bits)
    before = copy.deepcopy(network.reference.state_dict())
    changed = refined(network, refine_, placement, images)
    judge = Judge(network.reference, images)
    assert judge.error(changed) < judge.error(network.quantized)
    after = network.reference.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_lie_on_their_grid_and_a_seed_gives_them_again(
    quantize: Callable[[int], Quantized],
) -> None:
    network, placement, images = quantize(4)
    first, second = (
        refined(network, adaround_, placement, images, learning=BRIEF, seed=3) for _ in range(2)
    )
    layers = find_layers(first, network.reference, placement)
    assert layers
    assert all(torch.equal(x.quantizer(x.weight), x.weight) for x in layers.values())
    states = [each.state_dict() for each in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_zeros_stay_zeros(quantize: Callable[[int], Quantized]) -> None:
    network, placement, images = quantize(4)
    weight = network.reference.get_parameter("conv1.weight")
    with torch.no_grad():
        weight[:, ::2] = 0
    changed = refined(network, adaround_, placement, images, learning=BRIEF)
    assert float(changed.get_parameter("conv1.weight").detach()[:, ::2].abs().max()) == 0


def test_a_mean_that_chance_may_have_made_is_not_corrected() -> None:
    certain = torch.full((8, 1), 2.0) + 0.01 * torch.randn(8, 1)
    doubtful = torch.tensor([[1.0], [-1.0]] * 4) + 0.01
    found = certain_mean(torch.cat([certain, doubtful], 1))
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0]).double(), atol=0.02, rtol=0)
