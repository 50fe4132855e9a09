from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import capture
from slimdown.errors import RecipeError
from slimdown.quantize import PROFILES
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.placement import (
    Placement,
    activation_quantizer,
    insert_quantizers,
    label_of,
    observed_nodes,
    plan_placement,
    weight_quantizer,
)
from slimdown.quantize.profiles import find_profile

ORT, OPENVINO = PROFILES["onnxruntime-x86"], PROFILES["openvino"]


class Block(nn.Module):
    """A residual block whose shortcut is sliced and padded, as in the small ResNets for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.conv(x) + shortcut)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A transformer block on (N, L, C), with dropouts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Standardized(nn.Module):
    """A convolution whose weight is computed, beside one whose weight is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight - self.first.weight.mean()
        return self.second(F.silu(F.conv2d(x, weight, self.first.bias)))


def captured(model: nn.Module, channels: int = 3) -> torch.fx.GraphModule:
    return fold_batch_norms(capture(model.eval(), torch.randn(1, channels, 8, 8)))


def test_onnxruntime_reads_and_writes_int8_and_repeats_the_grid_behind_moves() -> None:
    placement = plan_placement(captured(Block()), ORT)
    assert placement.activations == {
        "x": ("x",),
        "relu": ("relu", "pad"),  # behind the ReLU of the stem, and again before the sum
        "conv2d_1": ("conv2d_1",),  # the sum reads it
        "relu_1": ("relu_1",),  # the sum's result, behind its ReLU
        "mean": ("mean",),
    }
    assert placement.weights == {"conv2d": "x", "conv2d_1": "relu", "linear": "mean"}
    assert placement.kept_float == {}


def test_openvino_reads_int8_and_lets_grids_travel() -> None:
    placement = plan_placement(captured(Block()), OPENVINO)
    assert placement.activations == {
        "x": ("x",),
        "relu": ("relu",),  # the shortcut; the convolution that adds it writes no INT8
        "mean": ("mean",),
    }


@pytest.mark.parametrize("profile", [ORT, OPENVINO], ids=lambda profile: profile.name)
def test_of_a_transformer_only_linear_layers_read_int8(profile: object) -> None:
    assert profile in (ORT, OPENVINO)
    graph_module = captured(Attention(), channels=8)
    placement = plan_placement(graph_module, ORT)
    assert list(placement.weights) == ["linear", "linear_1", "linear_2", "linear_3"]
    assert placement.activations == {
        "layer_norm": ("layer_norm",),
        "scaled_dot_product_attention": ("scaled_dot_product_attention",),
        "add": ("add",),
        "gelu": ("gelu",),  # the dropout behind it does nothing, so the grid is not repeated
    }
    (reason,) = placement.kept_float.values()
    assert reason == "matmul stays in float on onnxruntime-x86"


class Shuffled(nn.Module):
    """Two units that pass one half on and join it with what they make of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for conv in self.convs:
            passed, read = x.chunk(2, 1)
            x = F.channel_shuffle(torch.cat([passed, F.relu(conv(read))], 1), 2)
        return self.head(x).mean((2, 3))


def test_joined_parts_share_one_grid_of_all_their_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    graph = fold_batch_norms(capture(Shuffled().eval(), x[:1]))
    placement = plan_placement(graph, ORT)
    joins = [node.name for node in graph.graph.nodes if node.target is torch.ops.aten.cat.default]
    (behind,) = (names for names in placement.activations.values() if joins[0] in names)
    assert {*joins, "relu", "relu_1", "relu_2"} <= set(behind)
    key = next(key for key, names in placement.activations.items() if names == behind)
    assert observed_nodes(graph, placement) == {
        **{name: name for name in placement.activations if name != key},
        **dict.fromkeys(joins, key),
    }
    by_label = {label_of(node): node.name for node in graph.graph.nodes}
    layers = [by_label[name] for name in ("convs.0", "convs.1", "head")]
    assert {placement.weights[layer] for layer in layers} == {key}
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
    quantized = insert_quantizers(graph, placement)
    quantizers = [
        node for node in quantized.graph.nodes if node.target == f"activation_quantizers.{key}"
    ]
    assert {node.all_input_nodes[0].name for node in quantizers} == set(behind)
    # Parts that one float reader only would see are not worth a grid of their own.
    assert all(len(names) == 1 for names in plan_placement(graph, OPENVINO).activations.values())


def test_a_concatenation_with_a_float_part_stays_float() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(torch.cat([x, torch.sigmoid(x)], 1))

    graph = fold_batch_norms(capture(Mixed(), torch.randn(1, 3, 8, 8)))
    assert plan_placement(graph, ORT).activations == {
        "x": ("x",),
        "conv2d": ("conv2d",),
        "cat": ("cat",),
        "conv2d_1": ("conv2d_1",),
    }


def test_a_weight_that_is_computed_stays_in_float() -> None:
    placement = plan_placement(captured(Standardized()), ORT)
    assert list(placement.weights.values()) == ["silu"]
    assert list(placement.kept_float.values()) == ["its weight is computed while the network runs"]


def test_excluded_layers_stay_in_float_by_label_and_glob() -> None:
    graph_module = captured(Block())
    for pattern in ("stem", "s*"):
        placement = plan_placement(graph_module, ORT, (pattern,))
        assert placement.kept_float == {"conv2d": "excluded by the recipe"}
        assert list(placement.weights) == ["conv2d_1", "linear"]
        assert "x" not in placement.activations


def test_a_pad_with_another_value_is_not_a_move() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, (1, 1, 1, 1), value=3.3))

    placement = plan_placement(captured(Padded()), ORT)
    assert placement.weights == {"conv2d": "pad"}


def test_a_constant_sum_is_not_quantized() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(1, 4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.shift + 1.0

    placement = plan_placement(captured(Shifted()), ORT)
    assert set(placement.activations) == {"x", "conv2d"}


@pytest.mark.parametrize("model", [Block(), Attention()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("profile", [ORT, OPENVINO], ids=lambda profile: profile.name)
def test_inserted_quantizers_on_fine_grids_change_nothing(
    model: nn.Module, profile: object
) -> None:
    assert profile in (ORT, OPENVINO)
    channels = 8 if isinstance(model, Attention) else 3
    graph_module = captured(model, channels)
    plan = plan_placement(graph_module, ORT if profile is ORT else OPENVINO)
    quantized = insert_quantizers(graph_module, plan)
    modules = [m for m in quantized.modules() if hasattr(m, "zero_point")]
    assert len(modules) == len(plan.activations) + len(plan.weights)
    for module in modules:
        module.quant_min, module.quant_max = -(2**22), 2**22
        module.scale.fill_(2.0**-17)
    x = torch.randn(3, channels, 8, 8)
    torch.testing.assert_close(quantized(x), model(x), rtol=1e-3, atol=1e-3)
    assert graph_module.state_dict().keys() < quantized.state_dict().keys()


def test_a_plan_survives_json() -> None:
    plan = plan_placement(captured(Block()), ORT)
    assert Placement.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_labels_are_what_users_know() -> None:
    labels = {node.name: label_of(node) for node in captured(Block()).graph.nodes}
    assert (labels["x"], labels["conv2d"], labels["linear"]) == ("input", "stem", "head")
    assert labels["relu"] == "relu"


def test_a_profile_that_does_not_exist_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'openvino'"):
        find_profile("openvinos")


class Chain(nn.Module):
    """Four layers in a row; the last is a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.third, self.last = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))))
        return self.last(x.mean((2, 3)))


def test_without_bits_every_quantizer_has_the_levels_of_the_profile() -> None:
    plan = plan_placement(captured(Chain()), ORT)
    assert set(plan.weight_ranges.values()) == {ORT.weight_range}
    assert set(plan.activation_ranges.values()) == {ORT.activation_range}


def test_fewer_bits_spare_the_first_and_the_last_layer_and_their_inputs() -> None:
    plan = plan_placement(captured(Chain()), OPENVINO, weight_bits=4, activation_bits=3)
    assert plan.weight_ranges == {
        "conv2d": (-128, 127),
        "conv2d_1": (-8, 7),
        "conv2d_2": (-8, 7),
        "linear": (-128, 127),
    }
    assert plan.activation_ranges == {
        "x": (0, 255),
        "relu": (0, 7),
        "relu_1": (0, 7),
        "mean": (0, 255),
    }


def test_seven_bits_of_weight_spare_no_layer() -> None:
    plan = plan_placement(captured(Chain()), ORT, weight_bits=7)
    assert set(plan.weight_ranges.values()) == {(-64, 63)}


def test_bits_of_a_layer_have_the_last_word() -> None:
    bits_of = {"*": 6, "third": 2}
    plan = plan_placement(captured(Chain()), ORT, weight_bits=4, bits_of=bits_of)
    assert plan.weight_ranges["conv2d"] == (-32, 31)
    assert plan.weight_ranges["conv2d_2"] == (-2, 1)


def test_mixed_levels_survive_json_and_reach_the_quantizers() -> None:
    graph_module = captured(Chain())
    plan = plan_placement(graph_module, ORT, weight_bits=4, activation_bits=4)
    assert Placement.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    quantized = insert_quantizers(graph_module, plan)
    for layer, levels in plan.weight_ranges.items():
        quantizer = weight_quantizer(quantized, layer)
        assert (quantizer.quant_min, quantizer.quant_max) == levels
    for producer, levels in plan.activation_ranges.items():
        found = activation_quantizer(quantized, producer)
        assert (found.quant_min, found.quant_max) == levels


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_no_runtime_holds_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match="must be 2 to 8"):
        plan_placement(captured(Chain()), ORT, weight_bits=bits)
