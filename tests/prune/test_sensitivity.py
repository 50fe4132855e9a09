"""What pruning one group alone does to the output, and what that makes of the choice of widths."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var
from slimdown.core import Context
from slimdown.errors import Interrupted, RecipeError
from slimdown.prune import Prune
from slimdown.prune.budget.cost import volume_cost
from slimdown.prune.budget.sensitivity import Sensitivity, tried_widths, with_damage
from slimdown.prune.budget.widths import Choice, choose_widths, losses


@pytest.fixture
def net():
    """Two branches of equal weights, of which the second hardly counts in the output."""
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.strong, self.weak = (
                nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)) for _ in range(2)
            )

        def forward(self, x):
            return (self.strong(x) + 0.01 * self.weak(x)).mean((2, 3))

    net = Branches()
    net.weak.load_state_dict(net.strong.state_dict())
    return net.eval()


def task_with(num_images):
    images = torch.randn(num_images, 3, 8, 8)
    return SimpleNamespace(example_input=images[:1], calibration_batches=lambda: [images])


def choice_of(*scores, widths):
    return Choice(importance={Var(len(scores)): torch.tensor(scores)}, widths=widths)


def test_widths_near_three_quarters_half_and_a_quarter_are_tried():
    assert tried_widths(choice_of(*[1.0] * 64, widths=tuple(range(64, 0, -8)))) == [48, 32, 16]
    assert tried_widths(choice_of(*[1.0] * 4, widths=(4, 2))) == [2]
    assert tried_widths(choice_of(1.0, widths=(1,))) == []


def test_damage_is_the_squared_error_where_it_was_measured_and_follows_importance_between():
    choice = choice_of(0.0, 1.0, 1.0, 2.0, widths=(4, 3, 2, 1))
    weighed = with_damage(choice, {2: 0.2, 1: 0.4})  # importance lost: 0, 1 and 2 of 4
    assert losses(weighed, "cost").tolist() == pytest.approx([0, 0, 0.04, 0.16])
    beyond = with_damage(choice, {2: 0.2})
    assert losses(beyond, "cost").tolist() == pytest.approx([0, 0, 0.04, 0.08])


def test_an_output_that_is_no_number_is_the_worst():
    choice = choice_of(1.0, 1.0, 1.0, 1.0, widths=(4, 2))
    assert losses(with_damage(choice, {2: float("nan")}), "cost")[-1] == 1e6
    assert with_damage(choice, {}) is choice


def test_damage_decides_before_importance():
    a, b = (choice_of(1.0, 1.0, 1.0, 1.0, widths=(4, 3, 2, 1)) for _ in range(2))
    first, second = (next(iter(each.importance)) for each in (a, b))
    weighed = [with_damage(a, {2: 0.5}), with_damage(b, {2: 0.1})]
    cost = volume_cost({first: 1, second: 1})
    assert choose_widths(weighed, cost, limit=5, per="cost") == {second: 1}


def test_the_group_that_counts_less_is_found_and_narrowed(net):
    stage = Prune(macs=0.7, importance="l2", round_to=1, sensitivity=True, compensate=False)
    shown = []
    facts = stage(net, task_with(4), Context(show=shown.append)).facts
    curves = json.loads(json.dumps(facts["sensitivity"]))
    assert set(curves) == {"strong.0", "weak.0"}
    for (share, strong), (_, weak) in zip(curves["strong.0"], curves["weak.0"], strict=True):
        assert 0 < share < 1
        assert strong > 20 * weak
    assert facts["widths"]["strong.0"] == [16, 16]
    assert facts["widths"]["weak.0"][1] < 8
    assert "prune: measure sensitivity" in {step.label for step in shown}


def test_what_was_measured_is_not_measured_again(net):
    stage = Prune(macs=0.7, importance="l2")
    task = task_with(4)
    analysis = analyze(capture(net, task.example_input))
    (choices, _) = stage._rounds(analysis, stage.score(analysis, task), 8)
    done = []
    sensitivity = Sensitivity(analysis, task.calibration_batches(), lambda n, of: done.append(n))
    assert sensitivity.weigh(choices) == sensitivity.weigh(choices)
    assert done == [0, 1]


def test_too_few_images_are_an_error(net):
    with pytest.raises(RecipeError, match=r"prune\.sensitivity looks at .* at least 2"):
        Prune(macs=0.7, importance="l2", sensitivity=True)(net, task_with(1))


def test_a_stop_is_heeded(net):
    stage = Prune(macs=0.7, importance="l2", sensitivity=True, compensate=False)
    with pytest.raises(Interrupted, match="measuring sensitivity"):
        stage(net, task_with(4), Context(stop_requested=lambda: True))
