from __future__ import annotations

import json

import pytest
import torch

from slimdown.capture import analyze, capture
from slimdown.errors import BadInput
from slimdown.prune.plan import Plan, kept_from_slices

PLAN = Plan(
    delivery="in_place",
    slices={"stem.weight": {0: (0, 3, 5)}, "conv1.weight": {0: (1,), 1: (0, 3, 5)}},
    attributes={"stem": {"out_channels": 3}, "norm": {"normalized_shape": (3,)}},
)


def test_a_plan_goes_through_json_and_back():
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"delivery": "by_post", "parameters": {}, "attributes": {}},
        {"delivery": "graph", "parameters": {"a": 3}, "attributes": {}},
        {"delivery": "graph", "parameters": {"a": {"x": [1]}}, "attributes": {}},
    ],
)
def test_what_is_no_plan_is_refused(damage):
    with pytest.raises(BadInput, match="not the plan of a pruning"):
        Plan.from_json(damage)


def test_the_plan_of_another_model_is_refused(tiny_net):
    analysis = analyze(capture(tiny_net, torch.zeros(1, 3, 16, 16)))
    for slices in ({"nowhere.weight": {0: (0,)}}, {"stem.weight": {0: (0, 99)}}):
        with pytest.raises(BadInput, match="this model lacks"):
            kept_from_slices(analysis, slices)
