from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.quantize import Quantize, ladder
from slimdown.quantize.assembly import Network
from slimdown.quantize.judge import Judge
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine import reconstruct_, reconstruction
from slimdown.quantize.refine.layers import find_layers
from slimdown.quantize.refine.rounding import Learning
from slimdown.targets import find_target

BRIEF = Learning(num_steps=250)

Make = Callable[[str], nn.Module]
Assemble = Callable[..., tuple[Network, Placement]]


def images(count: int, *, seed: int) -> Tensor:
    """Noise of several colors and contrasts, smooth along rows as pictures are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    colors = torch.randn(count, 3, 1, 1, generator=generator)
    contrasts = 0.2 + torch.rand(count, 1, 1, 1, generator=generator)
    return contrasts * (noise + noise.roll(1, -1) + noise.roll(2, -1)) + colors


def reconstructed(network: Network, placement: Placement, **settings: Any) -> GraphModule:
    changed = copy.deepcopy(network.quantized)
    fitted = images(64, seed=1).split(16)
    reconstruct_(changed, network.reference, placement, fitted, learning=BRIEF, **settings)
    return changed


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("chain", "openvino"),
        ("residual", "openvino"),
        ("residual", "onnxruntime-x86"),
        ("vit", "openvino"),
        ("vit", "onnxruntime-x86"),
        ("hourglass", "openvino"),
        ("two heads", "openvino"),
    ],
)
def test_outputs_of_other_images_come_nearer_and_weights_lie_on_their_grids(
    make_net: Make, assemble: Assemble, name: str, profile: str
) -> None:
    model = make_net(name)
    network, placement = assemble(model, images(64, seed=1).split(16), bits=4, profile=profile)
    changed = reconstructed(network, placement)
    judge = Judge(model, images(64, seed=2).split(32))
    assert judge.error(changed) < 0.9 * judge.error(network.quantized)
    layers = find_layers(changed, network.reference, placement)
    assert layers.keys()
    for layer in layers.values():
        assert torch.equal(layer.quantizer(layer.weight), layer.weight)
        scale = layer.quantizer.scale.view(-1, *[1] * (layer.weight.ndim - 1))
        is_clipped = layer.weight == layer.quantizer.quant_max * scale
        moves = ((layer.weight - layer.original) / scale).abs()[~is_clipped]
        assert float(moves.max()) < 1.001  # to a neighbor, and not beyond


def test_equal_seeds_give_equal_weights_and_others_do_not(
    make_net: Make, assemble: Assemble
) -> None:
    network, placement = assemble(make_net("residual"), [images(16, seed=1)], bits=4)
    first, again, other = (
        reconstructed(network, placement, seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_block_that_comes_out_worse_stays_as_it_was(
    make_net: Make, assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, placement = assemble(make_net("residual"), [images(16, seed=1)], bits=4)

    def spoil_(roundings: Any, *others: Any, **settings: Any) -> None:
        for rounding in roundings:
            rounding.logits.data.neg_()  # the farther neighbors

    monkeypatch.setattr(reconstruction, "learn_", spoil_)
    changed, before = reconstructed(network, placement).state_dict(), network.quantized.state_dict()
    assert all(torch.equal(changed[name], before[name]) for name in before)


def test_layers_that_no_block_holds_are_rounded_one_by_one(
    make_net: Make, assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = []
    monkeypatch.setattr(
        reconstruction, "round_layer_", lambda layer, *others, after: rounded.append(layer)
    )
    network, placement = assemble(make_net("hourglass"), [images(16, seed=1)], bits=4)
    reconstructed(network, placement)
    assert len(rounded) == 10


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_onnxruntime_computes_what_torch_does(
    make_net: Make,
    make_task: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    brief = functools.partial(reconstruct_, learning=BRIEF)
    monkeypatch.setitem(ladder.REFINEMENTS, "block_reconstruction", brief)
    monkeypatch.setitem(ladder.EFFORTS, "best", ("block_reconstruction",))
    task, target = make_task(images(64, seed=1).split(16)), find_target("onnxruntime")
    stage = Quantize(effort="best", weight_bits=4).for_target(target)
    result = stage(make_net(name), task)
    assert result.facts["ladder"][1]["kept"]
    unseen = images(32, seed=2)
    outputs = target.load(target.export(result.model, task, tmp_path))(unseen)
    with torch.no_grad():
        expected = result.model(unseen)
    spread = (expected - expected.mean(0)).square().mean()
    assert float((outputs - expected).square().mean() / spread) < 1e-3
    assert float((outputs.flip(0) - expected).square().mean() / spread) > 0.1  # it can fail
