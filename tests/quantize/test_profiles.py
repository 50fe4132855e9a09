"""What each profile asks for, on networks that have all it decides about, and what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import capture
from slimdown.quantize import PROFILES, FakeQuantizePerChannel, FakeQuantizePerTensor, Quantize
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.placement import Placement, label_of, plan_placement
from slimdown.targets.onnx import Dialect, to_onnx

SYMMETRIC = [name for name, profile in PROFILES.items() if profile.symmetric]


class Residual(nn.Module):
    """Two sums: of two convolutions, and of a convolution and what went into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.down = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.deep, self.grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2)
        self.strided, self.wide = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 3, dilation=2)
        self.same, self.head = nn.Conv2d(8, 8, 3, padding="same"), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.first(x) + self.down(x))
        x = F.relu(x + self.same(x))
        x = F.relu(self.strided(self.grouped(F.silu(self.deep(x)))))
        return self.head(self.wide(x).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> torch.fx.GraphModule:
    return fold_batch_norms(capture(Residual().eval(), torch.randn(1, 3, 20, 20)))


def plan(graph: torch.fx.GraphModule, name: str) -> tuple[Placement, dict[str, str]]:
    return plan_placement(graph, PROFILES[name]), {n.name: label_of(n) for n in graph.graph.nodes}


def test_arm_differs_from_x86_by_the_sign_of_activations_alone(graph: torch.fx.GraphModule) -> None:
    arm, x86 = (plan(graph, f"onnxruntime-{cpu}")[0] for cpu in ("arm", "x86"))
    assert (arm.activations, arm.weights) == (x86.activations, x86.weights)
    assert set(arm.activation_ranges.values()) == {(-128, 127)}
    assert not arm.symmetric


def test_tensorrt_quantizes_what_a_sum_reads_beside_the_convolution_that_adds_it(
    graph: torch.fx.GraphModule,
) -> None:
    placement, labels = plan(graph, "tensorrt")
    fused = [name for name, label in labels.items() if label in ("first", "same")]
    residual = next(name for name, label in labels.items() if label == "down")
    assert residual in placement.activations
    assert not placement.activations.keys() & set(fused)
    first_sum = next(n for n in graph.graph.nodes if n.name == "relu_1")
    assert first_sum.name in placement.activations  # the other operand of the second sum
    assert all(len(behind) == 1 for behind in placement.activations.values())


def test_ncnn_and_generic_quantize_nothing_but_what_layers_read(
    graph: torch.fx.GraphModule,
) -> None:
    for name in ("ncnn", "generic"):
        placement, labels = plan(graph, name)
        assert set(placement.activations) == set(placement.weights.values())
        assert "down" not in {labels[producer] for producer in placement.activations}


def test_ncnn_has_few_levels_where_winograd_multiplies_and_no_scale_a_channel_of_a_group(
    graph: torch.fx.GraphModule,
) -> None:
    placement, labels = plan(graph, "ncnn")
    ranges = {labels[layer]: levels for layer, levels in placement.weight_ranges.items()}
    few = {"stem", "first", "same"}  # 3x3, stride 1, no dilation, no groups
    assert {label for label, levels in ranges.items() if levels == (-31, 31)} == few
    assert {levels for label, levels in ranges.items() if label not in few} == {(-127, 127)}
    kept = {labels[layer]: why for layer, why in placement.kept_float.items()}
    assert kept == {"grouped": "grouped convolutions stay in float on ncnn"}


def test_coreml_has_a_quantizer_before_and_behind(graph: torch.fx.GraphModule) -> None:
    placement, labels = plan(graph, "coreml")
    held = {labels[name] for behind in placement.activations.values() for name in behind}
    assert {"first", "down", "same", "deep", "grouped", "wide", "relu_1", "relu_2"} <= held


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_profiles_have_no_zero_points(
    tiny_net: nn.Module, toy_task: Any, name: str, bits: int
) -> None:
    stage = Quantize(profile=name, weight_bits=bits, activation_bits=bits, effort="fast")
    result = stage(tiny_net, toy_task)
    quantizers = [
        each
        for each in result.model.modules()
        if isinstance(each, FakeQuantizePerTensor | FakeQuantizePerChannel)
    ]
    assert len(quantizers) > 5
    assert not any(bool(each.zero_point.any()) for each in quantizers)
    assert all(each.quant_min < 0 < each.quant_max for each in quantizers)
    assert Placement.from_json(result.structure).symmetric


@pytest.mark.parametrize("name", SYMMETRIC)
def test_all_that_was_seen_fits_a_symmetric_grid(
    tiny_net: nn.Module, toy_task: Any, name: str
) -> None:
    result = Quantize(profile=name, calibration="minmax", effort="fast")(tiny_net, toy_task)
    for row in result.facts["ranges"]:
        if row["kind"] == "activation":
            largest = max(-row["low"], row["high"])
            assert row["clipped_high"] == pytest.approx(largest, rel=1e-6)
            assert row["clipped_low"] <= -largest * (1 - 1e-6)


class Plain(nn.Module):
    """Two linear layers on pixels: few enough operators to be computed anew in numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(27, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x.flatten(1))))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_computes_what_its_grids_say(name: str, make_task: Any) -> None:
    """Against numpy in float64, which rounds each operand to (level - zero point) * scale."""
    x = torch.randn(40, 3, 3, 3)
    net = Plain().eval()
    result = Quantize(profile=name, effort="fast")(net, make_task(x.split(10)))
    state = {key: value.double().numpy() for key, value in result.model.state_dict().items()}
    levels = PROFILES[name]

    def rounded(values: Any, path: str, low: int, high: int) -> Any:
        scale, zero = state[f"{path}.scale"], state[f"{path}.zero_point"]
        scale, zero = (each[:, None] if each.ndim else each for each in (scale, zero))
        return (np.clip(np.rint(values / scale) + zero, low, high) - zero) * scale

    values = x.flatten(1).double().numpy()
    for layer, node in ("first", "linear"), ("last", "linear_1"):
        producer = result.structure["weights"][node]
        path = f"activation_quantizers.{producer}"
        read = rounded(values, path, *levels.activation_range)
        weights = rounded(
            state[f"{layer}.weight"], f"weight_quantizers.{node}", *levels.weight_range
        )
        values = read @ weights.T + state[f"{layer}.bias"]
        values = np.maximum(values, 0) if layer == "first" else values
    np.testing.assert_allclose(result.model(x).detach().numpy(), values, rtol=1e-4, atol=1e-5)
    error = float(np.abs(values - net(x).detach().numpy()).max())
    assert 0 < error < 0.1 * float(np.abs(values).max())


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("biases", [True, False])
def test_every_profile_is_written_as_it_is(
    tiny_net: nn.Module, toy_task: Any, name: str, biases: bool
) -> None:
    """Standard ONNX, by its reference implementation; INT8 levels that fill a byte stand alone."""
    quantized = Quantize(profile=name, effort="fast")(tiny_net, toy_task).model
    dialect = Dialect(int32_biases=biases, weight_zero_points=False, fences=False, least_channels=1)
    x = toy_task.batches[0]
    proto = to_onnx(quantized, x[:1], dialect)
    (outputs,) = ReferenceEvaluator(proto).run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(outputs), quantized(x), rtol=1e-3, atol=1e-3)
    fills = PROFILES[name].activation_range in ((0, 255), (-128, 127))
    assert fills == ("Clip" not in {node.op_type for node in proto.graph.node})
