"""What settings refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest

from slimdown.distill.settings import TrainSettings
from slimdown.errors import RecipeError


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("epochs", 0),
        ("alpha", 1.5),
        ("alpha", float("nan")),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("optimizer", "adam"),
        ("learning_rate", -0.1),
        ("weight_decay", -1e-4),
        ("momentum", 1.0),
        ("warmup", 1.0),
        ("ema", 1.0),
        ("clip_norm", 0.0),
        ("augment", "flip"),
        ("mixup", -0.2),
        ("amp", "fp16"),
    ],
)
def test_wrong_values_are_named(name: str, wrong: Any) -> None:
    with pytest.raises(RecipeError, match=rf"distill\.{name} .*got .*{wrong}"):
        TrainSettings(**{name: wrong})


def test_each_optimizer_has_a_learning_rate_of_its_own() -> None:
    assert TrainSettings(optimizer="adamw").peak_rate < TrainSettings(optimizer="sgd").peak_rate
    assert TrainSettings(learning_rate=0.3).peak_rate == 0.3
