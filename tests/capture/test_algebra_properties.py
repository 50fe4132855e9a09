"""Random networks: whatever is removed of whatever is free, the pruned graph equals the masked one.

The graphs are put together operator by operator, without torch.export, and run in float64; the
reference is the original graph with zeros in the weights of all removed channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from slimdown.capture import Analysis, analyze
from slimdown.capture.dims import Kept, is_frozen, mask
from slimdown.prune.surgery import prune_graph

aten = torch.ops.aten
SIDE = 4
"""Height and width of all images."""

Draw = Callable[[Any], Any]


@dataclass
class Builder:
    """A graph that grows; every node knows its value, as those of torch.export know theirs."""

    draw: Draw
    graph: Graph = field(default_factory=Graph)
    root: nn.Module = field(default_factory=nn.Module)
    images: list[Node] = field(default_factory=list)
    """Nodes (N, C, SIDE, SIDE) that a later operator may read."""

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def one_of(self, values: list[Any]) -> Any:
        return self.draw(st.sampled_from(values))

    def call(self, op: Any, *args: Any) -> Node:
        node = self.graph.call_function(op, args)
        node.meta["val"] = op(*torch.fx.node.map_arg(args, lambda source: source.meta["val"]))
        return node

    def item(self, node: Node, index: int) -> Node:
        item = self.graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = node.meta["val"][index]
        return item

    def parameter(self, *shape: int) -> Node:
        name = f"p{len(list(self.root.parameters()))}"
        generator = torch.Generator().manual_seed(len(name) + sum(shape))
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.root.register_parameter(name, nn.Parameter(value))
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node


def channels_of(x: Node) -> int:
    return int(x.meta["val"].shape[1])


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# ------------------------------------------------------------------------------- the operators


def dense(b: Builder, x: Node) -> Node:
    k, size = b.integer(1, 8), b.one_of([1, 3])
    weight, bias = b.parameter(k, channels_of(x), size, size), b.parameter(k)
    return b.call(aten.conv2d.default, x, weight, bias, [1, 1], [size // 2] * 2)


def grouped(b: Builder, x: Node) -> Node:
    groups = b.one_of(divisors(channels_of(x)))
    weight = b.parameter(groups * b.integer(1, 3), channels_of(x) // groups, 1, 1)
    return b.call(aten.conv2d.default, x, weight, None, [1, 1], [0, 0], [1, 1], groups)


def depthwise(b: Builder, x: Node) -> Node:
    c = channels_of(x)
    weight = b.parameter(c * b.integer(1, 2), 1, 3, 3)
    return b.call(aten.conv2d.default, x, weight, None, [1, 1], [1, 1], [1, 1], c)


def activate(b: Builder, x: Node) -> Node:
    return b.call(aten.relu.default, x)


def scale(b: Builder, x: Node) -> Node:
    return b.call(aten.mul.Tensor, x, b.parameter(channels_of(x), 1, 1))


def shift(b: Builder, x: Node) -> Node:
    return b.call(aten.add.Tensor, x, b.parameter(1, channels_of(x), 1, 1))


def add(b: Builder, x: Node) -> Node:
    return b.call(aten.add.Tensor, x, b.one_of([y for y in b.images if same_channels(x, y)]))


def gate(b: Builder, x: Node) -> Node:
    return b.call(aten.mul.Tensor, x, b.one_of([y for y in b.images if same_channels(x, y)]))


def same_channels(x: Node, y: Node) -> bool:
    return channels_of(x) == channels_of(y)


def join(b: Builder, x: Node) -> Node:
    return b.call(aten.cat.default, [x, b.one_of(b.images)], 1)


def split_and_swap(b: Builder, x: Node) -> Node:
    first = b.integer(0, channels_of(x))
    parts = b.call(aten.split_with_sizes.default, x, [first, channels_of(x) - first], 1)
    return b.call(aten.cat.default, [b.item(parts, 1), b.item(parts, 0)], 1)


def halves(b: Builder, x: Node) -> Node:
    if channels_of(x) % 2:
        return x
    parts = b.call(aten.chunk.default, x, 2, 1)
    return b.call(aten.mul.Tensor, b.item(parts, 0), b.item(parts, 1))


def cut(b: Builder, x: Node) -> Node:
    start = b.integer(0, channels_of(x) - 1)
    return b.call(aten.slice.Tensor, x, 1, start, b.integer(start + 1, channels_of(x)))


def every_second(b: Builder, x: Node) -> Node:
    return b.call(aten.slice.Tensor, x, 1, 0, 2**63 - 1, 2)


def pad(b: Builder, x: Node) -> Node:
    return b.call(aten.pad.default, x, [0, 0, 0, 0, b.integer(0, 2), b.integer(0, 2)])


def shuffle(b: Builder, x: Node) -> Node:
    n, c, *space = x.meta["val"].shape
    groups = b.one_of(divisors(c))
    y = b.call(aten.view.default, x, [n, groups, c // groups, *space])
    return b.call(aten.reshape.default, b.call(aten.transpose.int, y, 1, 2), [n, c, *space])


def regroup(b: Builder, x: Node) -> Node:
    """(N, a·b, H, W) by way of (N, H, W, a, b) to (N, a, H, W)."""
    n, c, *space = x.meta["val"].shape
    outer = b.one_of(divisors(c))
    y = b.call(aten.permute.default, x, [0, 2, 3, 1])
    y = b.call(aten.view.default, y, [n, *space, outer, c // outer])
    y = b.call(aten.linear.default, y, b.parameter(1, c // outer))
    return b.call(aten.permute.default, b.call(aten.squeeze.dim, y, -1), [0, 3, 1, 2])


def by_tokens(b: Builder, x: Node) -> Node:
    n, c, *space = x.meta["val"].shape
    k = b.integer(1, 8)
    y = b.call(aten.transpose.int, b.call(aten.flatten.using_ints, x, 2), 1, 2)
    y = b.call(aten.linear.default, y, b.parameter(k, c), b.parameter(k))
    return b.call(aten.view.default, b.call(aten.transpose.int, y, 1, 2), [n, k, *space])


def copies(b: Builder, x: Node) -> Node:
    if channels_of(x) > 8:
        return x
    times = b.integer(1, 3)
    if b.one_of([True, False]):
        return b.call(aten.repeat.default, x, [1, times, 1, 1])
    return b.call(aten.repeat_interleave.self_int, x, times, 1)


OPERATORS = [
    dense,
    grouped,
    depthwise,
    activate,
    scale,
    shift,
    add,
    gate,
    join,
    split_and_swap,
    halves,
    cut,
    every_second,
    pad,
    shuffle,
    regroup,
    by_tokens,
    copies,
]


# ------------------------------------------------------------------------------- the properties


@st.composite
def networks(draw: Draw) -> GraphModule:
    """An image (2, 3, 4, 4), some operators, and a linear layer over all that came out."""
    b = Builder(draw)
    x = b.graph.placeholder("x")
    x.meta["val"] = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    x = b.call(aten.conv2d.default, x, b.parameter(b.integer(2, 8), 3, 1, 1))
    for operator_ in draw(st.lists(st.sampled_from(OPERATORS), min_size=1, max_size=8)):
        b.images.append(x)
        x = operator_(b, x)
    x = b.call(aten.flatten.using_ints, b.call(aten.clone.default, x), 1)
    x = b.call(aten.linear.default, x, b.parameter(3, channels_of(x)), b.parameter(3))
    b.graph.output((x,))
    return GraphModule(b.root, b.graph)


def masked(analysis: Analysis, kept: Kept) -> dict[str, Tensor]:
    """The parameters with zeros in the place of the removed channels."""
    state = {name: p.detach().clone() for name, p in analysis.parameters.items()}
    for name, shape in analysis.tensors.items():
        for axis, dim in enumerate(shape):
            gone = (~mask(dim, kept)).nonzero().flatten()
            state[name].index_fill_(axis, gone, 0)
    return state


def run(graph_module: GraphModule, state: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(graph_module, state, (x,))[0]


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(network=networks(), seed=st.integers(0, 2**16))
def test_the_pruned_graph_equals_the_masked_one(random_choice, network, seed):
    analysis = analyze(network)
    generator = torch.Generator().manual_seed(seed)
    kept = random_choice(analysis, generator)
    pruned = prune_graph(analysis, kept)
    x = torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        reference = run(network, masked(analysis, kept), x)
        torch.testing.assert_close(pruned(x)[0], reference, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(network=networks())
def test_keeping_everything_changes_nothing(network):
    analysis = analyze(network)
    pruned = prune_graph(analysis, {})
    assert pruned.code == network.code
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(pruned.parameters(), network.parameters(), strict=True)
    )
    assert analysis.count_parameters({}) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("operator_", OPERATORS)
def test_every_operator_leaves_something_to_remove(operator_):
    """So that the properties above are about something."""

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        b = Builder(data.draw)
        x = b.graph.placeholder("x")
        x.meta["val"] = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
        x = b.call(aten.conv2d.default, x, b.parameter(6, 3, 1, 1))
        b.images.append(x)
        x = dense(b, operator_(b, x))
        b.graph.output((x,))
        analysis = analyze(GraphModule(b.root, b.graph))
        free = [leaf for leaf in analysis.channels if not is_frozen(leaf)]
        assert free, operator_.__name__

    check()
