"""The table: what it asks a clock for, and what it says between and beyond what was timed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var
from slimdown.prune.budget.latency import (
    Table,
    grid_points,
    interpolate,
    latency_cost,
    timed_operators,
)


def operations(model, *shape):
    analysis = analyze(capture(model, torch.zeros(1, *shape)))
    return [
        str(each.at({c: c.size for c in each.coordinates()})) for each in timed_operators(analysis)
    ]


def test_operators_are_read_with_their_sizes_for_one_sample(networks):
    window = "stride=1,1 padding=1,1 dilation=1,1"
    assert operations(networks["grouped"](), 8, 8, 8)[:2] == [
        f"convolution 1x8x8x8 24x8x3x3 {window}",
        f"convolution 1x24x8x8 48x4x3x3 {window}",
    ]
    assert operations(networks["depthwise"](), 8, 8, 8)[1:] == [
        f"convolution 1x24x8x8 24x1x3x3 {window}",
        "linear 1x24 5x24",
    ]
    assert operations(networks["grouped transposed"](), 8, 8, 8)[1] == (
        "transposed_convolution 1x24x8x8 24x4x2x2 16 "
        "stride=2,2 padding=0,0 dilation=1,1 output_padding=0,0"
    )
    assert operations(networks["attention"](), 8, 8, 8)[1:4] == [
        "linear 1x64x24 72x24",
        "attention 1x3x64x8 1x3x64x8 1x3x64x8",
        "linear 1x64x24 24x24",
    ]
    by_hand = operations(networks["attention by matmul"](), 8, 8, 8)
    assert by_hand[2:4] == ["matmul 1x3x64x8 1x3x8x64", "matmul 1x3x64x64 1x3x64x8"]


def test_a_padding_by_name_is_read_as_numbers():
    same = nn.Conv2d(3, 8, (3, 5), padding="same", dilation=2)
    assert operations(same, 3, 8, 8)[0].endswith("stride=1,1 padding=2,4 dilation=2,2")


def test_points_are_multiples_and_end_at_the_width_itself():
    assert grid_points(256, 16, (1, 1 / 2, 1 / 8)) == (32, 128, 256)
    assert grid_points(100, 16, (1, 1 / 2, 1 / 8)) == (16, 64, 100)
    assert grid_points(24, 16, (1, 1 / 2, 1 / 8)) == (4, 12, 24)  # in finer steps, as widths go
    assert grid_points(3, 16, (1, 1 / 4)) == (1, 3)


def test_interpolation_is_exact_for_what_is_linear_in_each_width():
    def time(a, b):
        return 1 + 2 * a + 3 * b + 0.5 * a * b

    points = ((8, 32, 64), (4, 16))
    values = np.array([[time(a, b) for b in points[1]] for a in points[0]])
    for a, b in ((8, 4), (20, 10), (64, 16), (50, 5), (2, 20)):  # the last beyond the grid
        assert interpolate(points, values, [a, b]) == pytest.approx(time(a, b))
    several = interpolate(points, values, [np.array([8, 20, 64]), 10])
    assert several.tolist() == pytest.approx([time(a, 10) for a in (8, 20, 64)])


def test_a_table_is_never_negative():
    leaf = Var(16)
    table = Table((leaf,), ((8, 16),), np.array([0.1, 1.1]))
    assert table({leaf: 2}) == 0
    assert table({}) == pytest.approx(1.1)


def work(operation):
    """Milliseconds of a machine that does a million multiplications each."""
    return math.prod(operation.shapes[0]) * operation.shapes[1][0] / 1e6


def test_the_whole_is_what_was_measured_of_it(fake_clock, networks):
    analysis = analyze(capture(networks["dense"](), torch.zeros(1, 8, 8, 8)))
    clock = fake_clock(work)
    alone = sum(
        work(each.at({c: _full(c) for c in each.coordinates()}))
        for each in timed_operators(analysis)
    )
    for whole in (alone / 2, 3 * alone):
        cost = latency_cost(analysis, clock, whole_ms=whole, round_to=1)
        assert cost({}) == pytest.approx(whole)
    narrow = {leaf: 1 for leaf in analysis.channels if leaf.reason is None}
    assert 0 < cost(narrow) < cost({})


def test_equal_operators_are_asked_for_once(fake_clock):
    block = [layer for _ in range(6) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 32, 1), *block, nn.Flatten(), nn.Linear(32 * 64, 5))
    analysis = analyze(capture(net, torch.zeros(1, 3, 8, 8)))
    clock = fake_clock(work)
    latency_cost(analysis, clock, whole_ms=1.0, round_to=8)
    assert len(clock.asked) == len(set(clock.asked))
    alike = [each for each in clock.asked if "32x32x3x3" in str(each)]
    assert len(alike) == 1
    assert len(clock.asked) == 3 + 9 + 3  # one width at either end, two in the middle


def _full(size):
    from slimdown.prune.budget.cost import evaluate

    return evaluate(size, {})
