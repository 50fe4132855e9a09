"""Which stretches of a graph are blocks: they begin and end where one tensor is all that passes.

A cut is a node that every path from the image to an output goes through, so a residual block or an
attention with its shortcut lies between two cuts, and a chain has a cut behind each operator.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Graph, Node

MOST_IN_A_ROW = 3
"""Layers in a row that make a block together, as in an inverted residual without its shortcut."""
MOST_LAYERS = 8
"""Of a block; where more lie between two cuts, as in a U-Net, there is no block."""

_SIZES = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The nodes behind `start` and up to `end`, in the graph's order; told by their names."""

    start: str
    end: str
    layers: tuple[str, ...]


def find_blocks(graph: Graph, layers: Collection[str]) -> list[Block]:
    """The blocks that hold any of the named layers, in their order; each layer is in one at most.

    Several layers between neighboring cuts are a block by themselves; single ones in a row are
    joined, up to `MOST_IN_A_ROW`. What has no layer ends the block before it, or begins the next
    one where it makes the tensor smaller or larger, as pooling does. Layers that no block holds
    have no cuts near. Nodes need `meta["val"]`, as captured graphs have it.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    named = [node for node in graph.nodes if node.name in layers]
    groups: list[list[Block]] = []
    for start, end in pairwise(find_cuts(graph)):
        inside = [n.name for n in named if position[start] < position[n] <= position[end]]
        stretch = Block(start=start.name, end=end.name, layers=tuple(inside))
        if groups and _belongs(stretch, groups[-1], keeps_size=_size(start) == _size(end)):
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    return [block for block in map(_join, groups) if 0 < len(block.layers) <= MOST_LAYERS]


def find_cuts(graph: Graph) -> list[Node]:
    """The nodes that give one tensor of numbers and that all paths from the image go through."""
    flow = _flow(graph)
    position = {node: index for index, node in enumerate(flow)}
    cuts, furthest = [], 0
    for index, node in enumerate(flow):
        # None of the nodes before is read behind this one: no path goes around it.
        if furthest <= index and _is_numbers(node):
            cuts.append(node)
        furthest = max(furthest, *(position.get(reader, 0) for reader in node.users), index)
    return cuts


def _flow(graph: Graph) -> list[Node]:
    """The nodes that carry the image to the output, in order; sizes read from it carry nothing."""
    reached: set[Node] = set()
    for node in graph.nodes:
        is_fed = node.op == "placeholder" or reached.intersection(node.all_input_nodes)
        if is_fed and not isinstance(node.meta.get("val"), _SIZES):
            reached.add(node)
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or needed.intersection(node.users):
            needed.add(node)
    return [node for node in graph.nodes if node in reached and node in needed]


def _belongs(stretch: Block, group: list[Block], *, keeps_size: bool) -> bool:
    """Whether a stretch is joined to those before it."""
    counts = [len(each.layers) for each in group]
    if not any(counts):
        return True
    if not stretch.layers:
        return keeps_size
    is_row = max(counts) == len(stretch.layers) == 1
    return is_row and sum(counts) < MOST_IN_A_ROW


def _join(group: list[Block]) -> Block:
    layers = tuple(name for stretch in group for name in stretch.layers)
    return Block(start=group[0].start, end=group[-1].end, layers=layers)


def _is_numbers(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(node: Node) -> int | None:
    """Values for each image; None where that depends on the batch."""
    sizes = node.meta["val"].shape[1:]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
