"""From a float graph to a quantized one: quantizers put in, their grids set from images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from slimdown.errors import BadInput
from slimdown.quantize.calibrate import Calibration
from slimdown.quantize.grids import round_biases_, set_activation_grids_, set_weight_grids_
from slimdown.quantize.observe import RangeStatistics, observe
from slimdown.quantize.placement import Placement, insert_quantizers, observed_nodes


@dataclass(frozen=True, kw_only=True)
class Network:
    """A quantized network and the float one that it stands for; equal names of nodes."""

    reference: GraphModule
    quantized: GraphModule
    """Shares no tensor with the reference."""
    placement: Placement
    """Where the quantizers stand."""
    ranges: Mapping[str, RangeStatistics]
    """Producer -> what was seen of its values."""
    num_images: int
    """How many images the ranges are of."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Makes quantized networks of float graphs with the same nodes."""

    placement: Placement
    labels: Mapping[str, str]
    """Name of a node -> what users call it."""
    calibration: Calibration
    images: Callable[[], Iterable[Tensor]]
    """The calibration images, (N, C, H, W) on the graph's device, from their beginning."""
    after_batch: Callable[[int], None]
    """Gets the number of images that have been looked at."""

    def __call__(self, reference: GraphModule) -> Network:
        """Raises BadInput where there are no images, or activations that are not finite."""
        num_images = 0

        def count(so_far: int) -> None:
            nonlocal num_images
            num_images = so_far
            self.after_batch(so_far)

        nodes = observed_nodes(reference, self.placement)
        ranges = observe(reference, nodes, self.images(), labels=self.labels, after_batch=count)
        if num_images == 0:
            raise BadInput(
                "the task has no calibration images: the ranges of activations need a few dozen; "
                "give the data a training or a calibration split"
            )
        quantized = insert_with_grids(
            copy.deepcopy(reference), self.placement, ranges, self.calibration
        )
        round_biases_(quantized)
        return Network(
            reference=reference,
            quantized=quantized,
            placement=self.placement,
            ranges=ranges,
            num_images=num_images,
        )


def insert_with_grids(
    reference: GraphModule,
    placement: Placement,
    ranges: Mapping[str, RangeStatistics],
    calibration: Calibration,
) -> GraphModule:
    """The reference with quantizers and their grids put in; it shares the reference's tensors."""
    quantized = insert_quantizers(reference, placement).eval()
    set_activation_grids_(quantized, placement, ranges, calibration)
    set_weight_grids_(quantized, placement)
    return quantized
