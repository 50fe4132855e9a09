"""The losses of distillation: pure functions of logits (N, K)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, standardize: bool = False
) -> Tensor:
    """T² · KL(teacher ‖ student) of softmax(logits / T), averaged over N. Logits are (N, K).

    T² keeps the size of the gradient while T changes. With `standardize`, logits are z-scored
    first, so that the student copies the ranking of the classes and not the teacher's scale.
    Hinton 2015, arXiv:1503.02531.
    """
    if standardize:
        student, teacher = standardize_logits(student), standardize_logits(teacher)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def standardize_logits(logits: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Z-score each row of (N, K): mean 0, deviation 1. Sun 2024, arXiv:2403.01427, algorithm 1."""
    centered = logits - logits.mean(dim=1, keepdim=True)
    # epsilon inside the root: a constant row has a finite gradient, too
    return centered * torch.rsqrt(centered.square().mean(dim=1, keepdim=True) + epsilon**2)


def mix_terms(hard: Tensor | None, soft: Tensor | None, *, alpha: float) -> Tensor:
    """α · hard + (1 − α) · soft; one of the two may be None, where its weight is 0."""
    if hard is None or soft is None:
        only = soft if hard is None else hard
        assert only is not None
        return only
    return alpha * hard + (1.0 - alpha) * soft
