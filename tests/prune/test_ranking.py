from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import leaves
from slimdown.prune import Prune
from slimdown.prune.importance.ranking import outlines, rank


class Stages(nn.Module):
    """Two residual blocks of one kind and of different widths, and hidden channels of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 1)
        self.a = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.wider = nn.Conv2d(16, 24, 1)
        self.b = nn.Sequential(nn.Conv2d(24, 48, 1), nn.ReLU(), nn.Conv2d(48, 24, 3, padding=1))
        self.hidden, self.last = nn.Linear(24, 40), nn.Linear(40, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.wider(x + self.a(x))
        x = (x + self.b(x)).mean((2, 3))
        return self.last(torch.relu(self.hidden(x)))


@pytest.fixture
def analysis():
    return analyze(capture(Stages(), torch.zeros(1, 8, 8, 8)))


@pytest.fixture
def leaf_of(analysis):
    return lambda layer: next(leaves(analysis.tensors[f"{layer}.weight"][0]))


@pytest.fixture
def scores(analysis):
    generator = torch.Generator().manual_seed(0)
    return {
        leaf: 10.0**index * torch.rand(leaf.size, generator=generator).double()
        for index, leaf in enumerate(leaf for leaf in analysis.channels if leaf.reason is None)
    }


def test_values_of_a_group_are_taken_over_their_mean(analysis, scores):
    ranked = rank(scores, analysis, unit="group", scope="global")
    for leaf, each in ranked.items():
        assert torch.allclose(each.mean(), torch.ones((), dtype=torch.float64))
        assert torch.allclose(each * scores[leaf].mean(), scores[leaf])


@pytest.mark.parametrize("unit", ["common", "damage"])
def test_values_that_compare_are_left_as_they_are(unit, analysis, scores):
    ranked = rank(scores, analysis, unit=unit, scope="global")
    assert all(torch.equal(each, scores[leaf]) for leaf, each in ranked.items())


@pytest.mark.parametrize("scope", ["global", "isomorphic", "local"])
@pytest.mark.parametrize("unit", ["group", "common", "damage"])
def test_no_scope_changes_the_order_within_a_group(unit, scope, analysis, scores):
    ranked = rank(scores, analysis, unit=unit, scope=scope)
    assert ranked.keys() == scores.keys()
    for leaf, each in ranked.items():
        assert torch.equal(each.argsort(), scores[leaf].argsort())


def test_a_local_rank_is_the_place_in_the_group(analysis, scores, leaf_of):
    ranked = rank(scores, analysis, unit="common", scope="local")
    for each in ranked.values():
        places = (torch.arange(len(each)) + 0.5) / len(each)
        assert torch.allclose(each.sort().values, places.double())


def test_groups_built_alike_have_equal_outlines(analysis, leaf_of):
    kinds = outlines(analysis)
    assert kinds[leaf_of("a.0")] == kinds[leaf_of("b.0")]
    assert kinds[leaf_of("a.0")] != kinds[leaf_of("hidden")]
    assert kinds[leaf_of("stem")] != kinds[leaf_of("a.0")]


def test_isomorphic_groups_compete_and_others_do_not(analysis, scores, leaf_of):
    a, b, hidden = map(leaf_of, ("a.0", "b.0", "hidden"))
    scores = {a: torch.ones(32).double(), b: 2 * torch.ones(48).double(), hidden: scores[hidden]}
    ranked = rank(scores, analysis, unit="common", scope="isomorphic")
    assert ranked[a].max() < 32 / 80 < ranked[b].min()
    assert ranked[hidden].min() < 0.1
    assert ranked[hidden].max() > 0.9


def test_heads_and_hidden_channels_are_not_alike(networks):
    analysis = analyze(capture(networks["attention"](), torch.zeros(1, 8, 8, 8)))
    kinds = outlines(analysis)
    several = {leaf: kinds[leaf] for leaf in kinds if leaf.reason is None and leaf.size > 1}
    assert len(set(several.values())) == len(several)


def test_every_group_keeps_the_same_share_under_local_scope(task_for):
    stage = Prune(macs=0.5, importance="l2", scope="local", round_to=1)
    widths = stage(Stages(), task_for(8, 8, 8)).facts["widths"]
    shares = {name: after / before for name, (before, after) in widths.items() if name != "last"}
    assert shares.pop("hidden") == 1  # it costs so little that the rest of the budget paid for it
    assert max(shares.values()) - min(shares.values()) < 0.08
    assert max(shares.values()) < 0.85


@pytest.mark.parametrize("scope", ["global", "isomorphic", "local"])
def test_the_budget_is_kept_to_in_every_scope(scope, task_for):
    for importance in ("l2", "hessian"):
        stage = Prune(macs=0.5, importance=importance, scope=scope, round_to=1)
        before, after = stage(Stages(), task_for(8, 8, 8)).facts["macs"]
        assert 0.45 < after / before <= 0.5
