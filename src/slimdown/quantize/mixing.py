"""One network in many precisions: some layers with other bits than the recipe gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from slimdown.quantize.assembly import Network, insert_with_grids
from slimdown.quantize.calibrate import Calibration
from slimdown.quantize.grids import round_biases_
from slimdown.quantize.observe import RangeStatistics
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine.bias_correction import correct_biases_
from slimdown.quantize.refine.layers import find_layers

FLOAT = 32
"""Bits of a layer that is not quantized."""

Plan: TypeAlias = Callable[[Mapping[str, int]], Placement]
"""The placement as the recipe has it, but for layers (by label) with so many bits, or `FLOAT`."""


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Makes networks like `network` in which some layers have more bits, or are in float.

    What was observed holds for all of them, so that no image is calibrated with again.
    """

    network: Network
    """As the recipe wants it."""
    plan: Plan
    calibration: Calibration
    is_refined: bool
    """Whether weights or biases of `network` are other than its reference's. If so, they are kept
    where the bits of a weight stay what they are, and biases are corrected anew."""
    images: Sequence[Tensor]
    """(N, C, H, W) each, that biases are corrected with."""

    def __call__(self, bits: Mapping[str, int]) -> Network:
        """The network with these bits, label -> 2 to 8 or `FLOAT`."""
        placement, reference = self.plan(bits), self.network.reference
        ranges = ranges_for(placement, self.network)
        quantized = insert_with_grids(copy.deepcopy(reference), placement, ranges, self.calibration)
        if self.is_refined:
            copy_weights_(quantized, placement, self.network)
            correct_biases_(quantized, reference, placement, self.images)
        round_biases_(quantized)
        return replace(self.network, quantized=quantized, placement=placement, ranges=ranges)


def ranges_for(placement: Placement, network: Network) -> dict[str, RangeStatistics]:
    """What a network has seen of the activations of a placement with no more quantizers than its.

    A part of a concatenation that has a quantizer of its own here gets what was seen of the whole.
    """
    owners = {
        name: producer
        for producer, behind in network.placement.activations.items()
        for name in behind
    }
    return {producer: network.ranges[owners[producer]] for producer in placement.activations}


@torch.no_grad()
def copy_weights_(quantized: GraphModule, placement: Placement, refined: Network) -> None:
    """Give layers whose weights have the levels they had the weights that were refined."""
    found = find_layers(refined.quantized, refined.reference, refined.placement)
    refined_layers = {node.name: layer for node, layer in found.items()}
    for node, layer in find_layers(quantized, refined.reference, placement).items():
        ranges = (each.weight_ranges[node.name] for each in (placement, refined.placement))
        if len(set(ranges)) == 1:
            layer.weight.copy_(refined_layers[node.name].weight)
            layer.quantizer.scale.copy_(refined_layers[node.name].quantizer.scale)
