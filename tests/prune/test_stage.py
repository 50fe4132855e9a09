from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import nn

import slimdown.quantize.fake_quantize as fq
from slimdown.core import Context, Stage
from slimdown.errors import CannotCapture, RecipeError
from slimdown.prune import Prune
from slimdown.prune.plan import Plan


def test_a_stage_is_frozen_and_says_what_it_is():
    stage: Stage = Prune(macs=0.5)
    assert stage.kind == "prune"
    assert stage.for_target(object()) is stage
    with pytest.raises(FrozenInstanceError):
        stage.macs = 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of macs, parameters, size, latency, .* got none"),
        ({"macs": 0.5, "size": 0.5}, "exactly one of .* got macs=0.5, size=0.5"),
        ({"latency": float("nan")}, r"prune.latency is the fraction .* in \(0, 1\], got nan"),
        ({"size": -0.5}, r"prune.size is the fraction of bytes .* got -0.5"),
        ({"macs": 0.5, "target": "openvino"}, "target='openvino' names the runtime whose latency"),
        (
            {"macs": 50},
            r"prune.macs is the fraction of MACs to keep and must be in \(0, 1\], got 50",
        ),
        ({"parameters": 0}, r"prune.parameters is the fraction .* got 0"),
        (
            {"macs": 0.5, "importance": "tailor"},
            "importance must be one of random, l1, .* got 'tailor': did you mean 'taylor'",
        ),
        ({"macs": 0.5, "reduction": "add"}, "reduction must be one of sum, mean, .* got 'add'"),
        ({"macs": 0.5, "scope": "globl"}, "scope must be .* got 'globl': did you mean 'global'"),
        ({"macs": 0.5, "num_images": 0}, "num_images must be at least 1, got 0"),
        ({"macs": 0.5, "round_to": 0}, "round_to must be at least 1, got 0"),
        ({"macs": 0.5, "min_keep": 1.5}, r"min_keep .* must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_made(settings, message):
    with pytest.raises(RecipeError, match=message):
        Prune(**settings)


@pytest.mark.parametrize("settings", [{"macs": 0.5}, {"parameters": 0.4}, {"macs": 0.7}])
@pytest.mark.parametrize("importance", ["l2", "lamp", "wanda", "hessian"])
def test_the_budget_is_kept_to(tiny_net, task_for, settings, importance):
    stage = Prune(**settings, importance=importance, round_to=4)
    facts = stage(tiny_net, task_for(3, 16, 16)).facts
    ((name, asked),) = settings.items()
    before, after = facts[name]
    assert asked - 0.1 < after / before <= asked


def test_facts_are_json_and_tell_the_widths(tiny_net, task_for):
    result = Prune(macs=0.5)(tiny_net, task_for(3, 16, 16))
    facts = json.loads(json.dumps(result.facts))
    assert facts["delivery"] == "in_place"
    assert facts["reason"]
    state = result.model.state_dict()
    for layer, (before, after) in facts["widths"].items():
        assert after == len(state[f"{layer}.weight"]) <= before
    assert facts["relative_error"] < 1e-5
    assert set(facts["frozen"]) == {"input", "output"}
    assert sum(p.numel() for p in result.model.parameters()) == facts["parameters"][1]


def test_keeping_everything_changes_nothing(tiny_net, task_for):
    result = Prune(macs=1.0)(tiny_net, task_for(3, 16, 16))
    plan = Plan.from_json(result.structure)
    assert (plan.delivery, plan.slices, plan.attributes) == ("in_place", {}, {})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(result.model(x), tiny_net(x))


def test_no_random_number_of_the_run_is_drawn(tiny_net, task_for):
    task = task_for(3, 16, 16)
    before = torch.get_rng_state()
    Prune(macs=0.5)(torch.nn.Sequential(tiny_net, torch.nn.Dropout()), task)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_result_is_the_same_each_time(tiny_net, task_for):
    task = task_for(3, 16, 16)
    one, other = Prune(macs=0.5)(tiny_net, task), Prune(macs=0.5)(tiny_net, task)
    assert one.structure == other.structure
    for result in (one, other):
        del result.facts["compensation"]["seconds"]
    assert one.facts == other.facts
    state = other.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.model.state_dict().items())


@pytest.mark.parametrize("name", ["grouped", "padded shortcut", "attention", "torch attention"])
def test_a_saved_plan_rebuilds_the_same_model(name, networks, task_for):
    task = task_for(8, 8, 8)
    model, stage = networks[name](), Prune(macs=0.5, round_to=1)
    result = stage(model, task)
    structure = json.loads(json.dumps(result.structure))
    fresh = networks[name]()
    for parameter in fresh.parameters():  # rebuilding must not look at importance
        nn.init.constant_(parameter, 0.1)
    again = stage.rebuild(fresh, structure, task.example_input)
    assert type(again).__name__ == type(result.model).__name__
    again.load_state_dict(result.model.state_dict(), strict=True)
    x = torch.randn(3, 8, 8, 8)
    assert torch.equal(again(x), result.model(x))


def test_pruning_twice(tiny_net, task_for, masked_outputs):
    task = task_for(3, 16, 16)
    once = Prune(macs=0.7, round_to=1)(tiny_net, task)
    twice = Prune(macs=0.6, round_to=1, compensate=False)(once.model, task)
    assert twice.facts["macs"][0] == once.facts["macs"][1]
    assert twice.facts["macs"][1] <= 0.6 * twice.facts["macs"][0]
    x = torch.randn(3, 3, 16, 16)
    reference = masked_outputs(once.model, twice.structure, x)
    assert torch.allclose(twice.model.double()(x.double()), reference)


def test_pruning_a_pruned_graph(networks, task_for):
    task = task_for(8, 8, 8)
    once = Prune(macs=0.5, round_to=1)(networks["torch attention"](), task)
    assert once.facts["delivery"] == "graph"
    twice = Prune(macs=0.7, round_to=1)(once.model, task)
    rebuilt = Prune(macs=0.7).rebuild(once.model, twice.structure, task.example_input)
    rebuilt.load_state_dict(twice.model.state_dict())
    x = torch.randn(3, 8, 8, 8)
    assert torch.equal(rebuilt(x), twice.model(x))


class FakeQuantized(nn.Module):
    """What the quantize stage makes: fake quantization of every weight and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 5, 3)
        self.weights = nn.ModuleList(
            fq.FakeQuantizePerChannel(n, axis=0, quant_min=-127, quant_max=127) for n in (24, 5)
        )
        self.activation = fq.FakeQuantizePerTensor(quant_min=0, quant_max=255)
        for quantizer in (*self.weights, self.activation):
            quantizer.scale.copy_(0.01 + 0.01 * torch.rand(quantizer.scale.shape))

    def forward(self, x):
        x = nn.functional.conv2d(x, self.weights[0](self.a.weight), self.a.bias, padding=1)
        x = self.activation(torch.relu(x))
        return nn.functional.conv2d(x, self.weights[1](self.b.weight), self.b.bias).mean((2, 3))


def test_pruning_a_fake_quantized_model(task_for, masked_outputs):
    model = FakeQuantized().eval()
    result = Prune(macs=0.5, round_to=1)(model, task_for(8, 8, 8))
    scale = result.model.state_dict()["weights.0.scale"]
    assert len(scale) == result.facts["widths"]["a"][1] < 24
    x = torch.randn(3, 8, 8, 8)
    reference = masked_outputs(model, result.structure, x)
    assert torch.allclose(result.model.double()(x.double()), reference, atol=1e-6)
    result.model.float().train()(x).square().mean().backward()
    assert result.model.a.weight.grad.isfinite().all()


def test_excluded_layers_keep_their_channels(networks, task_for):
    task = task_for(8, 8, 8)
    widths = Prune(macs=0.6, round_to=1, exclude=("middle.a",))(networks["dense"](), task)
    widths = widths.facts["widths"]
    assert widths["middle.a"] == [8, 8]
    assert widths["first"][1] < 24
    only = Prune(macs=0.9, round_to=1, include=("middle.*",))(networks["dense"](), task)
    assert only.facts["widths"]["first"] == [24, 24]
    assert only.facts["widths"]["middle.a"][1] < 8 or only.facts["widths"]["middle.b"][1] < 8


def test_a_glob_that_matches_nothing_is_an_error(tiny_net, task_for):
    with pytest.raises(RecipeError, match=r"prune.exclude: 'stam' matches no layer; .*stem"):
        Prune(macs=0.5, exclude=("stam",))(tiny_net, task_for(3, 16, 16))


def test_a_budget_out_of_reach_tells_the_smallest_that_is_not(tiny_net, task_for):
    task = task_for(3, 16, 16)
    with pytest.raises(RecipeError, match="smallest reachable fraction is 0") as caught:
        Prune(macs=0.01, min_keep=0.5)(tiny_net, task)
    smallest = float(str(caught.value).split("fraction is ")[1].split()[0])
    facts = Prune(macs=smallest + 0.001, min_keep=0.5)(tiny_net, task).facts
    assert facts["macs"][1] / facts["macs"][0] == pytest.approx(smallest, abs=2e-3)


def test_norms_over_channels_are_pruned_only_where_nothing_else_suffices(networks, task_for):
    task = task_for(8, 8, 8)
    model = networks["attention"]()
    gentle = Prune(macs=0.8, round_to=1)(model, task).facts["widths"]
    assert gentle["first"] == [24, 24]
    hard = Prune(macs=0.2, round_to=1)(model, task).facts["widths"]
    assert hard["first"][1] < 24


def test_a_model_that_cannot_be_captured_says_so(task_for):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CannotCapture):
        Prune(macs=0.5)(Branch(), task_for(3, 4, 4))


def test_progress_is_shown(tiny_net, task_for):
    shown = []
    Prune(macs=0.5)(tiny_net, task_for(3, 16, 16), Context(show=shown.append))
    assert list(dict.fromkeys(step.label for step in shown)) == [
        "prune: capture",
        "prune: choose",
        "prune: look at activations",
        "prune: differentiate",
        "prune: verify",
        "prune: deliver",
        "prune: compensate",
    ]


@pytest.mark.data
def test_a_trained_network_at_half_of_its_macs(data_folder, task_for, masked_outputs):
    resnet20, images, labels = _trained_resnet20(data_folder)
    result = Prune(macs=0.5, compensate=False)(resnet20, task_for(3, 32, 32))
    facts = result.facts
    assert facts["delivery"] == "in_place", facts["reason"]
    assert 0.46 < facts["macs"][1] / facts["macs"][0] <= 0.5
    assert facts["relative_error"] <= 1e-5
    reference = masked_outputs(resnet20, result.structure, images[:64])
    assert torch.allclose(result.model.double()(images[:64].double()), reference)
    with torch.no_grad():
        accuracy = (result.model.float()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.1  # not trained again yet; chance is 0.1


def _trained_resnet20(folder):
    import importlib.util
    from pathlib import Path

    from safetensors.torch import load_file

    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "cifar_resnet", root / "recipes" / "models" / "cifar_resnet.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.resnet20()
    model.load_state_dict(load_file(folder / "weights" / "cifar10_resnet20.safetensors"))
    arrays = np.load(folder / "cifar10_test1000.npz")
    images = torch.from_numpy(arrays["X"]).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    return model.eval(), (images - mean) / std, torch.from_numpy(arrays["Y"]).long()
