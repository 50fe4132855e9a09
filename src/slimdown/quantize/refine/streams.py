"""The float graph and the quantized one side by side, each over all images, node by node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.prune.compensation.streams import Stream
from slimdown.quantize.families import family_of

MAX_BYTES = 2**30
"""Of all activations alive at once, 1 GB: fewer images are used where they would need more."""
IMAGES_AT_ONCE = 16
"""In a batch: so that single operators need little room beside."""


class Streams:
    """What both graphs compute for the same images, each value kept until its last use."""

    def __init__(
        self,
        quantized: GraphModule,
        reference: GraphModule,
        images: Sequence[Tensor],
        *,
        at_once: int = IMAGES_AT_ONCE,
    ) -> None:
        batches = list(torch.split(_arrange(quantized, reference, images), at_once))
        self.quantized = Stream(quantized, batches)
        self.reference = Stream(reference, batches)
        self._twins = {node.name: node for node in reference.graph.nodes}

    def twin(self, node: Node) -> Node | None:
        """The node of the reference with this one's name; None for a quantizer."""
        return self._twins.get(node.name)

    def step_reference(self, node: Node) -> None:
        """Compute the twin of a node of the quantized graph for all batches."""
        if (twin := self.twin(node)) is not None:
            self.reference.step(twin)

    def step_quantized(self, node: Node) -> None:
        """Compute a node of the quantized graph for all batches."""
        self.quantized.step(node)

    def errors(self, node: Node) -> list[Tensor]:
        """What a layer's output lacks, averaged over positions, (images, C) a batch."""
        found = []
        pairs = zip(self.reference.values, self.quantized.values, strict=True)
        for theirs, ours in pairs:
            lack = (theirs[self._twins[node.name]] - ours[node]).movedim(
                1 if is_conv(node) else -1, -1
            )
            found.append(lack.reshape(len(lack), -1, lack.shape[-1]).mean(1))
        return found


def _arrange(quantized: GraphModule, reference: GraphModule, images: Sequence[Tensor]) -> Tensor:
    """As many images as fit into memory, in one tensor."""
    together = torch.cat(list(images))
    peak = sum(_peak_bytes(graph, together[:1]) for graph in (quantized, reference))
    count = max(1, MAX_BYTES // max(1, peak))
    return together[:count]


@torch.no_grad()
def _peak_bytes(graph_module: GraphModule, image: Tensor) -> int:
    """The most bytes of activations alive at once that one image takes."""
    stream, peak = Stream(graph_module, [image]), 0
    for node in graph_module.graph.nodes:
        stream.step(node)
        alive = [
            value
            for owner, value in stream.values[0].items()
            if owner.op != "get_attr" and isinstance(value, Tensor)
        ]
        peak = max(peak, sum(value.numel() * value.element_size() for value in alive))
    return peak


def is_conv(node: Node) -> bool:
    """Whether a layer's channels are on axis 1, those of a linear layer being the last."""
    return family_of(node) == "conv"
