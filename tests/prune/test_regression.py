"""Ridge regression against numpy's least squares, with fewer samples than inputs and with more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdown.prune.compensation.regression import Ridge


def reference(x, r, penalty, *, intercept):
    """Least squares of stacked equations, in float64: the penalty as rows of their own."""
    x, r = x.double().numpy(), r.double().numpy()
    size = x.shape[1]
    if intercept:
        x = np.hstack([x, np.ones((len(x), 1))])
    rows = np.sqrt(penalty) * np.eye(x.shape[1])[:size]  # none for the intercept
    solution = np.linalg.lstsq(
        np.vstack([x, rows]), np.vstack([r, np.zeros((size, r.shape[1]))]), rcond=None
    )[0]
    return solution[:size], solution[size] if intercept else np.zeros(r.shape[1])


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("strength", [1e-6, 0.1, 1.0])
def test_a_solution_is_that_of_least_squares(intercept, strength):
    x, r = 3 + torch.randn(2, 50, 6), torch.randn(2, 50, 4)
    ridge = Ridge([x[:, :20], x[:, 20:]], intercept=intercept)
    found = ridge.solve([r[:, :20], r[:, 20:]], strength)
    for group in range(2):
        centered = x[group].double() - x[group].double().mean(0) * intercept
        penalty = strength * float(centered.square().sum(0).mean())
        weight, bias = reference(x[group], r[group], penalty, intercept=intercept)
        np.testing.assert_allclose(found.weight[group], weight, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.bias[group], bias, rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    size=st.integers(1, 40),
    outputs=st.integers(1, 4),
    strength=st.sampled_from([1e-4, 1e-2, 1.0]),
    intercept=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_few_samples_or_many_the_solution_is_the_same(
    groups, lengths, size, outputs, strength, intercept, seed
):
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    x = 3 + torch.randn(groups, count, size, generator=generator)
    r = 1 + torch.randn(groups, count, outputs, generator=generator)
    ridge = Ridge(x.split(lengths, 1), intercept=intercept)
    assert ridge.moments.shape == (groups, *[min(count, size)] * 2)
    for tried in (strength, 10 * strength, strength):  # only the last factor is kept
        found = ridge.solve(r.split(lengths, 1), tried)
    for group in range(groups):
        centered = x[group].double() - x[group].double().mean(0) * intercept
        penalty = strength * max(float(centered.square().sum(0).mean()), 1e-30)
        weight, bias = reference(x[group], r[group], penalty, intercept=intercept)
        np.testing.assert_allclose(found.weight[group], weight, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found.bias[group], bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [40, 1700])
def test_many_inputs_are_solved_in_float32_as_in_float64(count):
    x, r = torch.relu(torch.randn(1, count, 1500)), torch.randn(1, count, 3)
    found = Ridge(x.split(20, 1), intercept=True).solve(r.split(20, 1), 0.1)
    assert found.weight.dtype == torch.float32
    penalty = 0.1 * float((x[0] - x[0].mean(0)).double().square().sum(0).mean())
    weight, bias = reference(x[0], r[0], penalty, intercept=True)
    np.testing.assert_allclose(found.weight[0], weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.bias[0], bias, rtol=1e-3, atol=1e-4)


def test_an_infinite_penalty_leaves_the_mean():
    x, r = torch.randn(1, 30, 5), torch.randn(1, 30, 2)
    found = Ridge([x], intercept=True).solve([r], float("inf"))
    assert float(found.weight.abs().max()) == 0
    torch.testing.assert_close(found.bias[0], r[0].double().mean(0))


def test_without_an_intercept_nothing_constant_is_added():
    found = Ridge([torch.randn(1, 30, 5)], intercept=False).solve([torch.ones(1, 30, 2)], 0.1)
    assert float(found.bias.abs().max()) == 0


def test_inputs_that_say_the_same_are_solved_by_the_penalty():
    x = torch.randn(1, 40, 1).expand(1, 40, 3)
    found = Ridge([x], intercept=True).solve([x[..., :1]], 1e-6)
    torch.testing.assert_close(
        found.weight[0, :, 0], torch.full((3,), 1 / 3).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("count", [2, 40])
def test_constant_inputs_change_no_weight(count):
    x, r = torch.ones(1, count, 3), torch.randn(1, count, 2)
    found = Ridge([x], intercept=True).solve([r], 1e-3)
    assert float(found.weight.abs().max()) == 0
