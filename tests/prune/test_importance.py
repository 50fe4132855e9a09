from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var, leaves
from slimdown.core import Context
from slimdown.errors import RecipeError
from slimdown.prune import Prune
from slimdown.prune.importance.criteria import IMPORTANCE, REDUCTION, Importance, Reduction, score
from slimdown.prune.importance.evidence import Evidence, Inputs, gather
from slimdown.prune.importance.gates import Derivatives

MADE = torch.tensor([[3.0, 0.0], [1.0, -1.0], [0.0, 0.5]])
READ = torch.tensor([[4.0], [2.0], [-1.0]])
WEIGHTS = Evidence(makers=[MADE], readers=[READ])


def members(name, evidence):
    return [each.tolist() for each in IMPORTANCE[name].members(evidence)]


def test_the_table_has_every_name_once():
    assert tuple(IMPORTANCE) == get_args(Importance)
    assert tuple(REDUCTION) == get_args(Reduction)


def test_norms_of_every_layer():
    assert members("l1", WEIGHTS) == [[3, 2, 0.5], [4, 2, 1]]
    made, read = members("l2", WEIGHTS)
    assert made == pytest.approx([9, 2, 0.25])
    assert read == pytest.approx([16, 4, 1])


def test_lamp_divides_by_all_that_is_no_less():
    expected = [[1, 2 / 11, 0.25 / 11.25], [1, 4 / 20, 1 / 21]]
    for found, wanted in zip(members("lamp", WEIGHTS), expected, strict=True):
        assert found == pytest.approx(wanted)
    alike = members("lamp", Evidence(makers=[torch.ones(4, 3), torch.zeros(4, 3)]))
    assert sorted(alike[0]) == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert alike[1] == [0] * 4


def test_the_geometric_median_by_direct_sums():
    weight = 100 + torch.randn(7, 5)
    (found,) = members("geometric_median", Evidence(makers=[weight], readers=[torch.ones(7, 2)]))
    rows = weight.tolist()
    assert found == pytest.approx([sum(math.dist(a, b) for b in rows) for a in rows])


def test_the_scales_of_batch_norms_without_their_signs():
    scales = [torch.tensor([[-2.0], [1.0]]), torch.tensor([[0.5], [0.5]])]
    assert members("batch_norm_scale", Evidence(scales=scales)) == [[2, 1], [0.5, 0.5]]


def test_activations():
    x = torch.tensor([[1.0, -3.0, 2.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    inputs = Inputs(
        weight=torch.tensor([[[1.0, -2.0]], [[0.5, 0.0]]]),
        mean=x.mean(1, keepdim=True),
        mean_abs=x.abs().mean(1, keepdim=True),
        variance=x.var(1, correction=0, keepdim=True),
    )
    evidence = Evidence(inputs=[inputs])
    assert members("activation_mean", evidence) == [[2, 4]]
    assert members("activation_variance", evidence) == [[pytest.approx(14 / 3), 0]]
    rms = math.sqrt(14 / 3)
    assert members("wanda", evidence) == [[pytest.approx(3 * rms), pytest.approx(0.5 * 4)]]


def test_wanda_pairs_each_place_of_a_flattened_channel_with_its_weight():
    inputs = Inputs(
        weight=torch.tensor([[[1.0], [10.0]]]),  # one channel of two places
        mean=torch.tensor([[0.0, 3.0]]),
        mean_abs=torch.zeros(1, 2),
        variance=torch.tensor([[4.0, 0.0]]),
    )
    assert members("wanda", Evidence(inputs=[inputs])) == [[1 * 2 + 10 * 3]]


def test_derivatives():
    derivatives = Derivatives(
        mean_abs=torch.tensor([1.0, 2.0]), mean_square=torch.tensor([3.0, 8.0])
    )
    evidence = Evidence(loss_gates=derivatives)
    assert members("taylor", evidence) == [[1, 2]]
    assert members("fisher", evidence) == [[1.5, 4]]
    assert members("hessian", evidence) == []
    assert members("hessian", Evidence(output_gates=derivatives)) == [[3, 8]]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", [25, 6, 1.25]),
        ("mean", [12.5, 3, 0.625]),
        ("max", [16, 4, 1]),
        ("product", [144, 8, 0.25]),
        ("first", [9, 2, 0.25]),
    ],
)
def test_reductions_join_the_members_of_a_group(reduction, expected):
    leaf = Var(3)
    found = score(IMPORTANCE["l2"], {leaf: WEIGHTS}, reduction=reduction)[leaf]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", IMPORTANCE)
def test_a_criterion_leaves_its_evidence_as_it_was(name, tiny_net, task_for):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    needs = IMPORTANCE[name].needs
    evidence, again = (gather(analysis, needs, task_for(3, 16, 16), num_images=4) for _ in range(2))
    scores = score(IMPORTANCE[name], evidence, reduction="sum")
    assert scores.keys() <= evidence.keys()
    assert scores
    for leaf, each in scores.items():
        assert each.shape == (leaf.size,)
        assert bool((each >= 0).all())
        assert each.isfinite().all()
    twice = score(IMPORTANCE[name], evidence, reduction="sum")
    other = score(IMPORTANCE[name], again, reduction="sum")
    for leaf, each in scores.items():
        assert torch.equal(each, twice[leaf])
        assert torch.equal(each, other[leaf])


def test_l2_of_every_weight_that_makes_or_reads_a_channel(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    (leaf,) = leaves(analysis.tensors["conv1.weight"][0])
    evidence = gather(analysis, ["weights"], SimpleNamespace(), num_images=1)
    found = score(IMPORTANCE["l2"], evidence, reduction="sum")[leaf]
    made, read = tiny_net.conv1.weight, tiny_net.conv2.weight
    expected = made.square().sum((1, 2, 3)) + read.square().sum((0, 2, 3))
    assert torch.allclose(found, expected.double())


# ------------------------------------------------------------------------------------- in a stage


class Doubtful(nn.Module):
    """A batch norm behind the first convolution, none behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24)
        self.b, self.last = nn.Conv2d(24, 24, 1), nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        return self.last(x.mean((2, 3)))


def test_a_group_of_which_nothing_is_known_stays_whole(task_for):
    model = Doubtful().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
    stage = Prune(macs=0.6, importance="batch_norm_scale", round_to=1)
    facts = stage(model, task_for(8, 8, 8)).facts
    assert facts["widths"]["a"][1] < 24
    assert facts["widths"]["b"] == [24, 24]
    assert facts["unranked"] == ["b"]


def test_a_criterion_that_knows_nothing_at_all_says_so(networks, task_for):
    stage = Prune(macs=0.5, importance="batch_norm_scale")
    with pytest.raises(RecipeError, match=r"tells nothing of this network, .* choose another"):
        stage(networks["attention"](), task_for(8, 8, 8))


def test_channels_that_do_nothing_go_first(task_for):
    """Dead channels with large weights deceive a norm, not what looks at the outputs."""
    model = Doubtful().eval()
    dead = [1, 4, 9, 16, 20, 23]
    with torch.no_grad():
        model.norm.weight.fill_(1)
        model.norm.bias.fill_(0.5)
        model.norm.bias[dead] = -100  # never above zero behind the ReLU
        model.a.weight[dead] *= 3
        model.b.weight[:, dead] *= 3
    kept = {}
    for importance in ("l2", "wanda", "activation_variance", "hessian"):
        stage = Prune(macs=0.75, importance=importance, round_to=1, include=("a",))
        rows = stage(model, task_for(8, 8, 8)).model.state_dict()["a.weight"]
        same = (rows[:, None] == model.a.weight).flatten(2).all(2)
        kept[importance] = set(same.nonzero()[:, 1].tolist())
    assert kept["l2"] >= {*dead}
    for importance in ("wanda", "activation_variance", "hessian"):
        assert not kept[importance] & {*dead}


def test_random_importance_depends_on_the_seed_of_the_run(tiny_net, task_for):
    task = task_for(3, 16, 16)
    stage = Prune(macs=0.5, importance="random", round_to=1)
    one, other, same = (stage(tiny_net, task, Context(seed=seed)).structure for seed in (0, 1, 0))
    assert one == same
    assert one != other
