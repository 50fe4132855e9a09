"""Prune, recover, prune again, recover again: as a recipe, in place and as a graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown import Context, Distill, Prune, Recipe, Sparsify, compress, iterate
from slimdown.capture import capture
from slimdown.core import Batch, Predict, Score
from slimdown.measure import MeasureSettings


@pytest.fixture
def task() -> Any:
    """Which of four quadrants is the brightest."""
    images = torch.rand(96, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    labels = F.adaptive_avg_pool2d(images.mean(1), 2).flatten(1).argmax(1)

    def score(predict: Predict) -> Score:
        with torch.no_grad():
            predictions = predict(images[:32]).argmax(1)
        return Score.from_outcomes("top1", (predictions == labels[:32]).float())

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    return SimpleNamespace(
        example_input=images[:1],
        train_batches=lambda epoch: [
            Batch(images[i : i + 32], labels[i : i + 32]) for i in (32, 64)
        ],
        calibration_batches=lambda: [images[32:64], images[64:]],
        score=score,
        loss=loss,
        fingerprint="quadrants",
    )


STAGES = [Prune(macs=0.36, importance="l2", round_to=1), Distill(epochs=1)]


@pytest.mark.parametrize("form", ["in_place", "graph"])
def test_rounds_of_pruning_and_recovery(tiny_net: nn.Module, task: Any, form: str) -> None:
    original = tiny_net
    model = tiny_net if form == "in_place" else capture(tiny_net, task.example_input)
    kept = 1.0
    for stage in iterate(STAGES, rounds=2):
        result = stage(model, task, Context(original=original))
        if isinstance(stage, Prune):
            assert result.facts["delivery"] == form
            before, after = result.facts["macs"]
            kept *= after / before
        rebuilt = stage.rebuild(model, result.structure, task.example_input)
        rebuilt.load_state_dict(result.model.state_dict(), strict=True)
        model = result.model
    assert 0.3 < kept <= 0.36
    assert torch.isfinite(model(task.example_input)).all()


def test_a_run_in_rounds_resumes_step_by_step(
    tiny_net: nn.Module, task: Any, tmp_path: Path
) -> None:
    recipe = Recipe(
        [*iterate([*STAGES, Sparsify(sparsity=0.5)], rounds=2)],
        targets=("onnxruntime",),
        measure=MeasureSettings(num_warmup=1, num_samples=3, memory=False),
    )
    first = compress(tiny_net, task, recipe, folder=tmp_path)
    assert [step.name for step in first.steps] == [
        "00-original",
        "01-prune",
        "02-distill",
        "03-sparsify",
        "04-prune",
        "05-distill",
        "06-sparsify",
    ]
    assert first.steps[-1].macs <= 0.36 * first.steps[0].macs
    shares = [first.step(name).facts["zeros"] for name in ("03-sparsify", "06-sparsify")]
    assert shares[0] < shares[1]
    assert first.step("05-distill").facts["zeros"] > 0.1
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0*/model.safetensors")}
    again = compress(tiny_net, task, recipe, folder=tmp_path)
    assert again.steps == first.steps
    assert times == {path: path.stat().st_mtime_ns for path in times}
