"""Running two graphs side by side over all images, with no more in memory than a step needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture import Analysis, has_dynamic_batch
from slimdown.images import as_input
from slimdown.prune.running import Run

MAX_BYTES = 2**30
"""Of all activations alive at once, 1 GB: fewer images are used where they would need more."""
MAX_BATCH_BYTES = 2**26
"""Of those of one batch: the room that single operators need beside them."""
HELD_OUT = 8
"""Of so many batches one is held out."""


class Stream(Run):
    """One graph's values for several batches at once, each kept until its last use."""

    def __init__(self, graph_module: GraphModule, batches: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self.batches = batches
        self.values: list[dict[Node, Any]] = [{} for _ in batches]

    def step(self, node: Node) -> None:
        """Compute one node for all batches."""
        for values, batch in zip(self.values, self.batches, strict=True):
            self.env = values
            if node.op == "placeholder":
                values[node] = batch.clone()  # the graph may write into it
            else:
                values[node] = self.run_node(node)
            for used in self.user_to_last_uses.get(node, ()):
                del values[used]

    def has(self, node: Node) -> bool:
        """Whether the node's values are at hand: computed, and still to be used."""
        return node in self.values[0]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in batches (N, C, H, W): those to learn from, and those held out."""

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    mirrored: bool = False
    """Whether the second half of those to learn from are the first half, mirrored."""


def arrange(analysis: Analysis, batches: Sequence[Tensor], *, mirror: bool = False) -> Images:
    """Images as the graph takes them, in batches that are small and all fit into memory.

    Of the graph's own size where that is fixed. Where mirrored images fit too, they are added to
    those to learn from: as good as new ones.
    """
    is_dynamic = has_dynamic_batch(analysis.graph_module)
    size = 1 if is_dynamic else analysis.batch_size
    peak = peak_bytes(analysis)
    room = max(2 * size, MAX_BYTES // peak)
    whole = as_input(torch.cat(list(batches))[:room], analysis.graph_module)
    whole = whole[: len(whole) // size * size]
    count = len(whole) // size
    if is_dynamic:
        count = min(count, max(HELD_OUT, math.ceil(count * peak / MAX_BATCH_BYTES)))
    parts = torch.tensor_split(whole, max(1, count))
    chosen = range(len(parts))[HELD_OUT - 1 :: HELD_OUT] or range(len(parts))[1:][-1:]
    held_out = tuple(parts[index] for index in chosen)
    train = tuple(part for index, part in enumerate(parts) if index not in chosen)
    mirror = mirror and 2 * len(whole) <= room
    if mirror:
        train += tuple(part.flip(-1) for part in train)
    return Images(train=train, held_out=held_out, mirrored=mirror)


def peak_bytes(analysis: Analysis) -> int:
    """The most bytes of activations alive at once that one image takes in both graphs.

    Of the pruned graph as if it were not: that leaves room for copies.
    """
    run = Run(analysis.graph_module)
    alive: dict[Node, int] = {}
    peak = 0
    for node in analysis.graph_module.graph.nodes:
        if node.op != "get_attr":
            volume = math.prod(dim.size for dim in analysis.shapes.get(node, ()))
            alive[node] = volume * 4 // analysis.batch_size
        peak = max(peak, sum(alive.values()))
        for used in run.user_to_last_uses.get(node, ()):
            alive.pop(used, None)
    return max(1, 2 * peak)
