from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from slimdown.core import Context, Progress, Target, Task
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.quantize import (
    PROFILES,
    FakeQuantizePerChannel,
    FakeQuantizePerTensor,
    HalfPrecision,
    Quantize,
)
from slimdown.quantize.grids import round_biases_
from slimdown.quantize.placement import Placement, activation_quantizer, weight_quantizer
from slimdown.targets import find_target


def centered_snr_db(reference: Tensor, outputs: Tensor) -> float:
    """Signal to noise of outputs (N, K) around their mean, which untrained networks hide in."""
    signal, noise = reference - reference.mean(0), (reference - outputs).square().mean()
    return float(10 * torch.log10((signal - signal.mean(0)).square().mean() / noise))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("calibration", ["mse", "minmax"])
def test_int8_follows_float(
    tiny_net: nn.Module, toy_task: Any, profile: str, calibration: Any
) -> None:
    result = Quantize(profile=profile, calibration=calibration)(tiny_net, toy_task)
    x = torch.cat(list(toy_task.batches))
    with torch.no_grad():
        assert centered_snr_db(tiny_net(x), result.model(x)) > 25
        # The comparison can fail: zeroing one convolution of the quantized graph breaks it.
        result.model.get_submodule("conv2").weight.zero_()
        assert centered_snr_db(tiny_net(x), result.model(x)) < 25


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_rebuild_and_state_give_the_very_same_module(
    tiny_net: nn.Module, toy_task: Any, precision: Any
) -> None:
    stage = Quantize(precision=precision)
    result = stage(tiny_net, toy_task)
    structure = json.loads(json.dumps(result.structure))
    rebuilt = stage.rebuild(tiny_net, structure, toy_task.example_input)
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    x = torch.randn(5, 3, 16, 16)
    assert not rebuilt.training
    assert torch.equal(rebuilt(x), result.model(x))
    if precision == "int8":
        names = [[node.name for node in m.graph.nodes] for m in (rebuilt, result.model)]
        assert names[0] == names[1]


def test_is_deterministic_and_leaves_the_model_as_it_was(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    before = copy.deepcopy(tiny_net.state_dict())
    first, second = (Quantize()(tiny_net, toy_task).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], t) for name, t in tiny_net.state_dict().items())


def test_weights_are_on_127_symmetric_levels_a_channel(tiny_net: nn.Module, toy_task: Any) -> None:
    quantized = Quantize()(tiny_net, toy_task).model
    modules = [m for m in quantized.modules() if isinstance(m, FakeQuantizePerChannel)]
    assert len(modules) == 5
    weight, quantizer = quantized.get_submodule("conv1").weight, modules[2]  # after stem and down
    torch.testing.assert_close(quantizer.scale, weight.abs().amax((1, 2, 3)) / 127)
    assert not quantizer.zero_point.any()
    assert quantizer.scale.shape == (32,)


def test_biases_are_whole_steps_of_input_scale_times_weight_scale(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    result = Quantize()(tiny_net, toy_task)
    placement = Placement.from_json(result.structure)
    assert isinstance(result.model, GraphModule)
    for layer, producer in placement.weights.items():
        (node,) = (node for node in result.model.graph.nodes if node.name == layer)
        bias = result.model.get_parameter(str(node.args[2].target)).detach().double()
        steps = activation_quantizer(result.model, producer).scale.double()
        steps = steps * weight_quantizer(result.model, layer).scale.double()
        levels = bias / steps
        assert torch.allclose(levels, levels.round(), atol=1e-2)


def test_a_bias_that_outgrew_int32_gets_the_least_scale_it_fits_with(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    quantized = Quantize()(tiny_net, toy_task).model
    assert isinstance(quantized, GraphModule)
    before = copy.deepcopy(quantized.state_dict())
    with torch.no_grad():
        quantized.get_parameter("conv1.bias")[5] = 1e9
    round_biases_(quantized)
    changed = {
        name: torch.ne(tensor, before[name]).nonzero().flatten().tolist()
        for name, tensor in quantized.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"conv1.bias": [5], "weight_quantizers.conv2d_2.scale": [5]}
    scale = quantized.get_buffer("weight_quantizers.conv2d_2.scale")[5]
    step = quantized.get_buffer("activation_quantizers.relu.scale") * scale
    assert float(1e9 / step) == pytest.approx(2**30, rel=1e-5)


def test_activations_are_unsigned_with_one_grid_a_tensor(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    quantized = Quantize()(tiny_net, toy_task).model
    modules = [m for m in quantized.modules() if isinstance(m, FakeQuantizePerTensor)]
    assert modules
    for module in modules:
        assert (module.quant_min, module.quant_max, module.scale.shape) == (0, 255, ())
        assert 0 <= int(module.zero_point) <= 255


def test_training_the_result_moves_weights_and_not_grids(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    quantized = Quantize()(tiny_net, toy_task).model.train()
    before = copy.deepcopy(quantized.state_dict())
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.05)
    x, y = torch.cat(list(toy_task.batches)), torch.arange(24) % 4
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(quantized(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = quantized.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in quantized.named_parameters()}


def test_facts_tell_what_ran_where(tiny_net: nn.Module, toy_task: Any) -> None:
    facts = Quantize(exclude=("head",), num_images=20)(tiny_net, toy_task).facts
    assert json.loads(json.dumps(facts)) == facts
    assert facts["precision"] == "int8"
    assert facts["profile"] == "onnxruntime-x86"  # the documented default
    assert facts["calibration"] == "mse"
    assert facts["num_calibration_images"] == 20
    assert facts["quantized"] == ["stem", "down", "conv1", "conv2"]
    assert facts["kept_float"] == {"head": "excluded by the recipe"}
    assert {row["kind"] for row in facts["ranges"]} == {"weight", "activation"}
    (image,) = (row for row in facts["ranges"] if row["layer"] == "input")
    seen = torch.cat(list(toy_task.batches))[:20]
    assert (image["low"], image["high"]) == (float(seen.min()), float(seen.max()))
    assert image["clipped_low"] < 0 < image["clipped_high"]


def test_a_target_fills_in_its_profile_where_none_is_named() -> None:
    target = find_target("openvino")
    assert Quantize().for_target(target) == Quantize(profile="openvino")
    named = Quantize(profile="onnxruntime-x86")
    assert named.for_target(target) == named
    half = Quantize(precision="float16")
    assert half.for_target(target) == half


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "quantize.precision must be int8 or float16, got 'int4'"),
        ({"calibration": "best"}, "quantize.calibration must be mse or .* or auto, got 'best'"),
        ({"weight_bits": 16}, "quantize.weight_bits must be a whole number from 2 to 8, got 16"),
        ({"activation_bits": 1}, "quantize.activation_bits must be a whole number from 2 to 8"),
        ({"profile": "onnxruntime"}, "did you mean 'onnxruntime-x86'"),
        ({"num_images": 0}, "quantize.num_images must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_made(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize(**options)


def test_an_exclude_that_matches_nothing_gets_a_suggestion(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    with pytest.raises(RecipeError, match="matches no layer: 'heads'; did you mean 'head'"):
        Quantize(exclude=("heads",))(tiny_net, toy_task)


@pytest.mark.parametrize("first", ["int8", "float16"])
@pytest.mark.parametrize("second", ["int8", "float16"])
def test_quantizing_twice_is_refused_before_any_work(
    tiny_net: nn.Module, toy_task: Any, first: Any, second: Any
) -> None:
    quantized = Quantize(precision=first)(tiny_net, toy_task).model
    with pytest.raises(RecipeError, match=r"already: keep one quantize stage"):
        Quantize(precision=second)(quantized, toy_task)


def test_no_calibration_images_is_bad_input(
    tiny_net: nn.Module, toy_task: Any, make_task: Callable[..., Task]
) -> None:
    with pytest.raises(BadInput, match="no calibration images"):
        Quantize()(tiny_net, make_task([], toy_task.example_input))


def test_images_that_are_not_finite_are_bad_input(
    tiny_net: nn.Module, make_task: Callable[..., Task]
) -> None:
    images = torch.randn(4, 3, 16, 16)
    images[2, 1, 5, 5] = float("nan")
    with pytest.raises(BadInput, match="NaN or infinity in the images"):
        Quantize()(tiny_net, make_task([images]))


def test_a_model_without_layers_is_bad_input(toy_task: Any) -> None:
    with pytest.raises(BadInput, match="neither convolutions nor linear layers"):
        Quantize()(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), toy_task)


def test_shows_progress_and_stops_between_batches(tiny_net: nn.Module, toy_task: Any) -> None:
    shown: list[Progress] = []
    Quantize(num_images=20, effort="fast")(tiny_net, toy_task, Context(show=shown.append))
    seen = [(each.done, each.total) for each in shown if each.label == "calibrate"]
    assert seen == [(8, 20), (16, 20), (20, 20)]
    shown.clear()
    context = Context(show=shown.append, stop_requested=lambda: len(shown) == 2)
    with pytest.raises(Interrupted):
        Quantize()(tiny_net, toy_task, context)
    assert len(shown) == 2


def test_half_precision_is_the_same_for_every_target(tiny_net: nn.Module, toy_task: Any) -> None:
    result = Quantize(precision="float16")(tiny_net, toy_task)
    assert isinstance(result.model, HalfPrecision)
    assert result.structure == {"precision": "float16"}
    assert result.facts["profile"] is None


def test_is_a_frozen_record() -> None:
    assert [field.name for field in dataclasses.fields(Quantize)] == [
        "precision",
        "weight_bits",
        "activation_bits",
        "calibration",
        "profile",
        "num_images",
        "effort",
        "max_error",
        "exclude",
    ]
    assert Quantize().kind == "quantize"


@pytest.mark.data
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_trained_network_keeps_its_accuracy(
    resnet20: nn.Module, cifar_task: Any, cifar_test: tuple[Tensor, Tensor], name: str
) -> None:
    target: Target = find_target(name)
    images, classes = cifar_test
    quantized = Quantize().for_target(target)(resnet20, cifar_task).model
    with torch.no_grad():
        floats, ints = (
            torch.cat([model(batch) for batch in images.split(100)])
            for model in (resnet20, quantized)
        )
    right = [float((outputs.argmax(1) == classes).float().mean()) for outputs in (floats, ints)]
    assert right[0] == pytest.approx(0.915)
    assert abs(right[1] - right[0]) <= 0.005
    assert float((floats.argmax(1) == ints.argmax(1)).float().mean()) >= 0.985
    assert centered_snr_db(floats, ints) > 20
