"""The budgets that pruning can keep to, and which channels are left under one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from slimdown.capture import Analysis
from slimdown.capture.dims import Kept
from slimdown.errors import RecipeError
from slimdown.prune.budget.cost import Cost, mac_cost, parameter_cost, size_cost
from slimdown.prune.budget.widths import (
    Choice,
    Price,
    choose_widths,
    keep_most_important,
    least_cost,
)

COUNTED: dict[str, Callable[[Analysis], Cost]] = {
    "macs": mac_cost,
    "parameters": parameter_cost,
    "size": size_cost,
}
"""Budgets that follow from the widths alone."""

BUDGETS = {
    "macs": "MACs",
    "parameters": "parameters",
    "size": "bytes of the weights",
    "latency": "latency on the target",
}
"""All budgets, each with what it is a fraction of."""


def check_budgets(given: Mapping[str, float | None], *, target: str | None) -> None:
    """Raise RecipeError unless exactly one budget is given, a fraction in (0, 1]."""
    told = {name: fraction for name, fraction in given.items() if fraction is not None}
    if len(told) != 1:
        got = ", ".join(f"{name}={fraction}" for name, fraction in told.items())
        raise RecipeError(
            f"prune needs exactly one of {', '.join(given)}, the fraction to keep, "
            f"got {got or 'none'}"
        )
    for name, fraction in told.items():
        if not 0 < fraction <= 1:
            raise RecipeError(
                f"prune.{name} is the fraction of {BUDGETS[name]} to keep and must be in (0, 1], "
                f"got {fraction:g}"
            )
    if target is not None and "latency" not in told:
        raise RecipeError(
            f"prune.target={target!r} names the runtime whose latency counts: give prune.latency, "
            "or leave the target out"
        )


def allocate(
    name: str,
    fraction: float,
    rounds: Iterable[Sequence[Choice]],
    cost: Cost,
    analysis: Analysis,
    *,
    per: Price,
) -> Kept:
    """The channels that are left within a fraction of a cost. Raises RecipeError.

    `rounds` are what may be narrowed: each is tried only where those before do not suffice.
    """
    whole = cost({})
    least = 1.0
    for choices in rounds:
        widths = choose_widths(choices, cost, limit=fraction * whole, per=per)
        if widths is not None:
            return keep_most_important(choices, widths)
        least = least_cost(choices, cost)[0] / whole
    raise unreachable(name, fraction, least, analysis)


def unreachable(name: str, fraction: float, least: float, analysis: Analysis) -> RecipeError:
    """What to tell of a budget that cannot be kept to."""
    frozen = [f"{why} {share:.0%}" for why, share in analysis.frozen_shares().items()]
    return RecipeError(
        f"prune.{name}={fraction:g} cannot be reached: the smallest reachable fraction is "
        f"{least:.3f} with this min_keep and round_to and the layers that may be pruned; ask for "
        "more, lower min_keep or round_to, or exclude fewer layers. What keeps channels from "
        "being removed, with the share of parameters concerned: "
        f"{', '.join(frozen[:5]) or 'nothing'}"
    )
