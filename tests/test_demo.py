"""The demo's teacher is trained once, and its recipe does all that slimdown does."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file

from slimdown import demo
from slimdown.core import Context, Progress
from slimdown.demo import load_demo_recipe, run_demo, train_teacher
from slimdown.distill import Distill
from slimdown.errors import Interrupted
from slimdown.load import DataSource, ModelSource
from slimdown.recipe import Recipe

NET = """\
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose teacher is trained in a second."""
    monkeypatch.setattr(demo, "TEACHER_TRAINING", Distill(alpha=1.0, epochs=2))
    (tmp_path / "net.py").write_text(NET)
    model = ModelSource(reference=f"{tmp_path}/net.py:build")
    return Recipe([], model=model, data=DataSource(kind="digits"))


def test_the_recipe_uses_all_three_methods_under_a_budget() -> None:
    recipe = load_demo_recipe()
    assert [stage.kind for stage in recipe.stages] == ["prune", "distill", "quantize"]
    assert recipe.budget.max_drop is not None
    assert recipe.name == "demo"


def test_the_teacher_is_trained_once(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = set()
    context = Context(show=lambda progress: labels.add(progress.label))
    weights = train_teacher(recipe, tmp_path / "teacher", context=context)
    assert labels == {"train a teacher"}

    def fail(*arguments: object) -> NoReturn:
        raise AssertionError("trained again")

    monkeypatch.setattr(Distill, "__call__", fail)
    before = weights.stat().st_mtime_ns
    assert train_teacher(recipe, tmp_path / "teacher", context=Context()) == weights
    assert weights.stat().st_mtime_ns == before


def test_a_stopped_training_goes_on_to_the_same_teacher(tmp_path: Path, recipe: Recipe) -> None:
    undisturbed = train_teacher(recipe, tmp_path / "undisturbed", context=Context())
    shown: list[Progress] = []
    stopping = Context(show=shown.append, stop_requested=lambda: len(shown) >= 20)
    with pytest.raises(Interrupted):
        train_teacher(recipe, tmp_path / "stopped", context=stopping)
    torch.rand(100)  # the state of the generator must not matter
    resumed: list[Progress] = []
    weights = train_teacher(recipe, tmp_path / "stopped", context=Context(show=resumed.append))
    assert resumed[0].done == len(shown) + 1
    expected = load_file(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(weights).items())


@pytest.mark.slow
def test_the_demo_meets_its_budget(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "demo")
    assert report.verdicts
    assert report.budget_met
    original, result = report.steps[0], report.final_step("onnxruntime")
    assert result.macs <= 0.5 * original.macs
    assert (tmp_path / "demo" / "report.html").is_file()
