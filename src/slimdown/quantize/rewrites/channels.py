"""Which channels of a graph must be scaled together for it to compute the same.

A layer or an affine norm can multiply each channel that it makes, and the layers that read the
channel can divide by the same number, as long as all between them commutes with a positive factor.
To find such channels one image is run through the graph, and beside each tensor runs another of its
shape that holds a *label* for each value: the number of the channel whose factor the value would
carry. What moves values moves labels, too; a sum makes its operands' labels one (a union-find);
and what does not commute with factors makes the labels of its inputs `FIXED`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from slimdown.quantize.families import family_of
from slimdown.quantize.fold import attributes_of, count_uses
from slimdown.quantize.rewrites.makers import channel_axis, is_norm, is_own, tensors_of

aten = torch.ops.aten

FIXED = 0
"""The label of values that nothing may be multiplied by."""
ZERO = -1
"""The label of padding: zero times any factor is zero."""

Labels: TypeAlias = Any
"""Of one value of the graph: a tensor of whole numbers, or a list of them."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The channels of a graph that can be scaled, numbered from 1; 0 stands for all others."""

    count: int
    """How many numbers there are, with 0."""
    made: dict[str, Tensor]
    """Layer or norm -> (C,) the numbers of the channels that it makes."""
    read: dict[str, Tensor]
    """Layer -> (C_in,) the numbers of the channels that it reads."""
    can_shift: Tensor
    """(count,) bool: whether a constant can be added to the channel as well as a factor.

    It is made by norms with a bias and read by linear layers with one, and only moved between.
    """


def find_channels(graph_module: GraphModule, image: Tensor) -> Channels:
    """Find the channels that can be scaled, by running one image (1, C, H, W) through the graph."""
    trace = _Trace(graph_module)
    with torch.no_grad():
        trace.run(image.clone())
    channels = trace.number_channels()
    count = int(channels.max()) + 1
    can_shift = torch.ones(count, dtype=torch.bool)
    can_shift[channels[sorted(trace.bent)]] = False
    can_shift[FIXED] = False
    return Channels(
        count=count,
        made={name: channels[labels] for name, labels in trace.made.items()},
        read={name: channels[labels] for name, labels in trace.read.items()},
        can_shift=can_shift,
    )


class _Merges:
    """A union-find over labels; the least label of a set stands for it, so FIXED for its own."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def add(self, count: int) -> Tensor:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def find(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = label = self._parents[self._parents[label]]
        return label

    def merge(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parents[high] = low

    def roots(self) -> Tensor:
        return torch.tensor([self.find(label) for label in range(len(self._parents))])


class _Trace(Interpreter):
    """Runs a graph on an image, and labels beside it (float32, in which max and pad exist)."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.attributes = attributes_of(graph_module)
        self.uses = count_uses(graph_module)
        self.merges = _Merges()
        self.labels: dict[Node, Labels] = {}
        self.made: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        self.bent: set[int] = set()
        """Labels that met what does not commute with added constants."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor | list | tuple):
            self.labels[n] = self._label(n, value)
        for spent in self.user_to_last_uses.get(n, ()):
            self.labels.pop(spent, None)
        return value

    def number_channels(self) -> Tensor:
        """For each label: from 1 on for those that are both made and read, FIXED for others."""
        roots = self.merges.roots()
        is_made, is_read = (torch.zeros(len(roots), dtype=torch.bool) for _ in range(2))
        for labels in self.made.values():
            is_made[roots[labels]] = True
        for labels in self.read.values():
            is_read[roots[labels]] = True
        is_channel = is_made & is_read
        is_channel[FIXED] = False
        return torch.where(is_channel, is_channel.cumsum(0), FIXED)[roots]

    # ------------------------------------------------------------------------ what rules may do

    def of(self, node: Any) -> Tensor:
        """The labels of an operand; numbers have none."""
        labels = self.labels.get(node) if isinstance(node, Node) else None
        return labels if isinstance(labels, Tensor) else torch.tensor(float(FIXED))

    def fix(self, *labels: Labels) -> None:
        for each in labels:
            for one in _distinct(each):
                self.merges.merge(one, FIXED)

    def is_fixed(self, labels: Tensor) -> bool:
        return all(self.merges.find(one) == FIXED for one in _distinct(labels))

    def along(self, labels: Tensor, axes: Iterable[int]) -> Tensor | None:
        """One label for all positions of `axes`, kept at size 1; None where they differ."""
        dims = {axis % labels.ndim for axis in axes}
        compact = _compact(labels)
        top = compact.amax(tuple(dims), keepdim=True) if dims else compact
        if not bool(((compact == top) | (compact == ZERO)).all()):
            return None
        return top.expand([1 if dim in dims else size for dim, size in enumerate(labels.shape)])

    def sum_of(self, one: Tensor, other: Tensor) -> Tensor:
        """Make the labels of two operands one, where neither is of padding."""
        one, other = _compact(one), _compact(other)
        zeros = torch.zeros_like(one) + torch.zeros_like(other)
        one, other = one + zeros, other + zeros  # of one shape
        differ = (one != other) & (one != ZERO) & (other != ZERO)
        if bool(differ.any()):
            pairs = zip(one[differ].tolist(), other[differ].tolist(), strict=True)
            for low, high in set(pairs):
                self.merges.merge(int(low), int(high))
        return torch.where(one == ZERO, other, one)

    def moved(self, node: Node) -> Labels:
        """Run the operator on the labels themselves."""
        args, kwargs = map_arg((node.args, node.kwargs), self._label_or_value)
        # Labels may lie in memory otherwise than the values, of which a view was possible.
        target = aten.reshape.default if node.target is aten.view.default else node.target
        assert callable(target)
        return target(*args, **kwargs)

    def _label_or_value(self, node: Node) -> Any:
        return self.labels.get(node, self.env[node])

    # -------------------------------------------------------------------------------------------

    def _label(self, node: Node, value: Any) -> Labels:
        if node.op in ("placeholder", "get_attr"):
            return _fixed_like(value)
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            source, place = self.labels.get(node.args[0]), node.args[1]
            if isinstance(source, list | tuple) and isinstance(place, int):
                return source[place]
            return _fixed_like(value)
        inputs = [self.labels.get(source) for source in node.all_input_nodes]
        rule = _RULES.get(node.target) or (_make if channel_axis(node) is not None else None)
        labels = None
        if rule is not None and isinstance(value, Tensor):
            labels = rule(self, node, value)
        elif family_of(node) in ("move", "identity"):
            labels = self.moved(node)
        if labels is None:
            self.fix(*inputs)
            return _fixed_like(value)
        if not _commutes_with_constants(node):
            for each in inputs:
                self.bent.update(_distinct(each))
        return labels


def _commutes_with_constants(node: Node) -> bool:
    """Whether what is added to a channel of the input can be taken off behind the node."""
    if family_of(node) == "linear":
        return tensors_of(node)[1] is not None
    is_moved = family_of(node) in ("move", "identity") and node.target not in _RULES
    return is_moved or is_norm(node) or node.target is aten.mean.dim


def _distinct(labels: Labels) -> list[int]:
    """The labels that occur, without that of padding."""
    if isinstance(labels, Tensor):
        return [int(one) for one in torch.unique(_compact(labels)).tolist() if one != ZERO]
    return [one for each in labels or () for one in _distinct(each)]


def _compact(labels: Tensor) -> Tensor:
    """With size 1 on the axes that it was expanded along: labels seldom differ by position."""
    return labels[tuple(slice(1) if step == 0 else slice(None) for step in labels.stride())]


def _fixed_like(value: Any) -> Labels:
    if isinstance(value, Tensor):
        return torch.tensor(float(FIXED), device=value.device).expand(value.shape)
    return [_fixed_like(each) for each in value] if isinstance(value, list | tuple) else None


# ------------------------------------------------------------------------------------ operators

Rule: TypeAlias = Callable[[_Trace, Node, Tensor], Tensor | None]
"""The labels of what a node gives; None where its inputs must stay as they are."""


def _make(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """A layer or a norm: reads channels, and makes others."""
    axis = channel_axis(node)
    if axis is None or not is_own(node, trace.attributes, trace.uses):
        return None
    labels = trace.of(node.args[0])
    if is_norm(node):
        trace.fix(labels)
    else:
        others = [dim for dim in range(labels.ndim) if dim != axis % labels.ndim]
        channels = trace.along(labels, others)
        if channels is None:
            return None
        trace.read[node.name] = channels.flatten().long().clamp(min=FIXED)
    made = trace.merges.add(value.shape[axis])
    trace.made[node.name] = made
    if not (is_norm(node) and tensors_of(node)[1] is not None):
        trace.bent.update(made.tolist())
    shape = [-1 if dim == axis % value.ndim else 1 for dim in range(value.ndim)]
    return made.to(value.device, torch.float32).view(shape).expand(value.shape)


def _keep(trace: _Trace, node: Node, value: Tensor) -> Tensor:
    """f(s x) = s f(x) for s > 0, value by value."""
    return trace.of(node.args[0]).expand(value.shape)


def _move(trace: _Trace, node: Node, value: Tensor) -> Tensor:
    moved: Tensor = trace.moved(node)
    return moved


def _pool(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """Maxima and means over height and width."""
    labels = trace.of(node.args[0])
    channels = trace.along(labels, range(2, labels.ndim))
    return None if channels is None else channels.expand(value.shape)


def _reduce(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """Maxima and means over some axes."""
    labels, axes = trace.of(node.args[0]), node.args[1] if len(node.args) > 1 else None
    places = axes if isinstance(axes, Sequence) and axes else range(labels.ndim)
    channels = trace.along(labels, places)  # type: ignore[arg-type]
    return None if channels is None else channels.reshape(value.shape)


def _add(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """A sum of activations; a number has no factor that it could take."""
    if not all(isinstance(operand, Node) for operand in node.args[:2]):
        return None
    return trace.sum_of(*(trace.of(operand) for operand in node.args[:2])).expand(value.shape)


def _multiply(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """A product with what has no factor of its own: a gate, a number, a stored scale."""
    one, other = (trace.of(operand) for operand in node.args[:2])
    if trace.is_fixed(other):
        return one.expand(value.shape)
    if trace.is_fixed(one) and node.target in (aten.mul.Tensor, aten.mul_.Tensor):
        return other.expand(value.shape)
    return None


def _pad(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """Zeros around a value; any other padding is a constant, which has no factor."""
    widths = node.args[1]
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    filling = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    if mode != "constant" or filling:
        return None
    assert isinstance(widths, Sequence)
    padded: Tensor = aten.pad.default(trace.of(node.args[0]), widths, "constant", float(ZERO))
    return padded


def _average(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """attention (..., M, L) @ values (..., L, D): sums over the positions L of each channel."""
    weights, values = (trace.of(operand) for operand in node.args[:2])
    return _average_over_positions(trace, [weights], values, value)


def _attend(trace: _Trace, node: Node, value: Tensor) -> Tensor | None:
    """Queries and keys decide the weights, so they stay; the values are averaged."""
    queries, keys, values = (trace.of(operand) for operand in node.args[:3])
    return _average_over_positions(trace, [queries, keys], values, value)


def _average_over_positions(
    trace: _Trace, weights: Sequence[Tensor], values: Tensor, value: Tensor
) -> Tensor | None:
    channels = trace.along(values, [-2]) if values.ndim >= 2 else None
    if channels is None:
        return None
    trace.fix(*weights)
    return channels.expand(value.shape)


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.relu.default,
            aten.relu_.default,
            aten.leaky_relu.default,
            aten.leaky_relu_.default,
            aten.abs.default,
            aten.neg.default,
        ),
        _keep,
    ),
    **dict.fromkeys((aten.cat.default, aten.stack.default, aten.roll.default), _move),
    **dict.fromkeys(
        (
            aten.max_pool2d.default,
            aten.avg_pool2d.default,
            aten.adaptive_avg_pool2d.default,
            aten.adaptive_max_pool2d.default,
            aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec,
        ),
        _pool,
    ),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), _reduce),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor), _add),
    **dict.fromkeys((aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor), _multiply),
    aten.pad.default: _pad,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _average),
    aten.scaled_dot_product_attention.default: _attend,
}
"""Operator -> rule, beside layers, norms and moves; all others keep what they read fixed."""
