"""The algebra of dimensions: which channels of a network must be kept or removed together.

    dim := Var(size) | Prod(factors, outermost first) | Cat(parts, in order)

A `Var` is a run of channels that are kept or removed one by one. A flattened (C, H, W) is a `Prod`
of three, a concatenation a `Cat`, the joint query-key-value width of attention `Prod(3, heads,
head width)`. An operator only *unifies* dims: `unify_(a, b)` demands that whatever is kept of
`a` is kept of `b` too. It does so by binding variables to dims (a union-find over terms) and
splits a variable where the other side is finer. What cannot be expressed is frozen: a frozen
variable keeps all its channels, which satisfies any demand. So the failure mode is "pruned less".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Var:
    """Channels that are kept or removed one by one; with a `reason`, frozen: all are kept."""

    __slots__ = ("_bound", "reason", "size")

    def __init__(self, size: int, reason: str | None = None) -> None:
        self.size = size
        self.reason = reason
        self._bound: Dim | None = None

    def __repr__(self) -> str:
        if self._bound is not None:
            return repr(self._bound)
        return f"{self.size}" if self.reason is None else f"{self.size}!"


@dataclass(frozen=True, eq=False)
class Prod:
    """Every combination of its factors' channels, the last factor varying fastest."""

    factors: tuple[Dim, ...]

    @cached_property
    def size(self) -> int:
        return math.prod(factor.size for factor in self.factors)

    def __repr__(self) -> str:
        return f"({' x '.join(map(repr, self.factors))})"


@dataclass(frozen=True, eq=False)
class Cat:
    """The channels of its parts, one part after the other."""

    parts: tuple[Dim, ...]

    @cached_property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def __repr__(self) -> str:
        return f"[{' + '.join(map(repr, self.parts))}]"


Dim: TypeAlias = Var | Prod | Cat
Kept: TypeAlias = Mapping[Var, Tensor]
"""Leaf -> (size,) bool, true where the channel is kept; a leaf that is absent keeps all."""


# ------------------------------------------------------------------------------------- reading


def resolve(dim: Dim) -> Dim:
    """Follow bindings to the current term, in normal form.

    No `Prod` holds a `Prod` or a factor of size 1, or begins with a `Cat`; no `Cat` holds a `Cat`
    or a part of size 0; and neither holds fewer than two dims.
    """
    if isinstance(dim, Var):
        if dim._bound is None:
            return dim
        dim._bound = resolve(dim._bound)  # path compression: later look-ups are short
        return dim._bound
    if isinstance(dim, Prod):
        return product(*dim.factors)
    return concat(*dim.parts)


def product(*dims: Dim) -> Dim:
    """Combine dims, outermost first; `Var(1)` where there are none."""
    factors: list[Dim] = []
    for dim in map(resolve, dims):
        factors += dim.factors if isinstance(dim, Prod) else [dim]
    factors = [factor for factor in factors if factor.size != 1]
    if len(factors) < 2:
        return factors[0] if factors else Var(1)
    outer, *inner = factors
    if isinstance(outer, Cat):  # [a + b] x c = [a x c + b x c]
        return concat(*(product(part, *inner) for part in outer.parts))
    return Prod(tuple(factors))


def concat(*dims: Dim) -> Dim:
    """Join dims one after the other; `Var(0)` where there are none."""
    parts: list[Dim] = []
    for dim in map(resolve, dims):
        parts += dim.parts if isinstance(dim, Cat) else [dim]
    parts = [part for part in parts if part.size != 0]
    if len(parts) < 2:
        return parts[0] if parts else Var(0)
    return Cat(tuple(parts))


def leaves(dim: Dim) -> Iterator[Var]:
    """The variables that `dim` is made of, in order; one that occurs twice comes twice."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        yield dim
        return
    for part in dim.factors if isinstance(dim, Prod) else dim.parts:
        yield from leaves(part)


def paired_leaves(a: Dim, b: Dim) -> Iterator[tuple[Var, Var]]:
    """The leaves of two dims that are built alike, two by two; nothing where they are not."""
    ours, theirs = resolve(a), resolve(b)
    if isinstance(ours, Var) and isinstance(theirs, Var):
        if ours.size == theirs.size:
            yield ours, theirs
    elif isinstance(ours, Prod) and isinstance(theirs, Prod):
        if [f.size for f in ours.factors] == [f.size for f in theirs.factors]:
            for one, other in zip(ours.factors, theirs.factors, strict=True):
                yield from paired_leaves(one, other)
    elif (
        isinstance(ours, Cat)
        and isinstance(theirs, Cat)
        and [p.size for p in ours.parts] == [p.size for p in theirs.parts]
    ):
        for one, other in zip(ours.parts, theirs.parts, strict=True):
            yield from paired_leaves(one, other)


def is_same(a: Dim, b: Dim) -> bool:
    """Whether two dims keep the same channels whatever is kept of their leaves."""
    a, b = resolve(a), resolve(b)
    if _is_identical(a, b):
        return True
    if a.size != b.size or isinstance(a, Var) or isinstance(b, Var):
        # In normal form, the leaves of any other term are smaller than the term.
        return a.size == b.size and is_frozen(a) and is_frozen(b)
    ours, theirs = _needs(a), _needs(b)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(needed, theirs[leaf]) for leaf, needed in ours.items()
    )


def _is_identical(a: Dim, b: Dim) -> bool:
    """Whether two dims in normal form are the same term."""
    if isinstance(a, Prod) and isinstance(b, Prod):
        ours, theirs = a.factors, b.factors
    elif isinstance(a, Cat) and isinstance(b, Cat):
        ours, theirs = a.parts, b.parts
    else:
        return a is b
    return len(ours) == len(theirs) and all(map(_is_identical, ours, theirs))


def _needs(dim: Dim) -> dict[Var, npt.NDArray[np.int64]]:
    """Free leaf -> (k, dim.size): which channels of the leaf each channel of `dim` stands on.

    -1 where it stands on none. k is 1, but for a leaf that is multiplied by itself.
    """
    dim = resolve(dim)
    if isinstance(dim, Var):
        return {} if is_frozen(dim) else {dim: np.arange(dim.size)[None]}
    rows: dict[Var, list[npt.NDArray[np.int64]]] = {}
    if isinstance(dim, Cat):
        start = 0
        for part in dim.parts:
            for leaf, needed in _needs(part).items():
                around = (start, dim.size - start - part.size)
                rows.setdefault(leaf, []).append(
                    np.pad(needed, ((0, 0), around), constant_values=-1)
                )
            start += part.size
        # No channel is in two parts, so that the parts' rows fit into one another.
        return {leaf: _overlay(each) for leaf, each in rows.items()}
    outer, inner = 1, dim.size
    for factor in dim.factors:
        inner //= factor.size
        for leaf, needed in _needs(factor).items():
            rows.setdefault(leaf, []).append(np.tile(np.repeat(needed, inner, axis=1), outer))
        outer *= factor.size
    return {leaf: np.sort(np.concatenate(each), axis=0) for leaf, each in rows.items()}


def _overlay(layers: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    height = max(len(layer) for layer in layers)
    padded = [np.pad(x, ((height - len(x), 0), (0, 0)), constant_values=-1) for x in layers]
    top: npt.NDArray[np.int64] = np.maximum.reduce(padded)
    return top


def is_frozen(dim: Dim) -> bool:
    """Whether no channel of `dim` can be removed."""
    return all(leaf.reason is not None or leaf.size < 2 for leaf in leaves(dim))


def mask(dim: Dim, kept: Kept) -> Tensor:
    """Which of a dim's channels are kept: (size,) bool."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        own = kept.get(dim)
        return torch.ones(dim.size, dtype=torch.bool) if own is None else own
    if isinstance(dim, Cat):
        return torch.cat([mask(part, kept) for part in dim.parts])
    whole = torch.ones(1, dtype=torch.bool)
    for factor in dim.factors:
        whole = (whole[:, None] & mask(factor, kept)[None, :]).flatten()
    return whole


def kept_size(dim: Dim, widths: Mapping[Var, int]) -> int:
    """How many channels `dim` has once each leaf has the width given for it, or else its own."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        return widths.get(dim, dim.size)
    if isinstance(dim, Cat):
        return sum(kept_size(part, widths) for part in dim.parts)
    return math.prod(kept_size(factor, widths) for factor in dim.factors)


def rows_of_leaves(dim: Dim, rows: Tensor) -> Iterator[tuple[Var, Tensor]]:
    """Deal `rows` (dim.size, …) out to the leaves: to each (leaf.size, …), all it has a part in.

    Views, so that weights can be looked at without a copy of them all.
    """
    dim = resolve(dim)
    if isinstance(dim, Var):
        yield dim, rows
    elif isinstance(dim, Cat):
        shares = torch.split(rows, [part.size for part in dim.parts])
        for part, share in zip(dim.parts, shares, strict=True):
            yield from rows_of_leaves(part, share)
    else:
        grid = rows.reshape(*(factor.size for factor in dim.factors), *rows.shape[1:])
        for axis, factor in enumerate(dim.factors):
            yield from rows_of_leaves(factor, grid.movedim(axis, 0))


# ------------------------------------------------------------------------------------ changing


def freeze_(dim: Dim, reason: str) -> None:
    """Keep all channels of `dim`; a leaf that is frozen already keeps its first reason."""
    for leaf in leaves(dim):
        if leaf.reason is None:
            leaf.reason = reason


def unify_(a: Dim, b: Dim) -> None:
    """Demand that what is kept of `a` is kept of `b`; freeze what cannot be made to agree."""
    a, b = resolve(a), resolve(b)
    if is_same(a, b):
        return
    if a.size != b.size:
        _freeze_all_(f"{a.size} channels against {b.size}", a, b)
    elif a.size < 2:
        return
    elif isinstance(a, Var):
        _bind_(a, b)
    elif isinstance(b, Var):
        _bind_(b, a)
    elif isinstance(a, Cat) and isinstance(b, Cat):
        _align_parts_([a], [b])
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _align_factors_([a], [b])
    elif isinstance(a, Prod) and isinstance(b, Cat):
        _distribute_(a, b)
    elif isinstance(a, Cat) and isinstance(b, Prod):
        _distribute_(b, a)


def _freeze_all_(reason: str, *dims: Dim) -> None:
    for dim in dims:
        freeze_(dim, reason)


def _bind_(var: Var, dim: Dim) -> None:
    if any(leaf is var for leaf in leaves(dim)):
        freeze_(dim, "a dimension that would hold itself")
        return
    var._bound = dim
    if var.reason is not None:
        freeze_(dim, var.reason)


def _align_parts_(left: list[Dim], right: list[Dim]) -> None:
    """Unify two concatenations, given as stacks with the first part on top."""
    while left and right:
        x, y = _pop_part_(left), _pop_part_(right)
        if x.size > y.size:
            left, right, x, y = right, left, y, x
        if x.size < y.size:
            halves = _cut_(y, x.size)
            if halves is None:
                _freeze_all_("concatenations that do not align", x, y, *left, *right)
                return
            y, rest = halves
            right.append(rest)
        unify_(x, y)


def _align_factors_(left: list[Dim], right: list[Dim]) -> None:
    """Unify two products, given as stacks with the outermost factor on top."""
    while left and right:
        x, y = _pop_factor_(left), _pop_factor_(right)
        if x.size > y.size:
            left, right, x, y = right, left, y, x
        if x.size < y.size:
            if y.size % x.size != 0:
                _freeze_all_("a reshape that does not align", x, y, *left, *right)
                return
            outer, inner = Var(x.size), Var(y.size // x.size)
            unify_(y, product(outer, inner))
            y = outer
            right.append(inner)
        unify_(x, y)


def _distribute_(whole: Prod, cat: Cat) -> None:
    """Unify a product with a concatenation: [o1 + o2] x inner = [o1 x inner + o2 x inner].

    The inner factors are as many as divide every part, so that as little as possible is frozen.
    """
    for num_outer in range(1, len(whole.factors)):
        inner = product(*whole.factors[num_outer:])
        if all(part.size % inner.size == 0 for part in cat.parts):
            break
    else:
        _freeze_all_("a concatenation that does not align with a reshape", whole, cat)
        return
    outers = [Var(part.size // inner.size) for part in cat.parts]
    unify_(product(*whole.factors[:num_outer]), concat(*outers))
    for outer, part in zip(outers, cat.parts, strict=True):
        unify_(part, product(outer, inner))


def _cut_(dim: Dim, size: int) -> tuple[Dim, Dim] | None:
    """Cut `dim` after its first `size` channels, 0 < size < dim.size; None where it cannot be."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        head, tail = Var(size, dim.reason), Var(dim.size - size, dim.reason)
        dim._bound = concat(head, tail)
        return head, tail
    if isinstance(dim, Prod):
        outer, inner = dim.factors[0], product(*dim.factors[1:])
        cut = None if size % inner.size else _cut_(outer, size // inner.size)
        return None if cut is None else (product(cut[0], inner), product(cut[1], inner))
    before: list[Dim] = []
    after = list(dim.parts)
    while size >= after[0].size:
        size -= after[0].size
        before.append(after.pop(0))
    if size > 0:
        cut = _cut_(after.pop(0), size)
        if cut is None:
            return None
        before.append(cut[0])
        after.insert(0, cut[1])
    return concat(*before), concat(*after)


def _pop_part_(stack: list[Dim]) -> Dim:
    top = resolve(stack.pop())
    while isinstance(top, Cat):
        stack.extend(reversed(top.parts))
        top = resolve(stack.pop())
    return top


def _pop_factor_(stack: list[Dim]) -> Dim:
    top = resolve(stack.pop())
    while isinstance(top, Prod):
        stack.extend(reversed(top.factors))
        top = resolve(stack.pop())
    return top
