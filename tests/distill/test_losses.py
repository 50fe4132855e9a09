"""The losses against NumPy in float64, and what must hold of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from slimdown.distill.losses import distillation_loss, mix_terms, standardize_logits

Array = npt.NDArray[np.float64]


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _reference(student: Array, teacher: Array, temperature: float, standardize: bool) -> float:
    if standardize:
        student, teacher = (
            (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in (student, teacher)
        )
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    return float(temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean())


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_equals_numpy(temperature: float, standardize: bool) -> None:
    student, teacher = 3 * torch.randn(7, 5), 3 * torch.randn(7, 5)
    loss = distillation_loss(student, teacher, temperature=temperature, standardize=standardize)
    expected = _reference(
        student.double().numpy(), teacher.double().numpy(), temperature, standardize
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_is_zero_for_equal_answers_only() -> None:
    logits = torch.randn(6, 4)
    shifted = logits + torch.randn(6, 1)  # softmax does not see a shift
    assert float(distillation_loss(shifted, logits, temperature=3)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(-logits, logits, temperature=3)) > 0.01


def test_gradient_approaches_that_of_half_the_squared_error() -> None:
    # Hinton 2015, section 2.1: T² · dKL/dz -> (z - v) / K for zero-mean logits and large T
    student = torch.randn(3, 5, dtype=torch.float64)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    loss = distillation_loss(student, teacher, temperature=1e4)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 5 / 3, rtol=1e-3, atol=1e-6)


def test_standardized_logits_have_mean_0_and_deviation_1() -> None:
    rows = standardize_logits(5 + 3 * torch.randn(9, 12))
    torch.testing.assert_close(rows.mean(1), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(1, correction=0), torch.ones(9), atol=1e-5, rtol=0)


def test_standardizing_ignores_the_teachers_scale() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    losses = [
        float(distillation_loss(student, scale * teacher, temperature=2, standardize=True))
        for scale in (1, 10)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_constant_row_has_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    loss = distillation_loss(student, torch.randn(2, 3), temperature=2, standardize=True)
    (gradient,) = torch.autograd.grad(loss, student)
    assert bool(gradient.isfinite().all())


def test_terms_are_mixed_by_alpha() -> None:
    hard, soft = torch.tensor(2.0), torch.tensor(8.0)
    assert float(mix_terms(hard, soft, alpha=0.25)) == 0.25 * 2 + 0.75 * 8
    assert mix_terms(hard, None, alpha=1.0) is hard
    assert mix_terms(None, soft, alpha=0.0) is soft
