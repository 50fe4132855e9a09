"""The latency of a network as a function of its widths, from a table of timed operators.

Convolutions, linear layers and products of activations are timed alone at a few widths of what
goes in and what comes out, full, half and an eighth, and interpolated between. What a network
takes beyond them (norms, activations, copies) is spread over its other operators by the number of
values that they write. Such a table as in ProxylessNAS and NetAdapt: Cai 2019, arXiv:1812.00332;
Yang 2018, arXiv:1804.03230.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.fx import Node

from slimdown.capture import Analysis
from slimdown.capture.call import Shape, arguments_of, operator_name
from slimdown.core import Clock, Operation
from slimdown.prune.budget.cost import (
    Cost,
    Size,
    Term,
    Times,
    Widths,
    count_volumes,
    evaluate,
    leaves_of,
    size_of,
    times,
    volume_cost,
)

SHARES = (1, 1 / 2, 1 / 8)
FEW_SHARES = (1, 1 / 4)
"""At which shares of a width an operator is timed; the few where it has more than two widths."""

FEWEST_POINTS = 4
"""A width is timed at multiples of `round_to` unless fewer than this many of them fit in it."""

WITHOUT_WORK = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("expand", "expand_as", "alias", "detach", "select", "slice", "unbind", "split"),
        *("split_with_sizes", "chunk", "contiguous", "clone", "to", "_to_copy"),
        *("lift_fresh_copy", "dropout", "feature_dropout", "batch_norm"),
    }
)
"""Operators that a runtime folds away or that only look at values."""


@dataclass(frozen=True, kw_only=True)
class TimedOperator:
    """An `Operation` whose sizes follow from widths."""

    kind: Any  # one of Operation's
    shapes: tuple[tuple[Size, ...], ...]
    settings: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def coordinates(self) -> tuple[Size, ...]:
        """The sizes that change by themselves, such as channels in and channels out."""
        found: dict[Size, None] = {}
        for size in itertools.chain.from_iterable(self.shapes):
            for factor in size.factors if isinstance(size, Times) else (size,):
                if not isinstance(factor, int):
                    found[factor] = None
        return tuple(found)

    def at(self, sizes: Mapping[Size, int]) -> Operation:
        """The operation where its coordinates have these sizes."""
        shapes = (tuple(_fill(size, sizes) for size in shape) for shape in self.shapes)
        return Operation(kind=self.kind, shapes=tuple(shapes), settings=self.settings)


@dataclass(frozen=True)
class Table:
    """Milliseconds of an operator on a grid of the sizes of its coordinates."""

    coordinates: tuple[Size, ...]
    points: tuple[tuple[int, ...], ...]
    """The grid's sizes along each coordinate, rising."""
    milliseconds: npt.NDArray[np.float64]
    """One axis a coordinate."""

    def __call__(self, widths: Widths) -> Any:
        """Interpolated linearly along each coordinate, and beyond the grid on its outermost line.

        Never less than nothing.
        """
        return np.maximum(
            interpolate(
                self.points,
                self.milliseconds,
                [evaluate(coordinate, widths) for coordinate in self.coordinates],
            ),
            0.0,
        )


def interpolate(
    points: Sequence[Sequence[int]], values: npt.NDArray[np.float64], at: Sequence[Any]
) -> Any:
    """Multilinear interpolation of `values` (one axis for each of `points`) at sizes or arrays."""
    result: Any = 0.0
    sides: list[tuple[tuple[Any, Any], ...]] = []  # of each axis: (index, weight) left and right
    for axis, size in zip(points, at, strict=True):
        if len(axis) == 1:
            sides.append(((0, 1.0),))
            continue
        grid = np.asarray(axis, dtype=np.float64)
        right = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
        share = (size - grid[right - 1]) / (grid[right] - grid[right - 1])
        sides.append(((right - 1, 1 - share), (right, share)))
    for corner in itertools.product(*sides):
        weight = math.prod(weight for _, weight in corner)
        result = result + weight * values[tuple(index for index, _ in corner)]
    return result


def latency_cost(analysis: Analysis, clock: Clock, *, whole_ms: float, round_to: int) -> Cost:
    """Predicted milliseconds of a network that takes `whole_ms` as it is.

    At full widths it is exactly that: what the timed operators do not account for is spread over
    the others, and where they alone would take longer, all of them are scaled down.
    """
    operators = Counter(timed_operators(analysis))
    grids = {each: _grid(each, round_to) for each in operators}
    samples = {each: list(_samples(each, grids[each])) for each in operators}
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(samples.values())))
    timed = dict(zip(distinct, clock.time_operations(distinct), strict=True))
    tables = {
        each: Table(
            each.coordinates(),
            grids[each],
            np.array([timed[sample] for sample in samples[each]]).reshape(
                [len(points) for points in grids[each]]
            ),
        )
        for each in operators
    }
    alone_ms = float(sum(count * tables[each]({}) for each, count in operators.items()))
    scale = min(1.0, whole_ms / alone_ms) if alone_ms > 0 else 1.0
    rest = _rest_cost(analysis, max(0.0, whole_ms - alone_ms))
    terms = [
        Term(
            leaves=frozenset(itertools.chain.from_iterable(map(leaves_of, table.coordinates))),
            value=_scaled(table, scale * operators[each]),
        )
        for each, table in tables.items()
    ]
    return Cost(terms=(*terms, *rest.terms), fixed=rest.fixed)


def _scaled(table: Table, factor: float) -> Callable[[Widths], Any]:
    return lambda widths: factor * table(widths)


def _rest_cost(analysis: Analysis, rest_ms: float) -> Cost:
    """`rest_ms`, spread over the operators that are not timed by how many values they write."""
    written = count_volumes(
        (shape, 1)
        for node, shape in analysis.shapes.items()
        if _is_call(node) and node_kind(node) not in READERS and node_kind(node) not in WITHOUT_WORK
    )
    total = volume_cost(written)({})
    if not total:
        return Cost(terms=(), fixed=rest_ms)
    return volume_cost({size: rest_ms * count / total for size, count in written.items()})


def timed_operators(analysis: Analysis) -> Iterator[TimedOperator]:
    """The operators of a graph that are worth a table, in its order."""
    for node in analysis.graph_module.graph.nodes:
        reader = READERS.get(node_kind(node)) if _is_call(node) else None
        if reader is not None and node in analysis.shapes:
            found = reader(node, analysis)
            if found is not None:
                yield found


# ------------------------------------------------------------------------ reading operators


def _read_convolution(node: Node, analysis: Analysis) -> TimedOperator | None:
    arguments = arguments_of(node)
    x, weight = _shapes(analysis, arguments["input"], arguments["weight"])
    if x is None or weight is None:
        return None
    return TimedOperator(
        kind="convolution",
        shapes=(_of_one_sample(x, analysis), _sizes(weight)),
        settings=_window(arguments, len(x) - 2),
    )


def _read_transposed_convolution(node: Node, analysis: Analysis) -> TimedOperator | None:
    arguments = arguments_of(node)
    x, weight = _shapes(analysis, arguments["input"], arguments["weight"])
    if x is None or weight is None:
        return None
    window = _window(arguments, len(x) - 2)
    padding = ("output_padding", _numbers(arguments["output_padding"], len(x) - 2))
    return TimedOperator(
        kind="transposed_convolution",
        shapes=(
            _of_one_sample(x, analysis),
            _sizes(weight),
            _sizes(analysis.shapes[node][1:2]),
        ),
        settings=(*window, padding),
    )


def _read_linear(node: Node, analysis: Analysis) -> TimedOperator | None:
    arguments = arguments_of(node)
    x, weight = _shapes(analysis, arguments["input"], arguments["weight"])
    if x is None or weight is None or len(weight) != 2:
        return None
    return TimedOperator(kind="linear", shapes=(_of_one_sample(x, analysis), _sizes(weight)))


def _read_matmul(node: Node, analysis: Analysis) -> TimedOperator | None:
    arguments = arguments_of(node)
    a, b = _shapes(
        analysis, arguments["self"], arguments["other" if "other" in arguments else "mat2"]
    )
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return TimedOperator(
        kind="matmul", shapes=(_of_one_sample(a, analysis), _of_one_sample(b, analysis))
    )


def _read_attention(node: Node, analysis: Analysis) -> TimedOperator | None:
    arguments = arguments_of(node)
    shapes = _shapes(analysis, *(arguments[name] for name in ("query", "key", "value")))
    if any(shape is None or len(shape) < 3 for shape in shapes):
        return None
    known = (shape for shape in shapes if shape is not None)
    return TimedOperator(
        kind="attention", shapes=tuple(_of_one_sample(shape, analysis) for shape in known)
    )


READERS: dict[str, Callable[[Node, Analysis], TimedOperator | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _read_convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _read_transposed_convolution
    ),
    "linear": _read_linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _read_matmul),
    "scaled_dot_product_attention": _read_attention,
}
"""Operators with a table, by their name without overload."""


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema")


def node_kind(node: Node) -> str:
    """The name of an operator without namespace and overload, such as "conv2d"."""
    return operator_name(node).split("::")[-1].removesuffix("_")


def _shapes(analysis: Analysis, *nodes: Any) -> list[Shape | None]:
    return [analysis.shapes.get(node) for node in nodes]


def _sizes(shape: Shape) -> tuple[Size, ...]:
    return tuple(map(size_of, shape))


def _of_one_sample(shape: Shape, analysis: Analysis) -> tuple[Size, ...]:
    """An activation's sizes with the batch taken out, whichever axis it is folded into."""
    sizes = list(_sizes(shape))
    for axis, size in enumerate(sizes):
        constant, *free = size.factors if isinstance(size, Times) else (size,)
        if isinstance(constant, int) and constant % analysis.batch_size == 0:
            sizes[axis] = times([constant // analysis.batch_size, *free])
            break
    return tuple(sizes)


def _window(arguments: Mapping[str, Any], num_axes: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Stride, padding and dilation; "same" and "valid" paddings as the numbers that they mean."""
    stride = _numbers(arguments["stride"], num_axes)
    dilation = _numbers(arguments["dilation"], num_axes)
    padding = arguments["padding"]
    if isinstance(padding, str):
        kernel = arguments["weight"].meta["val"].shape[2:]
        wide = padding == "same"
        numbers = tuple(
            (step * (size - 1)) // 2 if wide else 0
            for step, size in zip(dilation, kernel, strict=True)
        )
    else:
        numbers = _numbers(padding, num_axes)
    return (("stride", stride), ("padding", numbers), ("dilation", dilation))


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    """One number an axis; torch's operators take one for all, too."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * count if len(numbers) == 1 else numbers


# ---------------------------------------------------------------------------------- the grid


def _grid(operator: TimedOperator, round_to: int) -> tuple[tuple[int, ...], ...]:
    coordinates = operator.coordinates()
    shares = SHARES if len(coordinates) <= 2 else FEW_SHARES
    return tuple(grid_points(evaluate(each, {}), round_to, shares) for each in coordinates)


def grid_points(size: int, round_to: int, shares: Sequence[float]) -> tuple[int, ...]:
    """`size` and shares of it, rising, in whole multiples of `round_to` or of a part of it."""
    step = round_to
    while step > 1 and size // step < FEWEST_POINTS:
        step //= 2
    points = {min(size, math.ceil(share * size / step) * step) for share in shares}
    return tuple(sorted(points))


def _samples(operator: TimedOperator, grid: Sequence[Sequence[int]]) -> Iterator[Operation]:
    coordinates = operator.coordinates()
    for sizes in itertools.product(*grid):
        yield operator.at(dict(zip(coordinates, sizes, strict=True)))


def _fill(size: Size, sizes: Mapping[Size, int]) -> int:
    if isinstance(size, int):
        return size
    if isinstance(size, Times):
        return math.prod(_fill(factor, sizes) for factor in size.factors)
    return sizes[size]
