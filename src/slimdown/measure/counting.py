"""What a network holds and what one input costs it: parameters and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimdown.core import batch_device

FLOPS_PER_MAC = 2


def count_parameters(model: nn.Module) -> int:
    """Count the values of all parameters, tied ones once.

    Buffers do not count: they are statistics of batch norm, scales of quantization and the like.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Count the multiply-accumulates of convolutions, matrix products and attention.

    `example_input` (1, C, H, W) is run once, in eval mode and without gradients; `model` is left
    as it was. Element-wise work, norms and pooling count nothing, as is the custom of the field.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings triton along

    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with _eval_mode(model), _plain_attention(), torch.no_grad(), counter:
        model(example_input.to(batch_device(model)))
    return counter.get_total_flops() // FLOPS_PER_MAC


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    *outer, queries, width = query  # (..., S_q, D) x (..., S_k, D) x (..., S_k, D_v)
    keys, value_width = value[-2:]
    return FLOPS_PER_MAC * math.prod(outer) * queries * keys * (width + value_width)


# torch counts the attention kernels of GPUs; this is what a CPU runs instead.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode for a while; each gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention off its fused kernel, inside which no counter can look."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
