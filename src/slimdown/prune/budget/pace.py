"""Keeping to a latency: widths are chosen by a table, and the network that results is timed.

A table of single operators cannot tell how they get on with each other, so the goal of the choice
is corrected by what was measured until the measured latency is what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from slimdown.capture import Analysis
from slimdown.capture.dims import Kept
from slimdown.core import Clock, Json
from slimdown.errors import Interrupted
from slimdown.prune.budget.allocation import unreachable
from slimdown.prune.budget.cost import Cost
from slimdown.prune.budget.latency import latency_cost
from slimdown.prune.budget.widths import (
    SMALLEST_SAVING,
    Choice,
    Price,
    choose_widths,
    keep_most_important,
    least_cost,
)
from slimdown.prune.surgery import prune_graph

TOLERANCE = 0.05
"""How far the measured latency may be from the one asked for, as a share of that."""

NEAR = 0.02
"""Nearer than this, no further attempt is made: timing again differs by as much."""

MAX_ATTEMPTS = 6


def _go_on() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The channels that are kept for a goal, and the share of the latency that is predicted."""

    kept: Kept
    predicted: float


@dataclass(frozen=True, kw_only=True)
class Attempt(Chosen):
    """What was chosen for a goal, and the share of the latency that was measured."""

    goal: float
    measured: float

    def is_near(self, asked: float) -> bool:
        return abs(self.measured - asked) <= NEAR * asked

    def meets(self, asked: float) -> bool:
        return self.measured <= (1 + TOLERANCE) * asked


def keep_pace(
    analysis: Analysis,
    rounds: Sequence[Sequence[Choice]],
    clock: Clock,
    *,
    asked: float,
    example_input: Tensor,
    round_to: int,
    per: Price,
    original: nn.Module | None = None,
    stop_requested: Callable[[], bool] = _go_on,
) -> tuple[Kept, Json]:
    """Choose channels so that the network takes `asked` of the latency of `original`; say how.

    `rounds` are what may be narrowed: the second where the first does not suffice. `original` is
    the network that was captured unless it is given. A small network has few widths to choose
    from: where nothing is within `TOLERANCE`, the slowest is returned that is not slower than
    asked, or else the fastest, with `met` false. Raises RecipeError where even the narrowest
    network takes longer, and Interrupted where a stop was requested.
    """
    whole = analysis.graph_module if original is None else original
    first = clock.deploy(whole, example_input)
    captured = first if original is None else clock.deploy(analysis.graph_module, example_input)
    whole_ms, captured_ms = clock.time_networks([first, captured], example_input)
    cost = latency_cost(analysis, clock, whole_ms=captured_ms, round_to=round_to)

    def choose(goal: float) -> Chosen:
        return _choose(rounds, cost, goal=goal, whole_ms=whole_ms, per=per)

    def measure(kept: Kept) -> float:
        pruned = clock.deploy(prune_graph(analysis, kept), example_input)
        before_ms, after_ms = clock.time_networks([first, pruned], example_input)
        return after_ms / before_ms

    attempts = approach(asked, choose, measure, stop_requested=stop_requested)
    best = nearest(attempts, asked)
    if not best.meets(asked) and _are_equal(best.kept, choose(0.0).kept):
        raise unreachable("latency", asked, best.measured, analysis)
    return best.kept, {
        "runtime": clock.runtime,
        "asked": asked,
        "predicted": best.predicted,
        "measured": best.measured,
        "met": best.meets(asked),
        "original_ms": whole_ms,
        "attempts": [[each.goal, each.measured] for each in attempts],
    }


def nearest(attempts: Sequence[Attempt], asked: float) -> Attempt:
    """Of those that are not slower than asked the nearest, or else the nearest of all."""
    met = [attempt for attempt in attempts if attempt.meets(asked)]
    return min(met or attempts, key=lambda attempt: abs(attempt.measured - asked))


def approach(
    asked: float,
    choose: Callable[[float], Chosen],
    measure: Callable[[Kept], float],
    *,
    stop_requested: Callable[[], bool] = _go_on,
) -> list[Attempt]:
    """Choose and measure until what is measured is near `asked`, or nothing new can be tried.

    The first goal is `asked`; the next one is scaled by the error, and those after it are taken
    from the line through the two measurements that are nearest. Raises Interrupted.
    """
    attempts: list[Attempt] = []
    goal = asked
    while len(attempts) < MAX_ATTEMPTS:
        if stop_requested():
            raise Interrupted("stopped while keeping to a latency; the next run begins it anew")
        chosen = choose(goal)
        if _was_tried(chosen, attempts):
            if min(map(_by_measured, attempts)) <= asked:
                break
            chosen = choose(0.0)  # all are too slow, and the goal asks for nothing new
            if _was_tried(chosen, attempts):
                break
        attempts.append(Attempt(**vars(chosen), goal=goal, measured=measure(chosen.kept)))
        if attempts[-1].is_near(asked):
            break
        goal = _next_goal(attempts, asked)
    return attempts


def _next_goal(attempts: Sequence[Attempt], asked: float) -> float:
    last = attempts[-1]
    if len(attempts) < 2:
        return min(1.0, last.goal * asked / last.measured)
    fast = max((a for a in attempts if a.measured <= asked), key=_by_measured, default=None)
    slow = min((a for a in attempts if a.measured > asked), key=_by_measured, default=None)
    if fast is None or slow is None:
        fast, slow = sorted(attempts[-2:], key=_by_measured)
    rise = slow.measured - fast.measured
    if rise <= 0:
        return 0.0 if last.measured > asked else 1.0
    goal = fast.goal + (asked - fast.measured) / rise * (slow.goal - fast.goal)
    return min(max(goal, 0.0), 1.0)


def _was_tried(chosen: Chosen, attempts: Sequence[Attempt]) -> bool:
    return any(_are_equal(chosen.kept, attempt.kept) for attempt in attempts)


def _by_measured(attempt: Attempt) -> float:
    return attempt.measured


def _choose(
    rounds: Sequence[Sequence[Choice]], cost: Cost, *, goal: float, whole_ms: float, per: Price
) -> Chosen:
    """The channels of the first round that suffices, or else the fewest of all."""
    limit = goal * whole_ms * (1 + SMALLEST_SAVING)  # a sum of floats may be a trifle more
    for choices in rounds:
        widths = choose_widths(choices, cost, limit=limit, per=per)
        if widths is not None:
            kept = keep_most_important(choices, widths)
            return Chosen(kept=kept, predicted=float(cost(widths)) / whole_ms)
    least_ms, narrowest = least_cost(rounds[-1], cost)
    kept = keep_most_important(rounds[-1], narrowest)
    return Chosen(kept=kept, predicted=least_ms / whole_ms)


def _are_equal(a: Kept, b: Kept) -> bool:
    return a.keys() == b.keys() and all(bool((a[leaf] == b[leaf]).all()) for leaf in a)
