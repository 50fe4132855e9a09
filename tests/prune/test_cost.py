"""Costs as sums of terms: equal to what the analysis counts, at numbers and at arrays of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from safetensors.torch import save

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var, concat, product
from slimdown.prune.budget.cost import (
    evaluate,
    leaves_of,
    mac_cost,
    parameter_cost,
    size_cost,
    size_of,
    volume_cost,
)
from slimdown.prune.surgery import prune_graph


def test_a_size_follows_the_widths_of_its_leaves():
    a, b, frozen = Var(6), Var(4), Var(5, "output")
    size = size_of(concat(product(a, Var(3, "spatial")), product(b, frozen)))
    assert evaluate(size, {}) == 6 * 3 + 4 * 5
    assert evaluate(size, {a: 2, b: 1}) == 2 * 3 + 1 * 5
    assert evaluate(size, {a: np.array([2, 4]), b: 1}).tolist() == [11, 17]
    assert list(leaves_of(size)) == [a, b]
    assert size_of(product(frozen, Var(3, "spatial"))) == 15


def test_what_no_width_changes_is_fixed():
    leaf = Var(4)
    cost = volume_cost({leaf: 3, 10: 2})
    assert (cost.fixed, len(cost.terms)) == (20, 1)
    assert cost({leaf: 2}) == 26
    assert cost.by_leaf == {leaf: (0,)}


@pytest.mark.parametrize(
    "name", ["grouped", "transposed", "dense", "attention", "shuffle", "tied", "flat", "scaled"]
)
def test_costs_are_what_the_pruned_network_has(name, networks):
    analysis = analyze(capture(networks[name](), torch.zeros(1, 8, 8, 8)))
    kept = {
        leaf: torch.arange(leaf.size) < max(1, leaf.size // 2)
        for leaf in analysis.channels
        if leaf.reason is None
    }
    widths = {leaf: int(chosen.sum()) for leaf, chosen in kept.items()}
    pruned = prune_graph(analysis, kept)
    for given, module in (({}, analysis.graph_module), (widths, pruned)):
        assert mac_cost(analysis)(given) // analysis.batch_size == analysis.count_macs(given)
        assert parameter_cost(analysis)(given) == sum(p.numel() for p in module.parameters())
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
        held = sum(t.numel() * t.element_size() for t in tensors)
        assert size_cost(analysis)(given) == held


def test_the_size_is_that_of_a_file_of_weights_but_for_its_header(networks):
    analysis = analyze(capture(networks["batch norm"](), torch.zeros(1, 8, 8, 8)))
    state = analysis.graph_module.state_dict()
    file = io.BytesIO(save({name: tensor.clone() for name, tensor in state.items()}))
    header = 8 + int.from_bytes(file.read(8), "little")
    assert size_cost(analysis)({}) == len(file.getvalue()) - header
