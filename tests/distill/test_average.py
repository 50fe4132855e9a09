"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.distill.average import (
    clone_tensors,
    copy_tensors_,
    decay_at,
    tensors_of,
    update_average_,
)


def test_equals_the_closed_form() -> None:
    # after n updates with values v_1 … v_n: d^n · v_0 + (1 − d) · Σ d^(n−i) · v_i
    decay, values = 0.9, [1.0, 4.0, -2.0, 0.5]
    average = {"w": torch.tensor([3.0], dtype=torch.float64)}
    for value in values:
        update_average_(average, {"w": torch.tensor([value], dtype=torch.float64)}, decay=decay)
    n = len(values)
    expected = decay**n * 3.0 + (1 - decay) * sum(
        decay ** (n - i) * value for i, value in enumerate(values, start=1)
    )
    assert float(average["w"]) == pytest.approx(expected, rel=1e-12)


def test_counters_are_taken_as_they_are() -> None:
    average = {"n": torch.tensor(1)}
    update_average_(average, {"n": torch.tensor(7)}, decay=0.9)
    assert int(average["n"]) == 7


def test_memory_is_short_at_first() -> None:
    assert decay_at(0, 0.999) == pytest.approx(0.1)
    assert decay_at(90, 0.999) == pytest.approx(0.91)
    assert decay_at(10**6, 0.999) == 0.999


def test_buffers_outside_of_the_state_dict_count(tiny_net: nn.Module) -> None:
    tiny_net.register_buffer("hidden", torch.zeros(2), persistent=False)
    tensors = tensors_of(tiny_net)
    assert set(tensors) == {*tiny_net.state_dict(), "hidden"}
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_copies_stay_when_the_model_moves_on(tiny_net: nn.Module) -> None:
    kept = clone_tensors(tensors_of(tiny_net))
    for tensor in tensors_of(tiny_net).values():
        tensor.add_(1)
    copy_tensors_(tiny_net, kept)
    for name, tensor in tensors_of(tiny_net).items():
        assert torch.equal(tensor, kept[name])
