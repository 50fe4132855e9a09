from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import is_frozen
from slimdown.errors import BadInput
from slimdown.prune.plan import Plan, kept_from_slices, plan_of

PLAN = Plan(
    delivery="in_place",
    slices={"stem.weight": {0: (0, 3, 4, 5)}, "conv1.weight": {0: (1,), 1: (0, 3, 4, 5)}},
    attributes={"stem": {"out_channels": 4}, "norm": {"normalized_shape": (4,)}},
    traced=("attn",),
    shapes={"stem.weight": (16, 3, 3, 3), "conv1.weight": (32, 16, 3, 3)},
    input_shape=(3, 16, 16),
)


def test_a_plan_goes_through_json_and_back():
    structure = json.loads(json.dumps(PLAN.to_json()))
    assert structure["kept"] == ["0,3-5", "1"]  # shared by the two tensors
    assert Plan.from_json(structure) == PLAN


def test_plans_of_the_first_version_are_read():
    plan = Plan.from_json(
        {
            "delivery": "in_place",
            "parameters": {"stem.weight": {"0": [0, 3]}},
            "attributes": {"stem": {"out_channels": 2}, "norm": {"normalized_shape": [2]}},
        }
    )
    assert plan.slices == {"stem.weight": {0: (0, 3)}}
    assert plan.attributes["norm"] == {"normalized_shape": (2,)}
    assert plan.shapes == {}


def test_a_plan_from_the_future_is_refused():
    with pytest.raises(BadInput, match=r"version 99.*update slimdown"):
        Plan.from_json({"version": 99})


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"delivery": "by_post", "parameters": {}, "attributes": {}},
        {"delivery": "graph", "parameters": {"a": 3}, "attributes": {}},
        {"delivery": "graph", "parameters": {"a": {"x": [1]}}, "attributes": {}},
        {"version": 2, "delivery": "graph", "parameters": {}, "attributes": {}},
        {**PLAN.to_json(), "kept": ["0,3-5"]},
        {**PLAN.to_json(), "kept": ["0,3-5", "one"]},
    ],
)
def test_what_is_no_plan_is_refused(damage):
    with pytest.raises(BadInput, match="not the plan of a pruning"):
        Plan.from_json(damage)


def half_of(analysis):
    return {
        leaf: torch.arange(leaf.size) % 3 > 0 for leaf in analysis.channels if not is_frozen(leaf)
    }


def test_a_plan_knows_its_model_from_others(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    plan = plan_of(analysis, half_of(analysis), tiny_net)
    plan.check(tiny_net)
    assert plan.input_shape == (3, 16, 16)

    wider = type(tiny_net)(channels=24)
    with pytest.raises(BadInput, match=r"stem.weight was \(16, 3, 3, 3\).*is \(24, 3, 3, 3\) here"):
        plan.check(wider)
    del wider.stem
    with pytest.raises(BadInput, match=r"this one has no stem\.weight"):
        plan.check(wider)


def test_a_plan_without_shapes_is_checked_by_what_it_keeps(tiny_net):
    for axes in ({0: (0, 99)}, {0: ()}, {7: (0,)}):
        plan = Plan(delivery="in_place", slices={"stem.weight": axes}, attributes={})
        with pytest.raises(BadInput, match=r"on axis . of stem.weight, which is \(16, 3, 3, 3\)"):
            plan.check(tiny_net)


def test_the_plan_of_another_model_is_refused(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    for slices in ({"nowhere.weight": {0: (0,)}}, {"stem.weight": {0: (0, 99)}}):
        with pytest.raises(BadInput, match="this model lacks"):
            kept_from_slices(analysis, slices)


def test_the_plan_of_a_resnet50_is_small():
    torchvision = pytest.importorskip("torchvision")
    model: nn.Module = torchvision.models.resnet50(weights=None).eval()
    analysis = analyze(capture(model, torch.zeros(1, 3, 64, 64)))
    structure = plan_of(analysis, half_of(analysis), model).to_json()
    assert len(structure["kept"]) < len(structure["parameters"])
    assert len(json.dumps(structure, indent=1)) < 100_000
