"""Ridge regression against numpy's least squares, and fits against what makes them trivial."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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


def test_constant_inputs_change_no_weight():
    found = Ridge([torch.ones(1, 40, 3)], intercept=True).solve([torch.randn(1, 40, 2)], 1e-3)
    assert float(found.weight.abs().max()) == 0
