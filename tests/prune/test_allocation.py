"""The budgets: exactly one, a fraction, and what is said of those that cannot be kept to."""

from __future__ import annotations

import pytest
import torch

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var
from slimdown.errors import RecipeError
from slimdown.prune import Prune
from slimdown.prune.budget.allocation import BUDGETS, COUNTED, allocate, check_budgets
from slimdown.prune.budget.cost import Cost, Term, volume_cost
from slimdown.prune.budget.selection import check_globs, find_bundles
from slimdown.prune.budget.widths import Choice, least_cost


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_a_budget_is_a_fraction(name, fraction):
    given = {**dict.fromkeys(BUDGETS), name: fraction}
    with pytest.raises(RecipeError, match=rf"prune\.{name} is the fraction of .* in \(0, 1\]"):
        check_budgets(given, target=None)
    check_budgets({**given, name: 1.0}, target=None)


@pytest.mark.parametrize("name", COUNTED)
def test_each_budget_that_is_counted_is_kept_to(name, networks, task_for):
    settings = {"importance": "l2", "compensate": False, "round_to": 1, name: 0.6}
    result = Prune(**settings)(networks["batch norm"](), task_for(8, 8, 8))
    before, after = result.facts[name]
    assert 0.5 < after / before <= 0.6
    tensors = [*result.model.parameters(), *result.model.buffers()]
    assert result.facts["size"][1] == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", COUNTED)
def test_a_budget_out_of_reach_tells_the_least_and_what_blocks_it(name, networks, task_for):
    settings = {"importance": "l2", "compensate": False, "min_keep": 0.5, name: 0.01}
    with pytest.raises(RecipeError, match=rf"prune\.{name}=0.01 cannot be reached") as caught:
        Prune(**settings)(networks["unknown"](), task_for(8, 8, 8))
    assert "cumsum" in str(caught.value)
    least = float(str(caught.value).split("fraction is ")[1].split()[0])
    facts = Prune(**{**settings, name: least + 1e-3})(
        networks["unknown"](), task_for(8, 8, 8)
    ).facts
    assert facts[name][1] / facts[name][0] == pytest.approx(least, abs=2e-3)


def test_the_second_round_is_for_what_the_first_cannot_reach(networks):
    analysis = analyze(capture(networks["plain"](), torch.zeros(1, 8, 8, 8)))
    a, b = Var(4), Var(4)
    rounds = [
        [Choice(importance={leaf: torch.arange(4.0)}, widths=(4, 3, 2, 1)) for leaf in leaves]
        for leaves in ([a], [a, b])
    ]
    cost = volume_cost({a: 1, b: 1})
    assert allocate("macs", 0.7, rounds, cost, analysis, per="channel").keys() == {a}
    assert allocate("macs", 0.5, rounds, cost, analysis, per="channel").keys() == {a, b}


def staircase(leaf, steps):
    """A cost that is no simple function of the width: `steps[width]`."""
    import numpy as np

    table = np.array(steps, dtype=float)
    return Term(leaves=frozenset({leaf}), value=lambda widths: table[widths.get(leaf, leaf.size)])


@pytest.mark.parametrize("per", ["channel", "cost"])
def test_a_cut_that_saves_nothing_is_never_made(per, networks):
    a, b = Var(4), Var(4)
    # Of `a`, 3 channels cost more than 4, and 2 as much as 1; of `b`, each costs the same.
    cost = Cost(terms=(staircase(a, [0, 5, 5, 12, 10]), staircase(b, [0, 3, 6, 9, 12])))
    choices = [Choice(importance={leaf: torch.ones(4)}, widths=(4, 3, 2, 1)) for leaf in (a, b)]
    analysis = analyze(capture(networks["plain"](), torch.zeros(1, 8, 8, 8)))
    for fraction in (0.9, 0.8, 0.7, 0.6, 0.4):
        kept = allocate("macs", fraction, [choices], cost, analysis, per=per)
        widths = {leaf: int(chosen.sum()) for leaf, chosen in kept.items()}
        assert cost(widths) <= fraction * 22
        assert widths.get(a, 4) in (4, 2)
    assert least_cost(choices, cost) == (8.0, {a: 2, b: 1})


def test_globs_choose_what_may_be_narrowed(networks):
    analysis = analyze(capture(networks["dense"](), torch.zeros(1, 8, 8, 8)))
    harmless, everything = find_bundles(analysis, include=("middle.*",), exclude=("*.b",))
    assert len(harmless) == len(everything) == 1
    with pytest.raises(RecipeError, match=r"prune\.include: 'midle' matches no layer"):
        check_globs(analysis, include=("midle",), exclude=())
