"""How many channels each group keeps, so that the whole costs no more than was asked.

Groups are narrowed step by step, always by the cut that loses least: importance per channel, where
importance ranks channels, or damage per unit of cost saved, where it adds up over groups. So a
group whose importance is spread evenly keeps its channels, one with many weak ones loses those.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slimdown.capture import Analysis
from slimdown.capture.dims import Cat, Dim, Kept, Var, leaves, paired_leaves, resolve
from slimdown.prune.budget.cost import Cost

MIN_STEPS = 4
"""A narrow group gets at least this many widths to choose from: 16 channels go by 4s, not by 8s."""

SMALLEST_SAVING = 1e-9
"""The share of the cost that a cut must save: less is the rounding of a float."""

Price: TypeAlias = Literal["channel", "cost"]
"""What a loss is divided by to rank cuts: channels removed, or what they save of the cost."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The widths that one group of channels may have, or several groups that keep equal widths."""

    importance: Mapping[Var, Tensor]
    """Leaf -> (C,), comparable with that of other choices: see `prune.ranking`."""
    widths: tuple[int, ...]
    """From the whole group down to the narrowest."""
    damage: tuple[float, ...] | None = None
    """What is lost at each of the widths, where it was measured: see `prune.sensitivity`."""


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


def choose_widths(
    choices: Sequence[Choice], cost: Cost, *, limit: float, per: Price = "channel"
) -> dict[Var, int] | None:
    """The widths that lose least at a cost of at most `limit`.

    The cut that loses least `per` channel, or per unit of cost that it saves, comes first. A cut
    that saves nothing, as where a runtime is no faster at the narrower width, is passed over for
    a deeper one. None where no cut saves anything more and the cost is still above `limit`.
    """
    descent = _Descent(choices, cost, per)
    while descent.total > limit:
        if not descent.cut():
            return None
    descent.fill_up(limit)
    return descent.changed_widths()


def least_cost(choices: Sequence[Choice], cost: Cost) -> tuple[float, dict[Var, int]]:
    """The lowest cost that cuts lead to, and the widths there."""
    descent = _Descent(choices, cost, "channel")
    while descent.cut():
        pass
    return float(descent.total), descent.changed_widths()


@dataclass(frozen=True, kw_only=True, order=True)
class _Cut:
    """The best next cut of a choice, as it was when this many cuts had been made."""

    price: float
    place: int
    position: int = field(compare=False)
    num_cuts: int = field(compare=False)


class _Descent:
    """Widths on their way down, and what they cost."""

    def __init__(self, choices: Sequence[Choice], cost: Cost, per: Price) -> None:
        self.choices, self.cost, self.per = choices, cost, per
        self.losses = [losses(choice, per) for choice in choices]
        self.positions = [0] * len(choices)
        self.widths = {leaf: c.widths[0] for c in choices for leaf in c.importance}
        self.values = [term.value(self.widths) for term in cost.terms]
        self.total = cost.fixed + sum(self.values)
        self.terms = [
            sorted({place for leaf in c.importance for place in cost.by_leaf.get(leaf, ())})
            for c in choices
        ]
        self.num_cuts = 0
        self.queue: list[_Cut] = []
        for place in range(len(choices)):
            self._push(place)

    def cut(self) -> bool:
        """Make the cheapest cut; False where there is none left that saves anything."""
        while self.queue:
            cut = heapq.heappop(self.queue)
            # Others' cuts make a cut save less, never more: it may have to go back in the queue,
            # but what is cheapest in spite of an old price is the cheapest.
            if cut.num_cuts < self.num_cuts:
                self._push(cut.place)
                continue
            self._move(cut.place, cut.position)
            self.num_cuts += 1
            self._push(cut.place)
            return True
        return False

    def fill_up(self, limit: float) -> None:
        """Widen again where the budget still allows it, the dearest loss first.

        One cut of a wide group can save much more than was missing.
        """
        lost = [each[position] for each, position in zip(self.losses, self.positions, strict=True)]
        for place in sorted(range(len(self.choices)), key=lambda place: -lost[place]):
            position = self.positions[place]
            totals = self._totals(place, self.choices[place].widths[:position])
            fitting = np.flatnonzero(totals <= limit)
            if len(fitting):
                self._move(place, int(fitting[0]))

    def changed_widths(self) -> dict[Var, int]:
        return {
            leaf: choice.widths[position]
            for choice, position in zip(self.choices, self.positions, strict=True)
            for leaf in choice.importance
            if position > 0
        }

    def _push(self, place: int) -> None:
        choice, position = self.choices[place], self.positions[place]
        narrower = choice.widths[position + 1 :]
        if not narrower:
            return
        saved = self.total - self._totals(place, narrower)
        lost = self.losses[place][position + 1 :] - self.losses[place][position]
        gone = np.array([choice.widths[position] - width for width in narrower])
        divisor = saved if self.per == "cost" else gone
        helps = saved > SMALLEST_SAVING * self.total
        if helps.any():
            prices = np.where(helps, lost / np.where(helps, divisor, 1), np.inf)
            best = int(prices.argmin())
            cut = _Cut(
                price=float(prices[best]),
                place=place,
                position=position + 1 + best,
                num_cuts=self.num_cuts,
            )
            heapq.heappush(self.queue, cut)

    def _totals(self, place: int, widths: Sequence[int]) -> npt.NDArray[Any]:
        """The cost of the network with each of these widths for one choice."""
        tried = {**self.widths, **self._with(place, np.array(widths, dtype=np.int64))}
        old = sum(self.values[term] for term in self.terms[place])
        new = sum(self.cost.terms[term].value(tried) for term in self.terms[place])
        return np.broadcast_to(np.asarray(self.total - old + new), len(widths))

    def _move(self, place: int, position: int) -> None:
        self.positions[place] = position
        self.widths.update(self._with(place, self.choices[place].widths[position]))
        for term in self.terms[place]:
            self.values[term] = self.cost.terms[term].value(self.widths)
        self.total = self.cost.fixed + sum(self.values)

    def _with(self, place: int, width: Any) -> dict[Var, Any]:
        return dict.fromkeys(self.choices[place].importance, width)


def losses(choice: Choice, per: Price) -> npt.NDArray[np.float64]:
    """What is lost at each of a choice's widths, (len(widths),), rising from 0.

    Its `damage`, or else the importance of the channels that are gone: of several groups, the mean
    where channels are ranked, and the sum where losses are weighed against costs.
    """
    if choice.damage is not None:
        lost = np.array(choice.damage, dtype=np.float64)
    else:
        ranked = [importance.sort().values for importance in choice.importance.values()]
        stacked = torch.stack(ranked).double()
        ascending = stacked.sum(0) if per == "cost" else stacked.mean(0)
        summed = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)])
        lost = summed[len(ascending) - torch.tensor(choice.widths)].numpy()
    return np.maximum.accumulate(lost)


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
