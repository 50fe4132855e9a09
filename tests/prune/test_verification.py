from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from slimdown import verify
from slimdown.errors import BadInput
from slimdown.prune import Prune
from slimdown.prune.verify import Unverified

EXAMPLE = torch.zeros(1, 8, 8, 8)


@pytest.fixture
def prune(task_for):
    return lambda model: Prune(macs=0.5, round_to=1)(model, task_for(8, 8, 8))


@pytest.mark.parametrize("name", ["batch norm", "shuffle", "attention", "group norm", "unknown"])
def test_what_prune_gives_is_verified(name, networks, prune):
    model = networks[name]()
    found = verify(model, prune(model), EXAMPLE)
    assert found.relative_error <= 1e-5
    assert found.delivered_error <= 1e-5
    assert found.control_error > 1e-3
    assert found.num_operators > 10


class Flat(nn.Module):
    """Tells a size and has no tensor, so that the model's graph knows nothing of it."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return torch.relu(x.view(len(x), self.channels, -1)).view(len(x), self.channels, 8, 8)


def test_modules_without_tensors_are_part_of_the_plan(prune):
    model = nn.Sequential(
        nn.Conv2d(8, 16, 1), Flat(16), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    result = prune(model)
    assert result.facts["delivery"] == "in_place"
    assert "1" in result.structure["attributes"]
    verify(model, result, EXAMPLE)


def test_it_holds_whatever_the_weights_are(networks, prune):
    model = networks["batch norm"]()
    result = prune(model)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.zero_()
    verify(networks["batch norm"](), result, EXAMPLE)


def test_a_model_that_was_tampered_with_is_noticed(networks, prune):
    model = networks["prelu"]()
    result = prune(model)
    wrong = copy.deepcopy(result.model)
    wrong.middle.forward = torch.tanh
    with pytest.raises(Unverified, match="the pruned model differs"):
        verify(model, replace(result, model=wrong), EXAMPLE)


def test_a_plan_with_a_wrong_index_is_noticed(networks, prune):
    # One tensor keeps other channels than those that it is multiplied with.
    model = networks["plain"]()
    result = prune(model)
    structure = copy.deepcopy(result.structure)
    kept = structure["kept"][structure["parameters"]["first.bias"]["kept"]["0"]]
    gone = min(set(range(24)) - {int(i) for i in kept.replace("-", ",").split(",")})
    structure["kept"].append(str(gone))
    structure["parameters"]["last.weight"]["kept"]["1"] = len(structure["kept"]) - 1
    with pytest.raises(BadInput, match=r"the plan contradicts itself: axis 1 of last\.weight"):
        verify(model, replace(result, structure=structure), EXAMPLE)


def test_another_model_is_refused(networks, prune):
    result = prune(networks["plain"]())
    with pytest.raises(BadInput, match="the plan is of another model"):
        verify(networks["dense"](), result, EXAMPLE)


def test_nothing_is_verified_of_outputs_that_are_constant(task_for):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 5, 1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) * 0

    with pytest.raises(Unverified, match="do not depend on the input"):
        Prune(macs=0.5, importance="l2")(Constant().eval(), task_for(8, 8, 8))
