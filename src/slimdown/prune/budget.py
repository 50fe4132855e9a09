"""How many channels each group keeps, so that the whole costs no more than was asked.

Channels of all groups are ranked together, each by its share of its own group's importance, and
removed from the least important on until the cost is met: a group whose importance is spread
evenly keeps its channels, one with many weak channels loses those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from slimdown.capture import Analysis
from slimdown.capture.dims import Cat, Dim, Kept, Var, leaves, paired_leaves, resolve

MIN_STEPS = 4
"""A narrow group gets at least this many widths to choose from: 16 channels go by 4s, not by 8s."""

Cost = Callable[[Mapping[Var, int]], int]
"""The cost of a network whose leaves have the given widths, or else their own."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The widths that one group of channels may have, or several groups that keep equal widths."""

    importance: Mapping[Var, Tensor]
    """Leaf -> (C,), comparable with that of other choices: see `normalize`."""
    widths: tuple[int, ...]
    """From the whole group down to the narrowest."""

    def narrowest(self) -> dict[Var, int]:
        return dict.fromkeys(self.importance, self.widths[-1])


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One step narrower: `importance` is the mean of the channels that go."""

    choice: Choice
    width: int
    importance: float


def normalize(importance: Tensor) -> Tensor:
    """Importance over its mean in the group, (C,), so that groups can be ranked together."""
    return importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)


def allowed_widths(size: int, *, step: int, min_keep: float) -> tuple[int, ...]:
    """`size` itself and the multiples of `step` below it, down to `min_keep` of it, never zero."""
    floor = max(1, math.ceil(min_keep * size - 1e-9))
    return (size, *(w for w in range((size - 1) // step * step, 0, -step) if w >= floor))


def steps(analysis: Analysis, round_to: int) -> dict[Var, int]:
    """How finely each leaf may be cut.

    Widths are multiples of `round_to` wherever a leaf's channels run through a tensor one by one.
    A leaf of blocks (heads of 64 channels, groups of a convolution) goes by as many blocks as
    make a multiple. Where that leaves fewer than `MIN_STEPS` widths, the step is halved.
    """
    found: dict[Var, int] = {}
    for shape in analysis.tensors.values():
        for dim in shape:
            for leaf, block in _blocks(dim):
                own = round_to // math.gcd(round_to, block)
                found[leaf] = math.lcm(found.get(leaf, 1), own)
    return {leaf: _refine(step, leaf.size) for leaf, step in found.items()}


def _blocks(dim: Dim, block: int = 1) -> Iterator[tuple[Var, int]]:
    """The leaves of a dim, each with how many neighboring channels one of its own stands for."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        yield dim, block
        return
    if isinstance(dim, Cat):
        for part in dim.parts:
            yield from _blocks(part, block)
        return
    for factor in reversed(dim.factors):
        yield from _blocks(factor, block)
        block *= factor.size


def _refine(step: int, size: int) -> int:
    while step > 1 and size // step < MIN_STEPS:
        step //= 2
    return step


def bundle(leaves_: Iterable[Var], ties: Iterable[Sequence[Dim]]) -> list[list[Var]]:
    """Put leaves together that tied dims want to have equal widths; the others stay alone."""
    bundles = {leaf: [leaf] for leaf in leaves_}
    for first, *others in ties:
        for other in others:
            for a, b in paired_leaves(first, other):
                if a in bundles and b in bundles and bundles[a] is not bundles[b]:
                    bundles[a] += bundles[b]
                    bundles.update(dict.fromkeys(bundles[b], bundles[a]))
    return list({id(together): together for together in bundles.values()}.values())


def untied(ties: Iterable[Sequence[Dim]]) -> set[Var]:
    """The leaves of tied dims that are not built alike, so that no equal widths can be promised."""
    found: set[Var] = set()
    for first, *others in ties:
        for other in others:
            both = {*leaves(first), *leaves(other)}
            paired = {leaf for pair in paired_leaves(first, other) for leaf in pair}
            found |= both if paired != both else set()
    return found


def choose_widths(choices: Sequence[Choice], cost: Cost, *, limit: int) -> dict[Var, int] | None:
    """The widths that keep the most important channels at a cost of at most `limit`.

    None where even the narrowest cost more.
    """
    cuts = sorted(_cuts(choices), key=lambda cut: cut.importance)
    low, high = 0, len(cuts)
    if cost(_apply(cuts)) > limit:
        return None
    while low < high:  # the fewest cuts that suffice; every cut can only lower the cost
        middle = (low + high) // 2
        if cost(_apply(cuts[:middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return _fill_up(cuts[:low], cost, limit=limit)


def _cuts(choices: Sequence[Choice]) -> Iterator[Cut]:
    for choice in choices:
        ranked = [importance.sort().values for importance in choice.importance.values()]
        ascending = torch.stack(ranked).mean(0)
        size, worst = len(ascending), 0.0
        for before, after in pairwise(choice.widths):
            gone = float(ascending[size - before : size - after].mean())
            worst = max(worst, gone)  # rounding must not reorder the cuts of a group
            yield Cut(choice=choice, width=after, importance=worst)


def _apply(cuts: Sequence[Cut]) -> dict[Var, int]:
    return {leaf: cut.width for cut in cuts for leaf in cut.choice.importance}


def _fill_up(cuts: Sequence[Cut], cost: Cost, *, limit: int) -> dict[Var, int]:
    """Undo cuts where the budget still allows it, those of the best channels first.

    One cut of a wide group can save much more than was missing.
    """
    widths = _apply(cuts)
    for cut in reversed(cuts):
        choice = cut.choice
        if widths[next(iter(choice.importance))] != cut.width:
            continue  # a narrower cut of this group had to stay
        wider = choice.widths[choice.widths.index(cut.width) - 1]
        candidate = {**widths, **dict.fromkeys(choice.importance, wider)}
        if cost(candidate) <= limit:
            widths = candidate
    return widths


def keep_most_important(choices: Sequence[Choice], widths: Mapping[Var, int]) -> Kept:
    """Which channels each group keeps, at its chosen width; of equals, the first."""
    kept: dict[Var, Tensor] = {}
    for choice in choices:
        for leaf, importance in choice.importance.items():
            width = widths.get(leaf, leaf.size)
            if width < leaf.size:
                best = importance.sort(descending=True, stable=True).indices[:width]
                kept[leaf] = torch.zeros(leaf.size, dtype=torch.bool)
                kept[leaf][best] = True
    return kept
