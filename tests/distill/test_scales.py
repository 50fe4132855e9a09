"""Learned step sizes: they move, stay positive, and what they lead to is what is deployed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.core import Context
from slimdown.distill import Distill, TrainSettings, train
from slimdown.distill.average import tensors_of
from slimdown.distill.scales import LEAST
from slimdown.errors import Interrupted
from slimdown.quantize import FakeQuantizePerTensor, Quantize
from slimdown.quantize.placement import Placement, activation_quantizer, weight_quantizer
from slimdown.targets import find_target

SETTINGS = TrainSettings(epochs=2, learning_rate=1e-3, augment="none")


@pytest.fixture
def tiny_net(tiny_net: nn.Module, toy_task: Any) -> nn.Module:
    """With answers that differ from image to image, as those of a trained network do."""
    with torch.no_grad():
        toy_task.images.mul_(torch.linspace(0.2, 3, len(toy_task.images)).view(-1, 1, 1, 1))
        answers = tiny_net(toy_task.images)
        tiny_net.head.weight.mul_(4 / answers.std(0).mean())
    return tiny_net


@pytest.fixture
def quantized(tiny_net: nn.Module, toy_task: Any) -> GraphModule:
    """W4A4 but for the first and the last layer."""
    stage = Quantize(weight_bits=4, activation_bits=4, effort="fast")
    model = stage(tiny_net, toy_task).model
    assert isinstance(model, GraphModule)
    return model


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_buffers() if name.endswith(".scale")}


def test_scales_of_few_bits_move_and_nothing_else_of_the_grids(
    quantized: GraphModule, tiny_net: nn.Module, toy_task: Any
) -> None:
    before = copy.deepcopy(quantized.state_dict())
    trained = train(quantized, toy_task, SETTINGS, teacher=tiny_net).model
    after = trained.state_dict()
    assert list(after) == list(before)
    kept = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    grids = {name for name, _ in quantized.named_buffers()}
    assert grids - kept == set(coarse_scales_of(quantized))
    assert kept < grids  # weights and biases have moved
    assert len(grids - kept) >= 5
    assert not any(tensor.requires_grad for tensor in trained.buffers())
    assert all(torch.equal(before[name], t) for name, t in quantized.state_dict().items())
    assert not any(tensor.requires_grad for tensor in quantized.buffers())


def test_scales_stay_where_they_are_not_to_be_learned(
    quantized: GraphModule, tiny_net: nn.Module, toy_task: Any
) -> None:
    fixed = replace(SETTINGS, learn_scales=False)
    trained = train(quantized, toy_task, fixed, teacher=tiny_net).model
    before = scales_of(quantized)
    assert all(torch.equal(scale, before[name]) for name, scale in scales_of(trained).items())


def coarse_scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.scale": module.get_buffer("scale")
        for name, module in model.named_modules()
        if getattr(module, "quant_max", 255) - getattr(module, "quant_min", 0) < 255
    }


def test_eight_bits_keep_their_scales(tiny_net: nn.Module, toy_task: Any) -> None:
    quantized = Quantize(effort="fast")(tiny_net, toy_task).model
    trained = train(quantized, toy_task, SETTINGS, teacher=tiny_net).model
    after = scales_of(trained)
    assert all(torch.equal(scale, after[name]) for name, scale in scales_of(quantized).items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scales_stay_positive_at_any_rate(
    quantized: GraphModule, tiny_net: nn.Module, toy_task: Any, optimizer: Any
) -> None:
    wild = TrainSettings(epochs=3, learning_rate=0.5, optimizer=optimizer, ema=0.9)
    trained = train(quantized, toy_task, wild, teacher=tiny_net).model
    before = coarse_scales_of(quantized)
    after = coarse_scales_of(trained)
    ratios = torch.cat([(scale / before[name]).flatten() for name, scale in after.items()])
    assert bool(ratios.isfinite().all())
    assert float(ratios.min()) >= 0.999 * LEAST
    assert float(ratios.max()) > 2  # it was wild


def test_learned_scales_come_nearer_to_the_teacher(
    quantized: GraphModule, tiny_net: nn.Module, toy_task: Any
) -> None:
    losses = {}
    for learn in (True, False):
        settings = TrainSettings(epochs=8, augment="none", learn_scales=learn)
        losses[learn] = train(quantized, toy_task, settings, teacher=tiny_net).history[-1]["loss"]
    assert losses[True] < 0.95 * losses[False]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_gives_the_same_bits(
    quantized: GraphModule, tiny_net: nn.Module, toy_task: Any, recorder: Any, optimizer: Any
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, ema=0.9, learning_rate=0.02)
    whole = train(quantized, toy_task, settings, context=recorder().context(tiny_net)).model
    for stop_after in (1, 4, 6):
        stopped = recorder(stop_after=stop_after)
        with pytest.raises(Interrupted):
            train(quantized, toy_task, settings, context=stopped.context(tiny_net))
        context = recorder().context(tiny_net, resume=stopped.saved[-1])
        other = tensors_of(train(quantized, toy_task, settings, context=context).model)
        assert all(torch.equal(tensor, other[name]) for name, tensor in tensors_of(whole).items())


@pytest.mark.parametrize("learn", [True, False])
def test_biases_lie_on_the_int32_grid_of_the_final_scales(
    tiny_net: nn.Module, toy_task: Any, learn: bool
) -> None:
    result = Quantize(weight_bits=4, activation_bits=4)(tiny_net, toy_task)
    settings = replace(SETTINGS, learn_scales=learn, ema=0.9)
    trained = train(result.model, toy_task, settings, teacher=tiny_net).model
    assert isinstance(trained, GraphModule)
    for layer, producer in Placement.from_json(result.structure).weights.items():
        (node,) = (node for node in trained.graph.nodes if node.name == layer)
        bias = trained.get_parameter(str(node.args[2].target)).detach().double()
        step = activation_quantizer(trained, producer).scale.double()
        levels = bias / (step * weight_quantizer(trained, layer).scale.double())
        assert float(levels.abs().max()) > 100
        assert torch.allclose(levels, levels.round(), atol=1e-2)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_deployed_network_is_the_trained_one(
    tiny_net: nn.Module, toy_task: Any, tmp_path: Path, name: str
) -> None:
    target = find_target(name)
    stage = Quantize(weight_bits=4, activation_bits=4).for_target(target)
    quantized = stage(tiny_net, toy_task)
    tuned = Distill(epochs=2, learning_rate=1e-3)
    trained = tuned(quantized.model, toy_task, Context(original=tiny_net)).model
    rebuilt = tuned.rebuild(quantized.model, {}, toy_task.example_input)
    rebuilt.load_state_dict(trained.state_dict())  # as the pipeline does
    predict = target.load(target.export(rebuilt, toy_task, tmp_path))
    with torch.no_grad():
        expected = trained(toy_task.images)
        untrained = quantized.model(toy_task.images)
    error = (predict(toy_task.images) - expected).abs().max()
    # A value between two levels may go to either; all of training is far more than that.
    assert float(error) < 0.1 * float((untrained - expected).abs().max())
    assert float((predict(toy_task.images) - expected).abs().median()) < 1e-5


def test_a_float_student_has_no_scales(tiny_net: nn.Module, toy_task: Any) -> None:
    first, second = (
        train(tiny_net, toy_task, replace(SETTINGS, learn_scales=learn), teacher=tiny_net).model
        for learn in (True, False)
    )
    other = tensors_of(second)
    assert all(torch.equal(tensor, other[name]) for name, tensor in tensors_of(first).items())


def test_a_quantizer_in_any_module_is_trained(toy_task: Any) -> None:
    quantizer = FakeQuantizePerTensor(quant_min=0, quant_max=15)
    quantizer.scale.fill_(0.1)
    model = nn.Sequential(quantizer, nn.Flatten(), nn.Linear(768, 4))
    trained = train(model, toy_task, replace(SETTINGS, alpha=1.0)).model
    assert not torch.equal(trained[0].scale, quantizer.scale)
