"""What a network costs at given widths: a sum of terms, each of which depends on a few leaves.

Since a change of one width touches few terms, a search over widths need not add up all of them. A
width may be an array of numbers, too: the cost is then one of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeAlias

from slimdown.capture import Analysis
from slimdown.capture.call import Shape
from slimdown.capture.dims import Cat, Dim, Var, is_frozen, resolve

Widths: TypeAlias = Mapping[Var, Any]
"""Leaf -> its width, an int or an array (N,) of ints; what is missing is whole."""


@dataclass(frozen=True)
class Sum:
    """A size that is the sum of others: a concatenation."""

    parts: tuple[Size, ...]


@dataclass(frozen=True)
class Times:
    """A size that is the product of others."""

    factors: tuple[Size, ...]


Size: TypeAlias = int | Var | Sum | Times
"""The size of a dim as a function of widths; equal functions of the same leaves are mostly equal
values, so that they can be counted."""


def size_of(dim: Dim) -> Size:
    """How a dim's size follows from the widths of its leaves; a number where all are frozen."""
    dim = resolve(dim)
    if is_frozen(dim):
        return dim.size
    if isinstance(dim, Var):
        return dim
    if isinstance(dim, Cat):
        return Sum(tuple(map(size_of, dim.parts)))
    return times(map(size_of, dim.factors))


def times(sizes: Iterable[Size]) -> Size:
    """The product of sizes, with its constant as the first factor where that is not 1."""
    constant, free = 1, list[Size]()
    for size in sizes:
        for factor in size.factors if isinstance(size, Times) else (size,):
            if isinstance(factor, int):
                constant *= factor
            else:
                free.append(factor)
    if not free:
        return constant
    factors = (constant, *free) if constant != 1 else tuple(free)
    return factors[0] if len(factors) == 1 else Times(factors)


def evaluate(size: Size, widths: Widths) -> Any:
    """The number that a size is at these widths."""
    if isinstance(size, int):
        return size
    if isinstance(size, Var):
        return widths.get(size, size.size)
    if isinstance(size, Sum):
        return sum(evaluate(part, widths) for part in size.parts)
    return math.prod(evaluate(factor, widths) for factor in size.factors)


def leaves_of(size: Size) -> Iterator[Var]:
    """The leaves that a size depends on."""
    if isinstance(size, Var):
        yield size
    elif isinstance(size, Sum | Times):
        for part in size.parts if isinstance(size, Sum) else size.factors:
            yield from leaves_of(part)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A summand of a cost, and the leaves that it depends on."""

    leaves: frozenset[Var]
    value: Callable[[Widths], Any]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A sum of terms and of what no width changes."""

    terms: tuple[Term, ...]
    fixed: float = 0

    def __call__(self, widths: Widths) -> Any:
        return self.fixed + sum(term.value(widths) for term in self.terms)

    @cached_property
    def by_leaf(self) -> Mapping[Var, tuple[int, ...]]:
        """Leaf -> the places of the terms that it is part of."""
        found: dict[Var, list[int]] = {}
        for place, term in enumerate(self.terms):
            for leaf in term.leaves:
                found.setdefault(leaf, []).append(place)
        return {leaf: tuple(places) for leaf, places in found.items()}


def volume_cost(volumes: Mapping[Size, float]) -> Cost:
    """The sum of sizes, each multiplied by a number."""
    terms: list[Term] = []
    fixed: float = 0
    for size, factor in volumes.items():
        if isinstance(size, int):
            fixed += factor * size
        else:
            terms.append(Term(leaves=frozenset(leaves_of(size)), value=_scaled(size, factor)))
    return Cost(terms=tuple(terms), fixed=fixed)


def _scaled(size: Size, factor: float) -> Callable[[Widths], Any]:
    return lambda widths: factor * evaluate(size, widths)


def count_volumes(shapes: Iterable[tuple[Shape, int]]) -> Counter[Size]:
    """How many values tensors have, each shape with what one value counts for."""
    volumes: Counter[Size] = Counter()
    for shape, weight in shapes:
        volume = times(map(size_of, shape))
        constant, size = 1, volume
        if isinstance(volume, Times) and isinstance(volume.factors[0], int):
            constant, size = volume.factors[0], times(volume.factors[1:])
        volumes[size] += weight * constant
    return volumes


def mac_cost(analysis: Analysis) -> Cost:
    """Multiply-accumulates of the captured batch: those of one sample times the batch size."""
    return volume_cost(count_volumes((shape, 1) for shape in analysis.costs))


def parameter_cost(analysis: Analysis) -> Cost:
    """The values of all parameters, tied ones once."""
    return volume_cost(
        count_volumes(
            (analysis.tensors.get(name, _whole(parameter.shape)), 1)
            for name, parameter in analysis.parameters.items()
        )
    )


def size_cost(analysis: Analysis) -> Cost:
    """The bytes of all parameters and buffers, tied ones once, each in its own type.

    That is what a file of the weights holds beside names and shapes. The statistics of batch norm
    count here, though a runtime may fold them into the layer before.
    """
    module = analysis.graph_module
    return volume_cost(
        count_volumes(
            (analysis.tensors.get(name, _whole(tensor.shape)), tensor.element_size())
            for name, tensor in chain(module.named_parameters(), module.named_buffers())
        )
    )


def _whole(shape: Iterable[int]) -> Shape:
    return tuple(Var(size, "not in the graph") for size in shape)
