"""The stage in the pipeline's hands: its result, its facts, its way through a file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from slimdown.core import Context
from slimdown.distill import Distill
from slimdown.distill.objective import choose_augmentation
from slimdown.errors import RecipeError


def test_the_result_can_be_rebuilt(tiny_net: nn.Module, toy_task: Any) -> None:
    stage = Distill(epochs=1)
    result = stage(tiny_net, toy_task, Context(original=tiny_net))
    assert result.structure == {}
    rebuilt = stage.rebuild(tiny_net, result.structure, toy_task.example_input)
    assert rebuilt is not tiny_net
    rebuilt.load_state_dict(result.model.state_dict())
    assert torch.equal(rebuilt.eval()(toy_task.images), result.model(toy_task.images))


def test_facts_are_what_the_report_reads(tiny_net: nn.Module, toy_task: Any) -> None:
    facts = Distill(epochs=2)(tiny_net, toy_task, Context(original=tiny_net)).facts
    assert set(facts) == {
        "history",
        "alpha",
        "temperature",
        "seconds_per_epoch",
        "teacher",
        "num_steps",
        "zeros",
    }
    assert [record["epoch"] for record in facts["history"]] == [1, 2]
    assert facts["teacher"] == "original"
    assert facts["zeros"] is None
    assert facts["num_steps"] == 8
    assert facts["seconds_per_epoch"] > 0
    assert json.loads(json.dumps(facts)) == facts
    tuned = Distill(epochs=1, alpha=1.0)(tiny_net, toy_task)
    assert tuned.facts["teacher"] == "none"


def test_settings_go_through_json() -> None:
    stage = Distill(epochs=3, ema=0.99, optimizer="adamw")
    kind = TypeAdapter(Distill)
    assert kind.validate_json(kind.dump_json(stage)) == stage
    assert stage.kind == "distill"
    with pytest.raises(RecipeError):
        Distill(alpha=2)


def test_augmentation_suits_the_task(toy_task: Any) -> None:
    assert choose_augmentation(toy_task, Distill()) == "flip-crop"
    toy_task.flip = False
    assert choose_augmentation(toy_task, Distill()) == "crop"
    assert choose_augmentation(toy_task, Distill(augment="flip-crop")) == "flip-crop"
    toy_task.augments = True
    assert choose_augmentation(toy_task, Distill()) == "none"
