"""How much the outputs suffer when one layer alone is quantized.

Label-free, in a float network in which only the quantizers of that one layer stand: of its weight,
of what it reads, and of what it writes where the runtime wants that. Squares of such errors nearly
add up to that of the whole network, so that they tell what is gained by giving a layer more bits.
The error of a network in which all but one layer are quantized tells less: that of the others
drowns it, and a value that two layers read in INT8 is as bad after either of them is left out.
After Wu 2020, arXiv:2004.09602, section 6, which leaves one layer at a time quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from slimdown.quantize.assembly import Network, insert_with_grids
from slimdown.quantize.calibrate import Calibration
from slimdown.quantize.judge import Judge
from slimdown.quantize.observe import RangeStatistics
from slimdown.quantize.placement import Placement

FLOAT = 32
"""Bits of a layer that is not quantized."""

MOST_IMAGES = 32
"""The error is a mean over all outputs of all images, so that few are enough."""

Plan: TypeAlias = Callable[[Mapping[str, int]], Placement]
"""The placement as the recipe has it, but for layers (by label) with so many bits, or `FLOAT`."""


def measure_alone(
    network: Network,
    labels: Sequence[str],
    *,
    plan: Plan,
    calibration: Calibration,
    images: Sequence[Tensor],
    after: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[int, float]]:
    """For each label the error of the outputs at the bits it has and, below 8, also at 8 bits.

    `labels` are all that reads INT8. Of `images`, (N, C, H, W) each, the first `MOST_IMAGES` are
    looked at. Two forward passes at most for each label; `after` gets the number of labels done.
    """
    judge = Judge(network.reference, first_images(images, MOST_IMAGES))

    def error(placement: Placement) -> float:
        ranges = ranges_for(placement, network)
        return judge.error(insert_with_grids(network.reference, placement, ranges, calibration))

    found = {}
    for done, label in enumerate(labels, 1):
        others = {other: FLOAT for other in labels if other != label}
        as_asked, at_8_bits = plan(others), plan({**others, label: 8})
        found[label] = {fewest_bits(as_asked): error(as_asked)}
        if at_8_bits != as_asked:
            found[label][8] = error(at_8_bits)
        after(done)
    return found


def fewest_bits(placement: Placement) -> int:
    """The bits of the coarsest quantizer."""
    ranges = (*placement.weight_ranges.values(), *placement.activation_ranges.values())
    return min((high - low).bit_length() for low, high in ranges)


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


def first_images(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first `count` images, in batches as they came."""
    taken: list[Tensor] = []
    for batch in batches:
        if count > 0:
            taken.append(batch[:count])
            count -= len(batch)
    return taken
