from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdown.capture.dims import (
    Cat,
    Dim,
    Kept,
    Prod,
    Var,
    concat,
    freeze_,
    is_frozen,
    is_same,
    kept_size,
    leaves,
    mask,
    paired_leaves,
    product,
    resolve,
    rows_of_leaves,
    unify_,
)

SIZES = (1, 2, 3, 4, 6, 8, 12, 24)
many = settings(max_examples=100, deadline=None, derandomize=True)


# -------------------------------------------------------------------------------- generation


@dataclass
class World:
    """Dims over shared variables, and the pairs of them to unify."""

    variables: list[Var]
    pairs: list[tuple[Dim, Dim]]


Recipe = tuple[str, int, tuple["Recipe", ...]]
"""A term as data, so that the same world can be built twice: kind, size or variable, parts."""


@st.composite
def recipes(draw: st.DrawFn, size: int, sizes: list[int], depth: int = 0) -> Recipe:
    """A term of `size`; `sizes` lists those of the variables, and grows by the new ones."""
    known = [index for index, own in enumerate(sizes) if own == size]
    kinds = ["new"] + (["known"] if known else [])
    factors = [f for f in range(2, size) if size % f == 0]
    if depth < 3 and size > 1:
        kinds += ["cat"] + (["prod"] if factors else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "known":
        return ("var", draw(st.sampled_from(known)), ())
    if kind == "new":
        sizes.append(size)
        return ("var", len(sizes) - 1, ())
    if kind == "prod":
        outer = draw(st.sampled_from(factors))
        parts = (outer, size // outer)
    else:
        head = draw(st.integers(1, size - 1))
        parts = (head, size - head)
    return (kind, size, tuple(draw(recipes(part, sizes, depth + 1)) for part in parts))


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[tuple[Recipe, Recipe]]]:
    sizes: list[int] = []
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from(SIZES))
        pairs.append((draw(recipes(size, sizes)), draw(recipes(size, sizes))))
    return sizes, pairs


def build(plan: tuple[list[int], list[tuple[Recipe, Recipe]]]) -> World:
    variables = [Var(size) for size in plan[0]]

    def term(recipe: Recipe) -> Dim:
        kind, value, parts = recipe
        if kind == "var":
            return variables[value]
        return (product if kind == "prod" else concat)(*map(term, parts))

    return World(variables, [(term(a), term(b)) for a, b in plan[1]])


def atoms(dim: Dim) -> list[frozenset[tuple[Var, int]]]:
    """For each channel of a dim, the channels of free leaves that it stands on."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        nothing: frozenset[tuple[Var, int]] = frozenset()
        return [nothing if is_frozen(dim) else frozenset({(dim, i)}) for i in range(dim.size)]
    if isinstance(dim, Cat):
        return [each for part in dim.parts for each in atoms(part)]
    outer, inner = atoms(dim.factors[0]), atoms(product(*dim.factors[1:]))
    return [a | b for a in outer for b in inner]


def signature(world: World) -> list[list[frozenset[int]]]:
    """What a world's variables have come to: `atoms`, numbered in the order they appear."""
    numbers: dict[tuple[Var, int], int] = {}
    order = {leaf: i for i, leaf in enumerate(leaf for v in world.variables for leaf in leaves(v))}

    def number(each: frozenset[tuple[Var, int]]) -> frozenset[int]:
        ordered = sorted(each, key=lambda atom: (order[atom[0]], atom[1]))
        return frozenset(numbers.setdefault(atom, len(numbers)) for atom in ordered)

    return [[number(each) for each in atoms(variable)] for variable in world.variables]


def random_kept(world: World, seed: int) -> Kept:
    """Any choice that respects what is frozen."""
    generator = torch.Generator().manual_seed(seed)
    free = {leaf for v in world.variables for leaf in leaves(v) if not is_frozen(leaf)}
    # In the order of appearance: a set of objects has none that repeats.
    ordered = [leaf for v in world.variables for leaf in leaves(v) if leaf in free]
    return {
        leaf: torch.rand(leaf.size, generator=generator) < 0.6 for leaf in dict.fromkeys(ordered)
    }


# -------------------------------------------------------------------------------- properties


@many
@given(plans(), st.integers(0, 99))
def test_unified_dims_keep_the_same_channels_whatever_is_kept(plan, seed):
    world = build(plan)
    for a, b in world.pairs:
        unify_(a, b)
    kept = random_kept(world, seed)
    for a, b in world.pairs:
        assert torch.equal(mask(a, kept), mask(b, kept))


@many
@given(plans())
def test_unify_preserves_sizes(plan):
    world = build(plan)
    sizes = [(a.size, b.size) for a, b in world.pairs]
    for a, b in world.pairs:
        unify_(a, b)
    assert [(resolve(a).size, resolve(b).size) for a, b in world.pairs] == sizes
    assert [resolve(v).size for v in world.variables] == plan[0]


@many
@given(plans())
def test_unify_is_symmetric(plan):
    one, other = build(plan), build(plan)
    for (a, b), (c, d) in zip(one.pairs, other.pairs, strict=True):
        unify_(a, b)
        unify_(d, c)
    assert signature(one) == signature(other)


@many
@given(plans())
def test_unify_is_idempotent(plan):
    world = build(plan)
    for a, b in world.pairs:
        unify_(a, b)
        before = signature(world)
        unify_(a, b)
        assert signature(world) == before


@many
@given(plans())
def test_dims_are_the_same_if_and_only_if_they_stand_on_the_same_channels(plan):
    world = build(plan)
    for a, b in world.pairs:
        assert is_same(a, b) == (atoms(a) == atoms(b))
        unify_(a, b)
        assert is_same(a, b)
        assert atoms(a) == atoms(b)


@many
@given(plans())
def test_normal_form(plan):
    world = build(plan)
    for a, b in world.pairs:
        unify_(a, b)
    for variable in world.variables:
        term = resolve(variable)
        if isinstance(term, Prod):
            assert len(term.factors) > 1
            assert not any(isinstance(f, Prod) or f.size == 1 for f in term.factors)
        if isinstance(term, Cat):
            assert len(term.parts) > 1
            assert not any(isinstance(p, Cat) or p.size == 0 for p in term.parts)


@many
@given(st.data(), st.sampled_from(SIZES), st.integers(0, 99))
def test_kept_sets_equal_a_construction_in_numpy(data, size, seed):
    sizes: list[int] = []
    recipe = data.draw(recipes(size, sizes))
    random = np.random.default_rng(seed)
    masks = [random.random(n) < 0.6 for n in sizes]
    variables = [Var(n) for n in sizes]
    kept = {v: torch.from_numpy(m) for v, m in zip(variables, masks, strict=True)}

    def expected(recipe: Recipe) -> npt.NDArray[np.bool_]:
        kind, value, parts = recipe
        if kind == "var":
            # A factor of size 1 vanishes from a product: it cannot be removed.
            return masks[value] if sizes[value] > 1 else np.ones(1, dtype=bool)
        if kind == "cat":
            return np.concatenate([expected(part) for part in parts])
        outer, inner = map(expected, parts)
        return np.kron(outer, inner).astype(bool)

    def term(recipe: Recipe) -> Dim:
        kind, value, parts = recipe
        if kind == "var":
            return variables[value]
        return (product if kind == "prod" else concat)(*map(term, parts))

    removable = {v: m for v, m in kept.items() if v.size > 1}
    found = mask(term(recipe), removable)
    assert np.array_equal(np.flatnonzero(found.numpy()), np.flatnonzero(expected(recipe)))
    widths = {v: int(m.sum()) for v, m in removable.items()}
    assert kept_size(term(recipe), widths) == int(expected(recipe).sum())


@many
@given(st.data(), st.sampled_from(SIZES))
def test_rows_of_leaves_deal_out_every_value_to_its_channels(data, size):
    sizes: list[int] = []
    recipe = data.draw(recipes(size, sizes))
    world = build((sizes, [(recipe, recipe)]))
    dim = world.pairs[0][0]
    values = torch.rand(size, 3, dtype=torch.float64)
    for leaf, rows in rows_of_leaves(dim, values):
        assert rows.shape[0] == leaf.size
        assert rows.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    occurrences = list(leaves(dim))
    for leaf in occurrences:
        for channel in range(leaf.size if leaf.size > 1 else 0):
            # The positions that vanish when only this channel of this leaf is removed.
            chosen = torch.ones(leaf.size, dtype=torch.bool)
            chosen[channel] = False
            gone = ~mask(dim, {leaf: chosen})
            if occurrences.count(leaf) == 1:
                (rows,) = (r for own, r in rows_of_leaves(dim, values) if own is leaf)
                assert torch.allclose(rows[channel].sum(), values[gone].sum())


# ------------------------------------------------------------------------------------- cases


def test_impossible_unify_freezes_both_sides():
    for a, b in (
        (Var(4), Var(6)),
        (product(Var(4), Var(6)), product(Var(6), Var(4))),
        (concat(Var(3), Var(5)), product(Var(4), Var(2))),
    ):
        unify_(a, b)
        assert is_frozen(a)
        assert is_frozen(b)
        assert {leaf.reason for leaf in leaves(a)} != {None}


def test_a_dim_that_would_hold_itself_is_frozen():
    v = Var(6)
    unify_(v, product(v, Var(1)))  # the same dim: nothing to do
    assert not is_frozen(v)
    head = Var(2)
    dim = concat(head, Var(4))
    unify_(v, dim)
    unify_(head, Var(2))
    assert not is_frozen(v)
    outer = Var(4)
    unify_(concat(outer, Var(4)), product(Var(2), outer))
    assert resolve(outer).size == 4


def test_flattening_channels_and_space():
    channels, features = Var(8), Var(72)
    flat = product(channels, Var(9, "spatial"))
    unify_(features, flat)
    chosen = torch.zeros(8, dtype=torch.bool)
    chosen[[1, 5]] = True
    kept = mask(features, {channels: chosen}).nonzero().flatten()
    assert kept.tolist() == [*range(9, 18), *range(45, 54)]


def test_fused_query_key_value_prunes_the_same_heads_of_all_three():
    joint = Var(3 * 4 * 2)
    heads, width = Var(4), Var(2)
    unify_(joint, product(Var(3, "select"), heads, width))
    chosen = torch.tensor([True, False, True, True])
    kept = mask(joint, {heads: chosen})
    assert kept.view(3, 4, 2)[:, 1].any().item() is False
    assert int(kept.sum()) == 3 * 3 * 2


def test_channel_shuffle_of_a_concatenation():
    # [a + b] viewed as (2, C): both halves keep the same channels; a transpose interleaves them.
    a, b = Var(6), Var(6)
    outer, inner = Var(2), Var(6)
    unify_(concat(a, b), product(outer, inner))
    assert resolve(a) is resolve(b)
    assert not is_frozen(a)
    interleaved = product(inner, outer)
    chosen = torch.tensor([True, False, True, True, False, True])
    kept = mask(interleaved, dict.fromkeys(leaves(a), chosen))
    assert kept.view(6, 2)[:, 0].tolist() == chosen.tolist()


def test_a_concatenation_splits_a_variable():
    whole, head, tail = Var(10), Var(4), Var(6)
    unify_(whole, concat(head, tail))
    assert [leaf.size for leaf in leaves(whole)] == [4, 6]
    unify_(whole, concat(Var(6), Var(4)))
    assert [leaf.size for leaf in leaves(whole)] == [4, 2, 4]
    assert not is_frozen(whole)


def test_distribution_freezes_only_the_outer_factors_that_do_not_align():
    # 3 x 2 x 2 into two halves of 6: 3 does not split, but pairs of it do.
    inner = Var(2)
    whole = product(Var(3), Var(2), inner)
    unify_(whole, concat(Var(6), Var(6)))
    assert not is_frozen(inner)
    assert [leaf.size for leaf in leaves(whole) if not is_frozen(leaf)] == [2]


def test_freezing_keeps_the_first_reason_and_spreads_by_unification():
    a, b = Var(4), Var(4)
    freeze_(a, "input")
    unify_(b, a)
    freeze_(b, "output")
    assert [leaf.reason for leaf in leaves(b)] == ["input"]


def test_sizes_of_one_and_none():
    assert product().size == 1
    assert concat().size == 0
    assert isinstance(resolve(product(Var(1), Var(5))), Var)
    assert isinstance(resolve(concat(Var(0), Var(5))), Var)


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [
        (Var(4), Var(4), 1),
        (Var(4), Var(5), 0),
        (product(Var(2), Var(3)), product(Var(2), Var(3)), 2),
        (product(Var(2), Var(3)), product(Var(3), Var(2)), 0),
        (concat(Var(2), product(Var(2), Var(3))), concat(Var(2), product(Var(2), Var(3))), 3),
        (concat(Var(2), Var(4)), Var(6), 0),
    ],
)
def test_paired_leaves(a, b, count):
    assert len(list(paired_leaves(a, b))) == count


def test_dims_print_readably():
    dim = concat(product(Var(3), Var(4, "spatial")), Var(2))
    assert repr(dim) == "[(3 x 4!) + 2]"
