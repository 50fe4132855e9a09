"""What was saved comes back, from a run's steps and from a folder of its own, or says why not."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimdown
from slimdown import Batch, Context, Distill, Prune, Quantize, Recipe, Score, StageResult
from slimdown.errors import BadInput
from slimdown.plan import plan_steps
from slimdown.recipe import dump_recipe
from slimdown.steps import Run

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


class Stubborn(nn.Module):
    """Refuses other widths than its own, so that it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        if y.shape[1] != 24:
            raise ValueError("24 channels, or nothing")
        return self.b(y).mean((2, 3))


class Task:
    example_input = IMAGES[:1]
    fingerprint = "four images"

    def train_batches(self, epoch):
        return [Batch(IMAGES, torch.arange(4))]

    def calibration_batches(self):
        return [IMAGES]

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch.targets)

    def score(self, predict):
        with torch.no_grad():
            right = predict(IMAGES).argmax(1) == torch.arange(4)
        return Score.from_outcomes("top1", right.float())


@pytest.fixture
def prune():
    return lambda model: Prune(macs=0.6, round_to=1)(model, Task())


@pytest.fixture
def run_stages(tmp_path):
    """Make every step of a run, without deploying any."""

    def run(model, recipe):
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        run = Run(folder=tmp_path, task=Task(), context=Context(original=model))
        made = {}
        for plan in plan_steps(recipe.stages, [FakeTarget()]):
            made[plan.name] = run.take(model) if plan.stage is None else run.make(plan, made)
        return list(made)

    return run


class FakeTarget:
    name = "nowhere"
    profile = "onnxruntime-x86"


def test_what_was_saved_comes_back(tiny_net, prune, tmp_path):
    result = prune(tiny_net)
    slimdown.save(result, tmp_path / "small")
    module = slimdown.load(tmp_path / "small", model=type(tiny_net)())
    assert type(module) is type(tiny_net)
    assert not module.training
    assert torch.equal(module(IMAGES), result.model(IMAGES))
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"plan.json", "model.safetensors"}


def test_a_graph_comes_back_with_and_without_slimdown(prune, tmp_path):
    result = prune(Stubborn().eval())
    assert result.facts["delivery"] == "graph"
    slimdown.save(result, tmp_path)
    expected = result.model(IMAGES)
    module = slimdown.load(tmp_path, model=Stubborn())
    assert torch.equal(module(IMAGES), expected)
    program = torch.export.load(tmp_path / "graph.pt2").module()
    torch.testing.assert_close(program(IMAGES), expected)
    torch.testing.assert_close(program(IMAGES[:1]), expected[:1])


def test_an_earlier_models_graph_does_not_stay(tiny_net, prune, tmp_path):
    (tmp_path / "graph.pt2").touch()
    slimdown.save(prune(tiny_net), tmp_path)
    assert not (tmp_path / "graph.pt2").exists()


def test_another_precision_is_refused(tiny_net, prune, tmp_path):
    slimdown.save(prune(tiny_net), tmp_path)
    with pytest.raises(BadInput, match="in the same precision"):
        slimdown.load(tmp_path, model=copy.deepcopy(tiny_net).double())


def test_every_step_of_a_run_comes_back(tiny_net, run_stages, tmp_path):
    recipe = Recipe([Prune(macs=0.6, round_to=1), Distill(epochs=1), Quantize()])
    original, *steps = run_stages(tiny_net, recipe)
    for step in steps:
        module = slimdown.load(tmp_path / step, model=type(tiny_net)())
        saved, own = load_file(tmp_path / step / "model.safetensors"), module.state_dict()
        assert saved.keys() == own.keys()
        assert all(torch.equal(saved[name], own[name]) for name in saved)
        assert module(IMAGES).shape == (4, 4)
    assert torch.equal(slimdown.load(tmp_path / original, tiny_net)(IMAGES), tiny_net(IMAGES))

    with pytest.raises(BadInput, match="name one of its steps: 00-original, 01-prune"):
        slimdown.load(tmp_path, model=tiny_net)
    with pytest.raises(BadInput, match="names no model"):
        slimdown.load(tmp_path / "01-prune")
    (tmp_path / "01-prune" / "DONE").unlink()
    with pytest.raises(BadInput, match="01-prune is missing or not whole"):
        slimdown.load(tmp_path / "02-distill", model=tiny_net)


def test_the_recipes_own_model_is_found(run_stages, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    source = slimdown.ModelSource(f"{tmp_path / 'mine.py'}:make")
    recipe = Recipe([Prune(macs=0.6, round_to=1)], model=source)
    run_stages(slimdown.load_model(source).eval(), recipe)
    assert slimdown.load(tmp_path / "01-prune")[0].weight.shape[0] < 16


def test_what_does_not_belong_together_is_told_by_its_first_difference(tiny_net, prune, tmp_path):
    slimdown.save(prune(tiny_net), tmp_path)
    with pytest.raises(BadInput, match=r"conv1.weight was \(32, 16, 3, 3\).*\(40, 20, 3, 3\) here"):
        slimdown.load(tmp_path, model=type(tiny_net)(channels=20))
    with pytest.raises(BadInput, match=r"this one has no conv1\.weight"):
        slimdown.load(tmp_path, model=Stubborn())

    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({**state, "head.bias": torch.zeros(7)}, weights)
    with pytest.raises(BadInput, match=r"head.bias is \(7,\) there and \(4,\) in the model"):
        slimdown.load(tmp_path, model=tiny_net)
    del state["conv1.bias"]
    save_file(state, weights)
    with pytest.raises(BadInput, match=r"conv1.bias is missing there"):
        slimdown.load(tmp_path, model=tiny_net)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_damaged_files_are_refused(content, tiny_net, prune, tmp_path):
    slimdown.save(prune(tiny_net), tmp_path)
    plan = (tmp_path / "plan.json").read_bytes()
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"plan.json is (missing or )?damaged"):
        slimdown.load(tmp_path, model=tiny_net)
    (tmp_path / "plan.json").write_bytes(plan)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="missing or damaged"):
        slimdown.load(tmp_path, model=tiny_net)


def test_what_is_no_saved_model_is_refused(tiny_net, prune, tmp_path):
    with pytest.raises(BadInput, match=r"there is no plan.json"):
        slimdown.load(tmp_path / "nowhere", model=tiny_net)
    slimdown.save(prune(tiny_net), tmp_path)
    with pytest.raises(BadInput, match="not the model itself"):
        slimdown.load(tmp_path)
    with pytest.raises(BadInput, match="save takes what Prune made"):
        slimdown.save(StageResult(model=tiny_net), tmp_path)
