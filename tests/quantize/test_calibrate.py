from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimdown.quantize.calibrate import (
    CALIBRATIONS,
    fit_grid,
    minmax_range,
    mse_range,
    weight_scales,
)
from slimdown.quantize.observe import add_values

LEVELS = 256


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(2000, generator=generator)
    return {
        "normal": normal,
        "relu": normal.clamp(min=0),
        "heavy": normal**3,
        "outlier": torch.cat([normal, torch.tensor([60.0])]),
        "shifted": normal + 1.5,
        "negative": -normal.abs(),
    }


def squared_error(values: Tensor, low: float, high: float, num_levels: int) -> float:
    """On the values themselves, in float64."""
    scale = (high - low) / (num_levels - 1)
    zero_point = round(-low / scale)
    levels = ((values / scale).round() + zero_point).clamp(0, num_levels - 1)
    return float(((levels - zero_point) * scale - values).square().sum())


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("num_levels", [16, LEVELS])
def test_mse_is_as_good_as_brute_force_on_the_raw_values(name: str, num_levels: int) -> None:
    values = samples()[name].double()
    low, high = mse_range(add_values(None, values), num_levels)
    found = squared_error(values, low, high, num_levels)
    ratios = torch.linspace(0.05, 1.0, 14).tolist()
    lowest, highest = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    lows = [lowest * ratio for ratio in ratios] if lowest else [0.0]
    highs = [highest * ratio for ratio in ratios] if highest else [0.0]
    best = min(squared_error(values, a, b, num_levels) for a in lows for b in highs)
    assert found <= 1.05 * best


def test_mse_clips_an_outlier_where_levels_are_few() -> None:
    values = samples()["outlier"]
    _, high = mse_range(add_values(None, values), 16)
    assert high < 50
    assert minmax_range(add_values(None, values), 16) == (float(values.min()), 60.0)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_ranges_hold_zero_and_stay_within_what_was_seen(calibration: str) -> None:
    for values in samples().values():
        seen = add_values(None, values)
        low, high = CALIBRATIONS[calibration](seen, LEVELS)
        assert min(seen.low, 0.0) <= low <= 0.0 <= high <= max(seen.high, 0.0)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_constant_zero_gets_a_grid(calibration: str) -> None:
    low, high = CALIBRATIONS[calibration](add_values(None, torch.zeros(9)), LEVELS)
    assert fit_grid(low, high, 0, 255) == (1.0, 0)


def test_grid_spans_its_range_and_zero_is_a_level() -> None:
    scale, zero_point = fit_grid(-1.0, 3.0, 0, 255)
    assert zero_point == 64
    assert (0 - zero_point) * scale == pytest.approx(-1.0, abs=scale / 2)
    assert (255 - zero_point) * scale == pytest.approx(3.0, abs=scale / 2)
    assert fit_grid(0.0, 2.0, 0, 255).zero_point == 0  # so that runtimes drop a ReLU before it
    assert fit_grid(-2.0, 0.0, 0, 255).zero_point == 255


def test_weight_scales_are_absmax_of_each_channel() -> None:
    weight = torch.randn(5, 3, 3, 3)
    scales = weight_scales(weight, 127)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales, weight.abs().amax((1, 2, 3)) / 127)


def test_weight_scales_leave_room_for_the_bias_in_int32() -> None:
    weight = torch.tensor([[1.0], [1e-9], [0.0], [0.0]])
    bias = torch.tensor([0.5, 0.5, 0.5, 0.0])
    scales = weight_scales(weight, 127, bias=bias, input_scale=0.02)
    assert scales[0] == pytest.approx(1 / 127)
    assert torch.equal((bias / (0.02 * scales)).abs() < 2**31, torch.ones(4, dtype=torch.bool))
    assert scales[3] == 1.0
