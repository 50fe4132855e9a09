from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.measure import count_macs
from slimdown.quantize import PROFILES
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.mixing import FLOAT
from slimdown.quantize.placement import integer_nodes
from slimdown.quantize.steps import count_operations, levels_after, rank_steps, spare

ERRORS = {"a": {4: 0.5, 8: 0.1}, "b": {4: 0.2, 8: 0.19}, "c": {8: 0.3}}


def test_operations_are_the_macs_of_the_flop_counter_and_the_values_of_sums(
    tiny_net: nn.Module,
) -> None:
    x = torch.randn(1, 3, 16, 16)
    graph_module = fold_batch_norms(capture(tiny_net, x))
    nodes = integer_nodes(graph_module, PROFILES["onnxruntime-x86"])
    operations = count_operations(graph_module, nodes)
    assert operations.pop("add") == 16 * 8 * 8
    assert operations.keys() == {"stem", "down", "conv1", "conv2", "head"}
    assert sum(operations.values()) == count_macs(tiny_net, x)
    for name, count in operations.items():
        layer = tiny_net.get_submodule(name)
        side = {"stem": 16, "head": 1}.get(name, 8)
        assert count == layer.weight.numel() * side**2


def test_layers_of_a_sequence_and_groups_are_counted_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=4)
            self.linear = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).flatten(2).transpose(1, 2))

    x = torch.randn(1, 4, 6, 6)
    graph_module = capture(Net().eval(), x)
    nodes = integer_nodes(graph_module, PROFILES["openvino"])
    operations = count_operations(graph_module, nodes)
    assert operations == {"conv": 16 * 8 * 9, "linear": 16 * 8 * 5}
    assert sum(operations.values()) == count_macs(Net(), x)


def test_steps_fall_in_gain_for_cost_and_end_in_float() -> None:
    steps = rank_steps(ERRORS, dict.fromkeys("abc", 10))
    ratios = [step.gain / step.cost for step in steps]
    assert ratios == sorted(ratios, reverse=True)
    assert [(step.label, step.bits) for step in steps] == [
        ("a", 8),
        ("c", FLOAT),
        ("b", 8),
        ("b", FLOAT),
        ("a", FLOAT),
    ]
    total = sum(next(iter(by_bits.values())) ** 2 for by_bits in ERRORS.values())
    assert sum(step.gain for step in steps) == pytest.approx(total)
    added = 10 * (2 * (FLOAT**2 - 4**2) + FLOAT**2 - 8**2)
    assert sum(step.cost for step in steps) == pytest.approx(added)
    assert levels_after(steps) == dict.fromkeys("abc", FLOAT)


def test_a_layer_that_8_bits_do_not_help_goes_right_to_float() -> None:
    (step,) = rank_steps({"a": {4: 0.5, 8: 0.5}}, {"a": 10})
    assert (step.bits, step.gain, step.error) == (FLOAT, 0.25, 0.5)


def test_of_equal_gains_the_cheaper_one_comes_first() -> None:
    steps = rank_steps({"wide": {8: 0.3}, "narrow": {8: 0.3}}, {"wide": 1000, "narrow": 10})
    assert [step.label for step in steps] == ["narrow", "wide"]


def test_infinite_errors_come_first() -> None:
    errors = {"a": {8: 0.5}, "b": {4: float("inf"), 8: 0.1}, "c": {8: float("inf")}}
    steps = rank_steps(errors, dict.fromkeys("abc", 1))
    assert {step.label for step in steps[:2]} == {"b", "c"}


def test_a_step_to_8_bits_is_not_taken_back_from_under_one_to_float() -> None:
    steps = rank_steps({"a": {4: 0.2, 8: 0.1}, "b": {8: 1e-3}}, {"a": 1, "b": 10})
    assert [(step.label, step.bits) for step in steps] == [("a", 8), ("a", FLOAT), ("b", FLOAT)]
    assert spare(steps, 1.0) == [steps[1], steps[0]]
    assert spare(steps, 0.02) == [steps[1]]
    assert spare(steps, 0.005) == []
    assert spare(steps[:2], 1.0) == []
