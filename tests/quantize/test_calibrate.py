from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimdown.quantize.calibrate import (
    CALIBRATIONS,
    Calibration,
    best_calibration,
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
def test_ranges_hold_zero_and_stay_within_what_was_seen(calibration: Calibration) -> None:
    for values in samples().values():
        seen = add_values(None, values)
        low, high = CALIBRATIONS[calibration](seen, LEVELS)
        assert min(seen.low, 0.0) <= low <= 0.0 <= high <= max(seen.high, 0.0)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_symmetric_ranges_reach_as_far_below_zero_and_stay_within_the_largest(
    calibration: Calibration,
) -> None:
    for values in samples().values():
        low, high = CALIBRATIONS[calibration](add_values(None, values), LEVELS - 1, symmetric=True)
        assert 0 < high <= float(values.abs().max()) * (1 + 1e-9)
        assert low == -high


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("num_levels", [15, LEVELS - 1])
def test_symmetric_mse_is_as_good_as_brute_force_on_the_magnitudes(
    name: str, num_levels: int
) -> None:
    values = samples()[name].double()
    _, high = mse_range(add_values(None, values), num_levels, symmetric=True)
    largest, top = float(values.abs().max()), num_levels // 2

    def error(bound: float) -> float:
        levels = (values.abs() * top / bound).round().clamp(max=top)
        return float((levels * bound / top - values.abs()).square().sum())

    best = min(error(largest * ratio) for ratio in np.linspace(0.02, 1.0, 400))
    assert error(high) <= 1.05 * best


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_constant_zero_gets_a_grid(calibration: Calibration) -> None:
    low, high = CALIBRATIONS[calibration](add_values(None, torch.zeros(9)), LEVELS)
    # As if it reached to 1, so that a bias is kept in steps of a 255th of the weight's.
    assert fit_grid(low, high, 0, 255) == (pytest.approx(1 / 255), 0)
    assert fit_grid(low, high, -128, 127) == (pytest.approx(1 / 255), -128)
    assert fit_grid(low, high, -128, 127, symmetric=True) == (pytest.approx(1 / 127), 0)


def test_grid_spans_its_range_and_zero_is_a_level() -> None:
    scale, zero_point = fit_grid(-1.0, 3.0, 0, 255)
    assert zero_point == 64
    assert (0 - zero_point) * scale == pytest.approx(-1.0, abs=scale / 2)
    assert (255 - zero_point) * scale == pytest.approx(3.0, abs=scale / 2)
    assert fit_grid(0.0, 2.0, 0, 255).zero_point == 0  # so that runtimes drop a ReLU before it
    assert fit_grid(-2.0, 0.0, 0, 255).zero_point == 255


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-3.0, 1.0), (0.0, 3.0)])
def test_the_step_of_a_symmetric_grid_is_that_of_the_largest_magnitude(
    low: float, high: float
) -> None:
    scale, zero_point = fit_grid(low, high, -128, 127, symmetric=True)
    assert (scale, zero_point) == (pytest.approx(3.0 / 127), 0)


def test_a_signed_grid_is_an_unsigned_one_moved_by_128() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 2.0), (-2.0, 0.0)):
        unsigned, signed = fit_grid(low, high, 0, 255), fit_grid(low, high, -128, 127)
        assert signed == (unsigned.scale, unsigned.zero_point - 128)


def test_weight_scales_are_absmax_of_each_channel() -> None:
    weight = torch.randn(5, 3, 3, 3)
    scales = weight_scales(weight, -127, 127)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales, weight.abs().amax((1, 2, 3)) / 127)


def test_weight_scales_leave_room_for_the_bias_in_int32() -> None:
    weight = torch.tensor([[1.0], [1e-9], [0.0], [0.0]])
    bias = torch.tensor([0.5, 0.5, 0.5, 0.0])
    scales = weight_scales(weight, -127, 127, bias=bias, input_scale=0.02)
    assert scales[0] == pytest.approx(1 / 127)
    assert torch.equal((bias / (0.02 * scales)).abs() < 2**31, torch.ones(4, dtype=torch.bool))
    assert scales[3] == 1.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_least_squares_scales_are_as_good_as_brute_force(bits: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 40, generator=generator) ** 3
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = weight_scales(weight, low, high, scaling="mse").double()
    largest = weight_scales(weight, low, high, scaling="absmax").double()

    def errors(steps: Tensor) -> Tensor:
        levels = (weight.double() / steps[:, None]).round().clamp(low, high)
        return (levels * steps[:, None] - weight.double()).square().sum(1)

    best = torch.stack([errors(largest * ratio) for ratio in np.linspace(0.05, 1.0, 400)]).amin(0)
    assert bool((errors(scales) <= 1.05 * best).all())


def test_few_levels_are_scaled_by_least_squares_by_themselves() -> None:
    weight = torch.randn(4, 50) ** 3
    for levels, scaling in ((-8, 7), "mse"), ((-128, 127), "absmax"):
        expected = weight_scales(weight, *levels, scaling=scaling)  # type: ignore[arg-type]
        assert torch.equal(weight_scales(weight, *levels), expected)


def test_weights_that_are_no_numbers_have_no_scale() -> None:
    with pytest.raises(ValueError, match="weights must be finite"):
        weight_scales(torch.tensor([[1.0], [float("nan")]]), -128, 127)


@pytest.mark.parametrize(("name", "share"), [("percentile", 0.9999), ("percentile_99.9", 0.999)])
def test_percentiles_are_numpys(name: Any, share: float) -> None:
    values = torch.randn(16, 1000)
    seen = None
    for image in values:
        seen = add_values(seen, image)
    assert seen is not None
    low, high = CALIBRATIONS[name](seen, LEVELS)
    expected = np.quantile(values.double().numpy(), [1 - share, share])
    assert (low, high) == pytest.approx(tuple(expected), rel=0.05)


def test_a_moving_average_is_the_mean_of_each_images_extremes() -> None:
    images = torch.randn(8, 100)
    seen = add_values(None, images, num_images=8)
    expected = float(images.amin(1).mean()), float(images.amax(1).mean())
    assert CALIBRATIONS["moving_average"](seen, LEVELS) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["percentile", "percentile_99.9", "entropy"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_value_of_a_million_does_not_set_the_range(name: Any, symmetric: bool) -> None:
    values = torch.randn(40, 2500)
    values[7, 3] = 1e6
    seen = add_values(None, values, num_images=40)
    low, high = CALIBRATIONS[name](seen, LEVELS - symmetric, symmetric=symmetric)
    assert -10 < low < -2
    assert 2 < high < 10


def test_the_automatic_choice_is_the_best_on_held_out_images() -> None:
    images = torch.randn(16, 500) ** 3
    seen = add_values(None, images, num_images=16)
    chosen = best_calibration(seen, 16)
    held_out = images[12:].double()  # the last of the batch
    errors = {
        name: squared_error(held_out, *CALIBRATIONS[name](seen, 16), 16)
        for name in CALIBRATIONS
        if name != "auto"
    }
    assert errors[chosen] <= 1.1 * min(errors.values())
    assert CALIBRATIONS["auto"](seen, 16) == CALIBRATIONS[chosen](seen, 16)
