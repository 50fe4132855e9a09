from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.errors import BadInput
from slimdown.quantize.observe import (
    MOST_COUNTED,
    NUM_BINS,
    RangeStatistics,
    add_values,
    bin_edges,
    count_values,
    observe,
)


def see(*parts: torch.Tensor) -> RangeStatistics:
    seen = None
    for part in parts:
        seen = add_values(seen, part)
    assert seen is not None
    return seen


def test_extremes_and_counts_are_exact_over_batches_of_any_range() -> None:
    parts = [scale * torch.randn(5, 700) for scale in (0.01, 3.0, 0.5, 40.0)]
    seen, values = see(*parts), torch.cat(parts)
    assert (seen.low, seen.high) == (float(values.min()), float(values.max()))
    assert int(seen.counts.sum()) == values.numel()


def test_every_value_counts_in_the_bin_where_it_belongs() -> None:
    values = torch.cat([torch.randn(10_000), torch.tensor([1000.0, -1e-6, 0.0, -0.0, 1e-20])])
    expected, _ = np.histogram(values.double().numpy(), bin_edges().numpy())
    # Of a negative value on an edge the two differ in the side.
    difference = see(values).counts.cumsum(0).numpy() - expected.cumsum()
    assert abs(difference).max() <= 2


def test_values_beyond_the_bins_count_in_the_last_ones() -> None:
    counts = count_values(torch.tensor([1e30, -1e30]))
    assert (int(counts[0]), int(counts[-1]), int(counts.sum())) == (1, 1, 2)


def test_every_fourth_image_is_held_out_and_extremes_are_averaged() -> None:
    images = torch.arange(1.0, 13.0).view(12, 1) * torch.tensor([-1.0, 0.5, 2.0])
    seen = None
    for batch in images.split(5):
        seen = add_values(seen, batch, num_images=len(batch))
    assert seen is not None
    assert seen.num_images == 12
    assert int(seen.held_out.sum()) == 3 * 3
    assert bool((seen.held_out <= seen.counts).all())
    assert (seen.mean_low, seen.mean_high) == pytest.approx((-6.5, 13.0))


def test_of_many_values_some_are_counted_and_all_are_in_the_extremes() -> None:
    values = torch.randn(2, 4, 128, 128)
    values[1, 3, 127, 126] = 50.0
    seen = add_values(None, values, num_images=2)
    assert seen.high == 50.0
    assert MOST_COUNTED // 2 < int(seen.counts.sum()) / 2 <= MOST_COUNTED


def test_takes_the_same_memory_for_one_batch_and_for_many() -> None:
    batches = [torch.randn(100) for _ in range(20)]
    assert see(*batches).counts.numel() == see(batches[0]).counts.numel() == NUM_BINS


def test_order_of_batches_does_not_matter() -> None:
    wide, narrow = 8 * torch.rand(100) - 4, torch.rand(100)
    ranges = [(seen.low, seen.high) for seen in (see(wide, narrow), see(narrow, wide))]
    assert ranges[0] == ranges[1]


def test_zeros_alone_are_seen() -> None:
    seen = see(torch.zeros(10))
    assert (seen.low, seen.high, int(seen.counts.sum())) == (0.0, 0.0, 10)


def test_observes_the_named_nodes_of_a_graph(tiny_net: nn.Module) -> None:
    x = torch.randn(6, 3, 16, 16)
    graph_module = capture(tiny_net, x[:1])
    counted: list[int] = []
    nodes = {"x": "x", "relu": "relu", "relu_1": "both", "relu_2": "both"}
    seen = observe(graph_module, nodes, x.split(2), after_batch=counted.append)
    with torch.no_grad():
        relu = torch.relu(tiny_net.bn(tiny_net.stem(x)))
    assert counted == [2, 4, 6]
    assert seen["x"].high == float(x.max())
    assert seen["relu"].high == pytest.approx(float(relu.max()))
    assert int(seen["relu"].counts.sum()) == relu.numel()
    alone = observe(graph_module, {name: name for name in nodes}, x.split(2))
    assert seen["both"].high == max(alone["relu_1"].high, alone["relu_2"].high)
    assert torch.equal(seen["both"].counts, alone["relu_1"].counts + alone["relu_2"].counts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_layer_that_is_not_finite(tiny_net: nn.Module, bad: float) -> None:
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tiny_net.conv1.weight[0, 0, 0, 0] = bad
    graph_module = capture(tiny_net, x[:1])
    with pytest.raises(BadInput, match=r"NaN or infinity in conv1 .*this layer$"):
        observe(graph_module, {"x": "x", "conv2d_2": "conv2d_2"}, [x], labels={"conv2d_2": "conv1"})
    x[0, 0, 0, 0] = bad
    with pytest.raises(BadInput, match="NaN or infinity in the images"):
        observe(graph_module, {"x": "x"}, [x])
