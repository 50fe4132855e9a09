from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var, concat, leaves, product
from slimdown.prune.budget.cost import Cost, volume_cost
from slimdown.prune.budget.widths import (
    Choice,
    allowed_widths,
    bundle,
    choose_widths,
    keep_most_important,
    losses,
    steps,
    untied,
)


@given(st.integers(1, 300), st.integers(1, 32), st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_widths_are_whole_multiples_and_never_empty(size, step, min_keep):
    widths = allowed_widths(size, step=step, min_keep=min_keep)
    assert widths[0] == size
    assert list(widths) == sorted(set(widths), reverse=True)
    assert all(width % step == 0 and width >= min_keep * size - 1e-6 for width in widths[1:])
    assert widths[-1] >= 1


def test_wide_layers_go_by_round_to_and_narrow_ones_in_finer_steps(networks):
    def step_of(size, round_to):
        net = torch.nn.Sequential(torch.nn.Conv2d(8, size, 1), torch.nn.Conv2d(size, 5, 1))
        analysis = analyze(capture(net, torch.zeros(1, 8, 4, 4)))
        (leaf,) = leaves(analysis.tensors["0.weight"][0])
        return steps(analysis, round_to)[leaf]

    assert [step_of(n, 8) for n in (64, 32, 24, 16, 8, 4)] == [8, 8, 4, 4, 2, 1]
    assert step_of(64, 1) == 1
    assert step_of(64, 16) == 16


def test_heads_and_groups_go_one_by_one_where_their_width_is_a_multiple(networks):
    analysis = analyze(capture(networks["attention"](), torch.zeros(1, 8, 8, 8)))
    _, heads, width = leaves(analysis.tensors["middle.qkv.weight"][0])
    found = steps(analysis, 8)
    assert (heads.size, found[heads]) == (3, 1)
    assert (width.size, found[width]) == (8, 2)


def sum_of(*leaves_):
    return volume_cost(dict.fromkeys(leaves_, 1))


def choice(*scores, widths=None):
    leaf = Var(len(scores))
    widths = widths or tuple(range(len(scores), 0, -1))
    return Choice(importance={leaf: torch.tensor(scores)}, widths=widths)


def test_the_least_important_channels_of_all_groups_go_first():
    a, b = choice(0.1, 0.9, 0.8, 0.2), choice(0.7, 0.6, 0.5, 0.05)
    (first,), (second,) = a.importance, b.importance
    widths = choose_widths([a, b], sum_of(first, second), limit=5)
    assert widths == {first: 2, second: 3}
    kept = keep_most_important([a, b], widths)
    assert kept[first].tolist() == [False, True, True, False]
    assert kept[second].tolist() == [True, True, True, False]


def test_a_budget_that_is_met_removes_nothing():
    a = choice(0.1, 0.9)
    assert choose_widths([a], Cost(terms=(), fixed=10), limit=10) == {}
    assert keep_most_important([a], {}) == {}


def test_a_budget_out_of_reach_is_none():
    a = choice(0.1, 0.9, 0.8, 0.2, widths=(4, 2))
    (leaf,) = a.importance
    assert choose_widths([a], sum_of(leaf), limit=1) is None


def test_what_a_big_cut_saved_too_much_is_filled_up_again():
    cheap, dear = choice(0.1, 1.0, 1.0), choice(0.2, 1.0)
    (small,), (large,) = cheap.importance, dear.importance
    cost = volume_cost({small: 1, large: 100})
    # The cheap channel goes first and saves 1; then a dear one goes, and the cheap one may stay.
    assert choose_widths([cheap, dear], cost, limit=150) == {large: 1}


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_cost_is_kept_to_and_no_single_step_more_would_fit(data):
    sizes = data.draw(st.lists(st.integers(2, 20), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    choices = [
        Choice(
            importance={Var(size): torch.rand(size, generator=generator)},
            widths=allowed_widths(size, step=2, min_keep=0.1),
        )
        for size in sizes
    ]
    prices = [data.draw(st.integers(1, 50)) for _ in sizes]
    own = [next(iter(each.importance)) for each in choices]
    cost = volume_cost(dict(zip(own, prices, strict=True)))
    limit = int(cost({}) * data.draw(st.floats(0.3, 1)))
    widths = choose_widths(choices, cost, limit=limit)
    if widths is None:
        assert (
            cost({leaf: each.widths[-1] for leaf, each in zip(own, choices, strict=True)}) > limit
        )
    else:
        assert cost(widths) <= limit
        for leaf, each in zip(own, choices, strict=True):
            assert widths.get(leaf, leaf.size) in each.widths


def test_loss_is_told_per_channel_or_per_saving():
    cheap, dear = choice(1.0, 1.0, 1.0, 1.0), choice(2.0, 2.0, 2.0, 2.0)
    (small,), (large,) = cheap.importance, dear.importance
    cost = volume_cost({small: 1, large: 10})
    by_saving = choose_widths([cheap, dear], cost, limit=24, per="cost")
    by_channel = choose_widths([cheap, dear], cost, limit=41, per="channel")
    assert by_saving == {large: 2}
    assert by_channel == {small: 1}


def test_of_groups_that_go_together_all_losses_count():
    a, b = Var(2), Var(2)
    both = Choice(
        importance={a: torch.tensor([1.0, 3.0]), b: torch.tensor([2.0, 2.0])}, widths=(2, 1)
    )
    assert losses(both, "cost").tolist() == [0, 3]
    assert losses(both, "channel").tolist() == [0, 1.5]


def test_bundles_keep_equal_widths_but_their_own_channels():
    a, b, c = Var(4), Var(4), Var(4)
    assert bundle([a, b, c], [(a, b)]) == [[a, b], [c]]
    together = Choice(
        importance={a: torch.tensor([1.0, 2, 3, 4]), b: torch.tensor([4.0, 3, 2, 1])},
        widths=(4, 2),
    )
    kept = keep_most_important([together], {a: 2, b: 2})
    assert kept[a].tolist() == [False, False, True, True]
    assert kept[b].tolist() == [True, True, False, False]


def test_ties_between_unlike_dims_promise_nothing():
    a, b, c, d = Var(2), Var(4), Var(6), Var(6)
    ties = [(concat(a, b), c), (c, d)]
    assert untied(ties) == {a, b, c}
    assert untied([(product(a, b), product(a, b))]) == set()


def test_macs_at_chosen_widths_are_exact(networks):
    """Against torch's own counter, on the pruned graph."""
    from torch.utils.flop_counter import FlopCounterMode

    from slimdown.prune.surgery import prune_graph

    for name in ("grouped", "transposed", "dense", "attention by matmul", "flat"):
        analysis = analyze(capture(networks[name](), torch.zeros(1, 8, 8, 8)))
        kept = {
            leaf: torch.arange(leaf.size) < max(1, leaf.size // 2)
            for leaf in analysis.channels
            if leaf.reason is None
        }
        pruned = prune_graph(analysis, kept)
        with FlopCounterMode(display=False) as counter:
            pruned(torch.zeros(1, 8, 8, 8))
        widths = {leaf: int(chosen.sum()) for leaf, chosen in kept.items()}
        assert 2 * analysis.count_macs(widths) == counter.get_total_flops()
        assert analysis.count_parameters(widths) == sum(p.numel() for p in pruned.parameters())


@pytest.mark.parametrize("min_keep", [0.0, 0.5, 1.0])
def test_the_floor_of_a_layer(min_keep):
    assert allowed_widths(16, step=4, min_keep=min_keep)[-1] == max(4, 16 * min_keep)
