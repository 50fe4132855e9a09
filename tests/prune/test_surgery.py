"""Whatever is kept, the pruned graph equals the masked original, which shares no code with it."""

from __future__ import annotations

import pytest
import torch

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var, is_frozen, leaves
from slimdown.prune.plan import kept_from_slices, slices_of
from slimdown.prune.probe import make_probe
from slimdown.prune.surgery import prune_graph, slice_tensors_
from slimdown.prune.verify import check_surgery

NAMES = [
    "plain",
    "batch norm",
    "depthwise",
    "depth multiplier",
    "grouped",
    "transposed",
    "grouped transposed",
    "prelu",
    "shuffle",
    "squeeze and excite",
    "padded shortcut",
    "dense",
    "slices",
    "flat",
    "attention",
    "attention by matmul",
    "torch attention",
    "tied",
    "scaled",
    "unknown",
    "group norm",
]


# A norm over removed channels has other statistics than one over zeros: there its dims stay whole.
WITH_NORM = ("attention", "attention by matmul", "group norm")


def random_kept(analysis, *, without_spared: bool):
    """About half of every free leaf, neither all nor none of it."""
    generator = torch.Generator().manual_seed(3)
    spared = {leaf for dim in analysis.spared for leaf in leaves(dim)}
    kept: dict[Var, torch.Tensor] = {}
    for leaf in analysis.channels:
        if not is_frozen(leaf) and not (without_spared and leaf in spared):
            chosen = torch.rand(leaf.size, generator=generator) < 0.5
            chosen[0], chosen[-1] = True, False
            kept[leaf] = chosen
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_the_pruned_graph_equals_the_masked_original(name, networks, masked_outputs):
    model = networks[name]()
    analysis = analyze(capture(model, torch.zeros(1, 8, 8, 8)))
    kept = random_kept(analysis, without_spared=name in WITH_NORM)
    assert kept, "nothing to prune"
    pruned = prune_graph(analysis, kept)
    slices = slices_of(analysis, kept)
    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(model, slices, x)
    spread = (reference - reference.mean(0)).norm()
    with torch.no_grad():
        error = (pruned.double()(x.double()) - reference).norm() / spread
    assert error < 1e-5
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_built_in_check_agrees_with_every_dim_pruned(name, networks):
    model = networks[name]()
    analysis = analyze(capture(model, torch.zeros(1, 8, 8, 8)))
    kept = random_kept(analysis, without_spared=False)
    pruned = prune_graph(analysis, kept)
    assert check_surgery(analysis, kept, pruned, make_probe(analysis)) <= 1e-5
    for batch_size in (1, 4):
        assert pruned(torch.zeros(batch_size, 8, 8, 8)).shape == (batch_size, 5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_can_be_read_back_from_the_slices(name, networks):
    analysis = analyze(capture(networks[name](), torch.zeros(1, 8, 8, 8)))
    kept = random_kept(analysis, without_spared=False)
    slices = slices_of(analysis, kept)
    again = kept_from_slices(analysis, slices)
    assert slices_of(analysis, again) == slices


def test_the_graph_that_was_analyzed_is_left_as_it_was(networks):
    analysis = analyze(capture(networks["grouped"](), torch.zeros(1, 8, 8, 8)))
    x = torch.randn(2, 8, 8, 8)
    before = analysis.graph_module(x)
    pruned = prune_graph(analysis, random_kept(analysis, without_spared=False))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert torch.equal(analysis.graph_module(x), before)


def test_slicing_keeps_ties_and_whether_a_parameter_is_trained(networks):
    model = networks["tied"]()
    model.first.weight.requires_grad_(False)
    slice_tensors_(model, {"middle.a.weight": {0: (1, 2)}, "first.weight": {0: (0,)}})
    assert model.middle.a.weight is model.middle.b.weight
    assert model.middle.a.weight.shape == (2, 24, 1, 1)
    assert not model.first.weight.requires_grad
    assert model.middle.a.weight.requires_grad
