"""Seeds and states of the global generators."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from slimdown.distill.randomness import (
    borrowed_randomness,
    derive_seed,
    random_state,
    seed_everything,
    set_random_state,
)

Draws = tuple[float, float, float, float]


def _draw() -> Draws:
    normal = float(np.random.normal())  # noqa: NPY002  the global generator is what is tested
    return float(torch.rand(())), normal, random.random(), random.gauss(0, 1)


def test_a_state_that_went_through_a_file_gives_the_same_draws() -> None:
    seed_everything(1)
    _draw()  # NumPy and Python now hold back the second number of a pair
    buffer = io.BytesIO()
    torch.save(random_state(), buffer)
    expected = [_draw() for _ in range(3)]
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True))
    assert [_draw() for _ in range(3)] == expected


def test_borrowing_gives_back() -> None:
    seed_everything(2)
    expected = _draw()
    seed_everything(2)
    with borrowed_randomness():
        seed_everything(99)
        _draw()
    assert _draw() == expected


def test_derived_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert all(0 <= seed < 2**32 for seed in seeds)
