from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.errors import BadInput
from slimdown.quantize.observe import NUM_BINS, RangeStatistics, add_values, observe


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
    assert seen.limit >= float(values.abs().max()) > seen.limit / 4


def test_widening_keeps_every_count_in_the_bin_where_it_belongs() -> None:
    values = torch.randn(10_000)
    seen = see(values, torch.tensor([1000.0]))
    edges = torch.linspace(-seen.limit, seen.limit, NUM_BINS + 1, dtype=torch.float64)
    expected = torch.histogram(torch.cat([values.double(), torch.tensor([1000.0])]), edges).hist
    # One value on an edge may fall to either side in float32.
    assert (seen.counts.cumsum(0) - expected.cumsum(0)).abs().max() <= 2


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
    seen = observe(
        graph_module, {"x": "input", "relu": "stem"}, x.split(2), after_batch=counted.append
    )
    with torch.no_grad():
        relu = torch.relu(tiny_net.bn(tiny_net.stem(x)))
    assert counted == [2, 4, 6]
    assert seen["x"].high == float(x.max())
    assert seen["relu"].high == pytest.approx(float(relu.max()))
    assert int(seen["relu"].counts.sum()) == relu.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_layer_that_is_not_finite(tiny_net: nn.Module, bad: float) -> None:
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tiny_net.conv1.weight[0, 0, 0, 0] = bad
    graph_module = capture(tiny_net, x[:1])
    with pytest.raises(BadInput, match=r"NaN or infinity in conv1 .*look at the images"):
        observe(graph_module, {"x": "input", "conv2d_2": "conv1"}, [x])
    x[0, 0, 0, 0] = bad
    with pytest.raises(BadInput, match="NaN or infinity in the images"):
        observe(graph_module, {"x": "input"}, [x])
