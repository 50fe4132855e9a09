"""Learned step sizes: training moves the scales of coarse quantizers as it moves the weights.

Esser 2020, arXiv:1902.08153. They stay the buffers that they are, under the same names, and zero
points stay as they are. The gradient is that of `slimdown.quantize.fake_quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.quantize import FakeQuantizePerChannel, FakeQuantizePerTensor
from slimdown.quantize.grids import round_biases_

LEAST = 0.1
"""Of its value at the start, what a scale is kept above: a step too far must not turn its sign."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scales that are trained, by name, each with the least value that it may have."""

    least: Mapping[str, Tensor] = field(default_factory=dict)

    def find(self, model: nn.Module) -> list[Tensor]:
        """The scales themselves."""
        return [model.get_buffer(name) for name in self.least]

    @torch.no_grad()
    def keep_positive_(self, model: nn.Module) -> None:
        """Raise the scales that a step has brought too low."""
        for scale, least in zip(self.find(model), self.least.values(), strict=True):
            scale.clamp_(min=least)


def free_scales_(model: nn.Module) -> Scales:
    """Let the scales of fake quantizers with fewer than 8 bits have a gradient.

    They are where training begins. On a ResNet-20 at W8A8 learned scales gained nothing (one seed).
    """
    quantizers = (FakeQuantizePerTensor, FakeQuantizePerChannel)
    least = {}
    for name, module in model.named_modules():
        if isinstance(module, quantizers) and module.quant_max - module.quant_min < 255:
            module.scale.requires_grad_()
            least[f"{name}.scale".removeprefix(".")] = LEAST * module.scale.detach()
    return Scales(least=least)


def settle_(model: nn.Module) -> None:
    """Make a trained model what is deployed: fixed scales, biases on their int32 grids."""
    for tensor in model.buffers():
        tensor.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, GraphModule):
            round_biases_(module)
