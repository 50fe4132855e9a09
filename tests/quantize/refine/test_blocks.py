from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

from slimdown.capture import capture
from slimdown.quantize.families import LAYERS, family_of
from slimdown.quantize.placement import label_of
from slimdown.quantize.refine import blocks
from slimdown.quantize.refine.blocks import find_blocks, find_cuts


@pytest.fixture
def blocks_of(make_net: Callable[[str], nn.Module]) -> Callable[[str], list[tuple[str, ...]]]:
    """The layers of each block of a network, as users call them."""

    def find(name: str) -> list[tuple[str, ...]]:
        graph = capture(make_net(name), torch.randn(1, 3, 16, 16)).graph
        labels = {node.name: label_of(node) for node in graph.nodes if family_of(node) in LAYERS}
        found = find_blocks(graph, labels)
        return [tuple(labels[name] for name in block.layers) for block in found]

    return find


BlocksOf = Callable[[str], list[tuple[str, ...]]]


def test_layers_in_a_row_are_joined_by_three(blocks_of: BlocksOf) -> None:
    assert blocks_of("chain") == [("a", "b", "c"), ("d",), ("head",)]


def test_what_lies_beside_a_shortcut_is_a_block(blocks_of: BlocksOf) -> None:
    assert blocks_of("residual") == [("stem",), ("a", "b", "down"), ("c", "d"), ("head",)]


def test_attention_lies_in_one_block(blocks_of: BlocksOf) -> None:
    layers = [
        tuple(f"layers.{index}.{name}" for name in names)
        for index in range(2)
        for names in (("q", "k", "v", "proj"), ("fc1", "fc2"))
    ]
    assert blocks_of("vit") == [("patch",), *layers, ("head",)]


def test_where_no_single_tensor_passes_there_is_no_block(
    blocks_of: BlocksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = ("up.4", "up.5", "last")
    assert blocks_of("hourglass") == [("stem",), last]
    monkeypatch.setattr(blocks, "MOST_LAYERS", 10)
    between = (*(f"down.{index}" for index in range(6)), *(f"up.{index}" for index in range(4)))
    assert blocks_of("hourglass") == [("stem",), between, last]


def test_behind_the_fork_to_two_outputs_there_is_no_block(blocks_of: BlocksOf) -> None:
    assert blocks_of("two heads") == [("a", "b")]


def test_a_block_ends_behind_its_activation_and_before_a_pooling(
    make_net: Callable[[str], nn.Module],
) -> None:
    graph = capture(make_net("residual"), torch.randn(1, 3, 16, 16)).graph
    nodes = {node.name: node for node in graph.nodes}
    layers = [name for name, node in nodes.items() if family_of(node) in LAYERS]
    ends = [str(nodes[block.end].target) for block in find_blocks(graph, layers)]
    assert ends == ["aten.relu.default"] * 2 + ["aten.relu_.default", "aten.linear.default"]


@pytest.mark.parametrize("seed", range(20))
def test_cuts_are_the_nodes_without_which_nothing_reaches_the_output(seed: int) -> None:
    graph = random_graph(random.Random(seed))
    (image,) = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    needed = [
        node
        for node in graph.nodes
        if node is not output and not can_reach(image, output, without=node)
    ]
    assert find_cuts(graph) == needed
    assert len(needed) > 1  # the image and one more


def random_graph(chance: random.Random) -> Graph:
    """Sums of one or two nodes before, some of which nobody reads, and constants among them."""
    graph = Graph()
    values = [graph.placeholder("x")]
    for _ in range(14):
        first, second = (values[-1 - min(chance.randrange(3), len(values) - 1)] for _ in range(2))
        if chance.random() < 0.2:
            second = graph.get_attr("constant")
        values.append(graph.call_function(torch.add, (first, second)))
    graph.output(values[-1])
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = torch.zeros(1, 2)
    return graph


def can_reach(node: Node, goal: Node, *, without: Node) -> bool:
    """Depth first, along the readers."""
    if node is without:
        return False
    return node is goal or any(can_reach(reader, goal, without=without) for reader in node.users)
