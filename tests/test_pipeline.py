"""A run is made of steps that are each made once, whatever interrupts it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slimdown
from slimdown import pipeline
from slimdown.core import (
    Artifact,
    Batch,
    Budget,
    Context,
    Json,
    Predict,
    Report,
    Score,
    StageResult,
    Target,
)
from slimdown.errors import BadInput, CannotCapture, Interrupted, MissingExtra, OutOfResources
from slimdown.files import hash_files, write_bytes
from slimdown.measure import MeasureSettings
from slimdown.recipe import Recipe
from slimdown.targets import TARGETS

CALLS: list[float] = []
"""The factors of the stages that really ran."""

QUICK = MeasureSettings(num_warmup=1, num_samples=3, memory=False)


class BrightnessTask:
    """Which of four quadrants is the brightest: a user's own task, ten lines."""

    def __init__(self, num_train: int = 64) -> None:
        self.images = torch.rand(
            num_train + 64, 3, 16, 16, generator=torch.Generator().manual_seed(3)
        )
        self.labels = F.adaptive_avg_pool2d(self.images.mean(1), 2).flatten(1).argmax(1)
        self.example_input = self.images[:1]

    def train_batches(self, epoch: int) -> list[Batch]:
        return [Batch(self.images[i : i + 32], self.labels[i : i + 32]) for i in (64, 96)]

    def calibration_batches(self) -> Iterable[Tensor]:
        return [self.images[64:96]]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    def score(self, predict: Predict) -> Score:
        with torch.no_grad():
            predictions = predict(self.images[:64]).argmax(1)
        right = (predictions == self.labels[:64]).float()
        return Score.from_outcomes("top1", right, predictions=predictions)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A stage that scales the weights of the last layer, and counts how often it was asked."""

    factor: float = 2.0
    fail: bool = False

    @property
    def kind(self) -> str:
        return "scale"

    def for_target(self, target: Target) -> Scale:
        return self

    def __call__(self, model: nn.Module, task: Any, context: Context = Context()) -> StageResult:
        CALLS.append(self.factor)
        if self.fail:
            raise BadInput("this stage fails")
        model = self.rebuild(model, {}, task.example_input)
        with torch.no_grad():
            model.head.weight.mul_(self.factor)
        return StageResult(model=model, structure={"factor": self.factor}, facts={"f": self.factor})

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        return copy.deepcopy(model)


@dataclass(frozen=True, kw_only=True)
class TorchTarget:
    """A target whose artifact is a state dict; its runtime is torch itself."""

    name: str = "torchfile"
    profile: str = "none"

    def check(self) -> str:
        return "1.0"

    def export(self, model: nn.Module, task: Any, folder: Path) -> Artifact:
        path = folder / "model.json"
        state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        write_bytes(path, json.dumps(state).encode())
        return Artifact(
            target=self.name,
            path=path,
            files=(path,),
            sha256=hash_files([path]),
            size_bytes=path.stat().st_size,
            precision="float32",
            verified="executed",
        )

    def load(self, artifact: Artifact, *, num_threads: int = 1) -> Predict:
        state = json.loads(artifact.path.read_text())
        weight, bias = torch.tensor(state["head.weight"]), torch.tensor(state["head.bias"])
        return lambda x: x.mean((2, 3)) @ weight[:, :3].T + bias


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> type[Scale]:
    """The stage of this file; its target is made known, too."""
    CALLS.clear()
    monkeypatch.setitem(TARGETS, "torchfile", TorchTarget())
    return Scale


def compress(model: nn.Module, stages: list[Any], folder: Path, **settings: Any) -> Report:
    context = {k: settings.pop(k) for k in ("show", "stop_requested") if k in settings}
    recipe = Recipe(stages, targets=("torchfile",), measure=QUICK, **settings)
    return pipeline.compress(model, BrightnessTask(), recipe, folder=folder, **context)


def test_a_step_is_made_once(scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path) -> None:
    stage = scaled()
    first = compress(tiny_net, [stage], tmp_path)
    second = compress(tiny_net, [stage], tmp_path)
    assert CALLS == [2.0]
    assert second.steps == first.steps
    assert [m.artifact for m in second.measurements] == [m.artifact for m in first.measurements]


def test_a_changed_setting_redoes_its_step_and_what_follows(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    one, two, three = scaled(factor=2.0), scaled(factor=3.0), scaled(factor=4.0)
    compress(tiny_net, [one, two, three], tmp_path)
    changed = scaled(factor=5.0)
    report = compress(tiny_net, [one, changed, three], tmp_path)
    assert CALLS == [2.0, 3.0, 4.0, 5.0, 4.0]
    assert [step.facts.get("f") for step in report.steps] == [None, 2.0, 5.0, 4.0]


def test_a_changed_model_redoes_everything(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    stage = scaled()
    compress(tiny_net, [stage], tmp_path)
    with torch.no_grad():
        tiny_net.head.bias.add_(1.0)
    compress(tiny_net, [stage], tmp_path)
    assert CALLS == [2.0, 2.0]


def test_a_changed_test_label_redoes_everything(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    recipe = Recipe([scaled()], targets=("torchfile",), measure=QUICK)
    task = BrightnessTask()
    pipeline.compress(tiny_net, task, recipe, folder=tmp_path)
    task.labels = (task.labels + 1) % 4
    report = pipeline.compress(tiny_net, task, recipe, folder=tmp_path)
    assert CALLS == [2.0, 2.0]
    accuracy = report.measurements[0].accuracy
    assert accuracy is not None
    assert accuracy.value == task.score(tiny_net).value


def test_the_users_model_is_left_as_it_was(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_net.state_dict().items()}
    tiny_net.train()
    compress(tiny_net, [scaled()], tmp_path)
    assert tiny_net.training
    for name, tensor in tiny_net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_failure_keeps_what_is_whole(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    good = scaled()
    with pytest.raises(BadInput, match="this stage fails"):
        compress(tiny_net, [good, scaled(fail=True)], tmp_path)
    assert (tmp_path / "01-scale" / "DONE").is_file()
    compress(tiny_net, [good, scaled(factor=3.0)], tmp_path)
    assert CALLS == [2.0, 2.0, 3.0]


@pytest.mark.parametrize("stop_at", range(7))
def test_a_run_stopped_anywhere_ends_like_one_that_was_not(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path, stop_at: int
) -> None:
    stages = [scaled(factor=2.0), scaled(factor=0.5)]
    whole = compress(tiny_net, stages, tmp_path / "whole")
    asked = iter(range(1000))
    stop: Callable[[], bool] = lambda: next(asked) >= stop_at  # noqa: E731
    with pytest.raises(Interrupted, match="run again"):
        compress(tiny_net, stages, tmp_path / "stopped", stop_requested=stop)
    resumed = compress(tiny_net, stages, tmp_path / "stopped")
    hashes = [[m.artifact and m.artifact.sha256 for m in r.measurements] for r in (whole, resumed)]
    assert hashes[0] == hashes[1]


def test_a_full_disk_loses_nothing(
    scaled: type[Scale],
    tiny_net: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = scaled()
    compress(tiny_net, [good], tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        with pytest.raises(OutOfResources, match="disk is full"):
            compress(tiny_net, [good, scaled(factor=3.0)], tmp_path)
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert set(before) <= after
    compress(tiny_net, [good, scaled(factor=3.0)], tmp_path)
    assert CALLS.count(2.0) == 1


def test_a_missing_extra_is_told_before_anything_is_written(
    scaled: type[Scale],
    tiny_net: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(self: TorchTarget) -> str:
        raise MissingExtra("openvino", "openvino")

    monkeypatch.setattr(TorchTarget, "check", check)
    with pytest.raises(MissingExtra, match="pip install"):
        compress(tiny_net, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missed_budget_is_a_result_and_marks_its_artifact(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    note = tmp_path / "deploy" / "torchfile" / "01-scale" / "BUDGET_NOT_MET"
    report = compress(tiny_net, [scaled()], tmp_path, budget=Budget(max_size=1))
    assert not report.budget_met
    assert "max_size: allowed 1" in note.read_text()
    assert note.with_name("model.json").is_file()
    report = compress(tiny_net, [scaled()], tmp_path, budget=Budget(max_size=10**9))
    assert report.budget_met
    assert not note.exists()


def test_a_run_can_be_moved_and_measured_again(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    report = compress(tiny_net, [scaled()], tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = slimdown.bench_run(tmp_path / "there", QUICK)
    assert [m.accuracy for m in again.measurements] == [m.accuracy for m in report.measurements]
    assert all(m.latency for m in again.measurements if m.artifact)
    assert (tmp_path / "there" / "bench" / "results.json").is_file()


def test_an_artifact_that_was_changed_is_not_measured_as_the_runs_own(
    scaled: type[Scale], tiny_net: nn.Module, tmp_path: Path
) -> None:
    compress(tiny_net, [scaled()], tmp_path)
    with (tmp_path / "deploy" / "torchfile" / "01-scale" / "model.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BadInput, match="hash differs"):
        slimdown.bench_run(tmp_path, QUICK)


def test_all_three_methods_on_a_users_own_task_and_model(
    tiny_net: nn.Module, tmp_path: Path
) -> None:
    recipe = Recipe(
        [
            slimdown.Prune(macs=0.6),
            slimdown.Distill(epochs=1, augment="none"),
            slimdown.Quantize(),
        ],
        targets=("onnxruntime",),
        measure=QUICK,
    )
    task = BrightnessTask()
    report = slimdown.compress(tiny_net, task, recipe, folder=tmp_path)
    final = report.final_step("onnxruntime")
    assert final.kind == "quantize"
    before = report.measurement("00-original", "onnxruntime")
    after = report.measurement(final.name, "onnxruntime")
    assert before is not None
    assert after is not None
    assert final.macs < 0.7 * report.step("00-original").macs
    assert after.size_bytes is not None
    assert before.size_bytes is not None
    assert after.size_bytes < before.size_bytes
    assert after.accuracy is not None
    assert after.accuracy.agreement is not None
    assert after.accuracy.agreement >= 98.0
    assert {path.name for path in tmp_path.iterdir()} >= {
        "recipe.yaml",
        "results.json",
        "report.html",
        "report.md",
    }


@pytest.mark.parametrize(
    "order", list(permutations(["prune", "distill", "quantize"])), ids="-".join
)
def test_stages_come_in_any_order(tiny_net: nn.Module, order: tuple[str, ...]) -> None:
    stages: dict[str, Any] = {
        "prune": slimdown.Prune(macs=0.6),
        "distill": slimdown.Distill(epochs=1, augment="none"),
        "quantize": slimdown.Quantize(),
    }
    task, model = BrightnessTask(), tiny_net
    context = Context(original=tiny_net)
    for kind in order:
        result = stages[kind](model, task, context)
        rebuilt = stages[kind].rebuild(model, result.structure, task.example_input)
        rebuilt.load_state_dict(result.model.state_dict())
        model = rebuilt.eval()
        assert torch.equal(model(task.images[:8]), result.model.eval()(task.images[:8]))
    kernels = {layer.shape for layer in model.parameters() if layer.ndim == 4}
    assert kernels != {layer.shape for layer in tiny_net.parameters() if layer.ndim == 4}
    assert task.score(model).num_samples == 64


@pytest.mark.parametrize("stage", [slimdown.Quantize(), slimdown.Quantize(precision="float16")])
def test_a_model_of_one_batch_size_only_is_told(stage: slimdown.Quantize) -> None:
    class OneImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)).view(1, 4)

    with pytest.raises(CannotCapture, match="fixed to one batch size"):
        stage(OneImage(), BrightnessTask())


def test_a_quantized_model_is_trained_gently(tiny_net: nn.Module) -> None:
    task, context = BrightnessTask(), Context(original=tiny_net)
    distill = slimdown.Distill(epochs=1, augment="none", warmup=0.0)
    quantized = slimdown.Quantize()(tiny_net, task).model
    pruned = slimdown.Prune(macs=0.6)(quantized, task).model
    rates = [
        distill(model, task, context).facts["history"][-1]["learning_rate"]
        for model in (tiny_net, quantized, pruned)
    ]
    assert rates[1] == rates[2] == pytest.approx(rates[0] / 20)
    assert rates[0] > 0


def test_the_report_says_which_layers_run_in_int8_and_why_not(
    tiny_net: nn.Module, tmp_path: Path
) -> None:
    recipe = Recipe((slimdown.Quantize(exclude=("conv1",), effort="fast"),), measure=QUICK)
    report = slimdown.compress(tiny_net, BrightnessTask(), recipe, folder=tmp_path)
    before, after = (m.artifact for m in report.measurements if m.artifact is not None)
    assert before.audit == ()
    told = {layer.name: (layer.precision, layer.reason) for layer in after.audit}
    int8 = dict.fromkeys(("stem", "conv2", "down", "head"), ("int8", None))
    assert told == {**int8, "conv1": ("float32", "excluded by the recipe")}
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["measurements"][-1]["artifact"]["audit"]) == 5
