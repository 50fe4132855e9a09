"""What SparseGPT's and Wanda's formulas promise, against references that are slow and plain."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slimdown.sparsify.pattern import Pattern, keep_largest
from slimdown.sparsify.reconstruct import reconstruct
from slimdown.sparsify.scores import magnitude, wanda


def correlated(num_inputs: int, num_samples: int = 400) -> Tensor:
    """(K, samples) float64 inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.double)
    return mixing @ torch.randn(num_inputs, num_samples, generator=generator, dtype=torch.double)


def activations(num_inputs: int, num_samples: int = 2000) -> Tensor:
    """(K, samples) float64: what a ReLU leaves of a few directions and some noise."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(num_inputs, num_inputs // 4, generator=generator, dtype=torch.double)
    causes = torch.randn(num_inputs // 4, num_samples, generator=generator, dtype=torch.double)
    noise = torch.randn(num_inputs, num_samples, generator=generator, dtype=torch.double)
    return (mixing @ causes + noise).relu()


def output_error(weight: Tensor, original: Tensor, x: Tensor) -> float:
    return float(((weight - original) @ x).norm() / (original @ x).norm())


@pytest.mark.parametrize("amount", [0.5, 0.8, Pattern(2, 4), Pattern(1, 4), Pattern(3, 5)])
@pytest.mark.parametrize("num_inputs", [60, 300])
def test_the_layers_output_is_closer_than_by_magnitude(
    amount: float | Pattern, num_inputs: int
) -> None:
    x, original = activations(num_inputs), torch.randn(1, 16, num_inputs, dtype=torch.double)
    mended = reconstruct(original, (x @ x.T)[None], amount)
    scores = magnitude(original)
    mask = amount.mask(scores) if isinstance(amount, Pattern) else keep_largest(scores, amount)
    assert int((mended == 0).sum()) == pytest.approx(int((~mask).sum()), abs=2)
    ours, theirs = (output_error(w[0], original[0], x) for w in (mended, original * mask))
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4)])
def test_a_pattern_holds_across_blocks(pattern: Pattern) -> None:
    x, original = correlated(512), torch.randn(1, 3, 512, dtype=torch.double)
    zeros = reconstruct(original, (x @ x.T)[None], pattern) == 0
    assert (zeros.unflatten(-1, (-1, pattern.group)).sum(-1) == pattern.group - pattern.kept).all()


def test_one_zero_is_the_optimal_brain_surgeons() -> None:
    """Hassibi 1993: the weight with the least w² / [H⁻¹] goes, the rest is the least squares'."""
    x = correlated(2, 5000)
    original = torch.randn(1, 40, 2, dtype=torch.double)
    moments = x @ x.T
    mended = reconstruct(original, moments[None], Pattern(1, 2))[0]
    for row, result in zip(original[0], mended, strict=True):
        if result[0] == 0:  # the column before: all of its error goes into the one after
            best = row[1] + row[0] * moments[0, 1] / moments[1, 1]
            assert float(result[1]) == pytest.approx(float(best), rel=0.03)  # damping
        else:
            assert float(result[0]) == float(row[0])


def test_groups_are_independent_and_unused_inputs_go_first() -> None:
    x = correlated(8)
    unused = x.clone()
    unused[2:6] = 0  # half of the weights that go
    original = torch.randn(2, 4, 8, dtype=torch.double)
    both = reconstruct(original, torch.stack([x @ x.T, unused @ unused.T]), 0.5)
    alone = reconstruct(original[:1], (x @ x.T)[None], 0.5)
    torch.testing.assert_close(both[:1], alone)
    zeros = both[1] == 0
    assert zeros[:, 2:6].double().mean() > 0.6
    assert int(zeros.sum()) == 16  # not one more than asked
    assert torch.isfinite(reconstruct(original, torch.zeros(2, 8, 8), 0.5)).all()


def test_wanda_equals_brute_force() -> None:
    weight, x = torch.randn(1, 5, 8), torch.randn(1, 8, 30)
    mask = keep_largest(wanda(weight, x.norm(dim=-1)), 0.5, dim=-1)
    for row in range(5):
        scores = [abs(float(weight[0, row, k])) * float(x[0, k].norm()) for k in range(8)]
        best = max(itertools.combinations(range(8), 4), key=lambda s: sum(scores[k] for k in s))
        assert mask[0, row].nonzero().flatten().tolist() == list(best)
