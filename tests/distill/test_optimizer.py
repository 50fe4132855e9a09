"""The learning rate at known steps, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.distill.optimizer import (
    ACTIVATION_SCALE_SHARE,
    WEIGHT_SCALE_SHARE,
    learning_rate_at,
    make_optimizer,
    set_learning_rate_,
    trained_by,
)
from slimdown.distill.settings import TrainSettings
from slimdown.errors import BadInput


def _rate(step: int, warmup: float = 0.2) -> float:
    return learning_rate_at(step, num_steps=10, peak=0.4, warmup=warmup)


def test_rises_linearly_and_falls_as_a_cosine() -> None:
    assert [_rate(step) for step in (0, 1, 2)] == pytest.approx([0.2, 0.4, 0.4])
    assert _rate(6) == pytest.approx(0.2)  # halfway down
    assert 0 < _rate(9) < 0.02
    assert _rate(10) == pytest.approx(0.0, abs=1e-12)


def test_without_warmup_it_starts_at_the_peak() -> None:
    assert _rate(0, warmup=0) == 0.4
    assert _rate(5, warmup=0) == pytest.approx(0.2)


def test_it_never_rises_after_the_warmup() -> None:
    rates = [_rate(step) for step in range(2, 11)]
    assert rates == sorted(rates, reverse=True)


def test_warming_up_over_all_steps_but_the_last_is_fine() -> None:
    assert learning_rate_at(0, num_steps=1, peak=1, warmup=0.99) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay(tiny_net: nn.Module, optimizer: str) -> None:
    settings = TrainSettings(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    decaying, others = make_optimizer(tiny_net, settings).param_groups
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in tiny_net.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {
        "stem.weight",
        "conv1.weight",
        "conv2.weight",
        "down.weight",
        "head.weight",
    }
    assert len(others["params"]) + len(decaying["params"]) == len(names)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scales_have_a_rate_of_their_own_and_do_not_decay(
    tiny_net: nn.Module, optimizer: str
) -> None:
    settings = TrainSettings(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    # That of one channel in three says nothing: it holds zeros only.
    scales = [torch.tensor(0.5), torch.tensor([0.001, 0.001, 1.0])]
    made = make_optimizer(tiny_net, settings, scales=[s.requires_grad_() for s in scales])
    set_learning_rate_(made, 1e-4)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0, 0, 0]
    rates = [group["lr"] for group in made.param_groups]
    expected = [ACTIVATION_SCALE_SHARE * 0.5, WEIGHT_SCALE_SHARE * 0.001]
    shares = expected if optimizer == "adamw" else [1, 1]
    assert rates == pytest.approx([1e-4, 1e-4, *(1e-4 * share for share in shares)])
    assert {id(s) for s in scales} < {id(t) for t in trained_by(made)}


def test_frozen_parameters_are_left_out(tiny_net: nn.Module) -> None:
    tiny_net.get_parameter("stem.weight").requires_grad_(False)
    optimizer = make_optimizer(tiny_net, TrainSettings())
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    tiny_net.requires_grad_(False)
    with pytest.raises(BadInput, match=r"requires_grad_\(True\)"):
        make_optimizer(tiny_net, TrainSettings())


def test_half_precision_is_refused(tiny_net: nn.Module) -> None:
    with pytest.raises(BadInput, match="half precision"):
        make_optimizer(tiny_net.half(), TrainSettings())


def test_sgd_is_plain_without_momentum(tiny_net: nn.Module) -> None:
    optimizer = make_optimizer(tiny_net, TrainSettings(optimizer="sgd", momentum=0.0))
    assert isinstance(optimizer, torch.optim.SGD)
    assert not optimizer.defaults["nesterov"]
