from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from slimdown.errors import BadInput
from slimdown.quantize.judge import Judge


class Affine(nn.Module):
    """Two outputs: gain · x + shift, and a constant."""

    def __init__(self, gain: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.gain, self.shift = gain, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.gain * x + self.shift, torch.ones(len(x), 2), torch.arange(len(x))


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 4, 4, generator=generator) for count in (5, 2)]


def test_the_same_network_has_no_error() -> None:
    assert Judge(Affine(), images()).error(Affine()) == 0


def test_the_error_is_relative_to_how_outputs_vary() -> None:
    together = torch.cat(images()).double()
    variance = (together - together.mean(0)).square().sum()
    judge = Judge(Affine(gain=100.0, shift=7.0), images())
    expected = math.sqrt((1.0 * together).square().sum() / (100.0**2 * variance))
    assert judge.error(Affine(gain=101.0, shift=7.0)) == pytest.approx(expected, rel=1e-4)


def test_what_is_no_number_is_infinitely_wrong() -> None:
    assert Judge(Affine(), images()).error(Affine(shift=float("nan"))) == math.inf


def test_outputs_that_never_vary_tell_nothing() -> None:
    with pytest.raises(BadInput, match="gives the same for all calibration images"):
        Judge(Affine(gain=0.0), images()).error(Affine())
