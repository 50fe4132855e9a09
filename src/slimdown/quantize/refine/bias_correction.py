"""Sequential bias correction: each layer's mean output is made that of the float graph.

Layer after layer, on inputs from the layers before it as they are by then, so that no error is
corrected twice. Nagel 2019, arXiv:1906.04721, section 4.2 and appendix D, the empirical form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from slimdown.quantize.placement import Placement
from slimdown.quantize.refine.layers import find_layers
from slimdown.quantize.refine.streams import Streams, is_conv


@torch.no_grad()
def correct_biases_(
    quantized: GraphModule,
    reference: GraphModule,
    placement: Placement,
    images: Sequence[Tensor],
    *,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Shift the biases of `quantized`; a layer without one is left as it is.

    Two forward passes, whatever the number of layers. The same images give the same biases.
    """
    layers = find_layers(quantized, reference, placement)
    streams = Streams(quantized, reference, images)
    for node in quantized.graph.nodes:
        streams.step_reference(node)
        streams.step_quantized(node)
        if node in layers and (bias := layers[node].bias) is not None:
            values = streams.quantized.values
            shift = certain_mean(torch.cat(streams.errors(node))).to(bias)
            bias.add_(shift)
            for each in values:  # what the layers behind read
                each[node] += (
                    shift.view(-1, *[1] * (each[node].ndim - 2)) if is_conv(node) else shift
                )
        after()


def certain_mean(samples: Tensor) -> Tensor:
    """The mean of `samples` (N, C), drawn to zero as far as chance may have made it, (C,).

    By 1 - variance of the mean / its square, and not below zero: the positive part of the estimator
    of James 1961. A handful of images tells little of a linear layer at the end of a network.
    """
    mean = samples.double().mean(0)
    if len(samples) < 2:
        return mean
    variance = samples.double().var(0) / len(samples)
    certain: Tensor = mean * (1 - variance / mean.square().clamp_min(1e-300)).clamp_min(0)
    return certain
