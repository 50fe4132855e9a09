"""AdaRound: each weight goes to the neighbor on its grid that is best for the layer's output.

Layer by layer, on inputs from the quantized layers before. Nagel 2020, arXiv:2004.10568. The bias
that keeps the mean output is part of the solution: it is solved for, not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture.call import arguments_of
from slimdown.prune.compensation.readers import Reader, reader_of
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine.layers import Layer, find_layers
from slimdown.quantize.refine.rounding import Learning, Rounding, learn_
from slimdown.quantize.refine.streams import Streams

MAX_ROWS = 2**13
MAX_VALUES = 2**24
"""Of the rows that one layer reads: 64 MB."""
HELD_OUT = 8
"""Of so many rows one is held out: a layer is changed only where they say that it helps."""


def adaround_(
    quantized: GraphModule,
    reference: GraphModule,
    placement: Placement,
    images: Sequence[Tensor],
    *,
    learning: Learning = Learning(),
    seed: int = 0,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Round the weights of `quantized` anew, from the float ones; equal seeds, equal weights."""
    generator = torch.Generator().manual_seed(seed)
    layers = find_layers(quantized, reference, placement)
    streams = Streams(quantized, reference, images)
    for node in quantized.graph.nodes:
        with torch.no_grad():
            streams.step_reference(node)
        if node in layers:
            round_layer_(layers[node], streams, learning, generator, after=after)
        with torch.no_grad():
            streams.step_quantized(node)
        after()


def round_layer_(
    layer: Layer,
    streams: Streams,
    learning: Learning,
    generator: torch.Generator,
    *,
    after: Callable[[], None],
) -> None:
    """Round one layer's weight anew, between the steps of its twin and of itself."""
    reader = reader_of(layer.node, layer.original)
    rows = collect_rows(streams, layer.node, reader, generator)
    _round_(layer, reader, rows, learning, generator, after)
    rounded = layer.quantizer(layer.weight).detach()
    for values in streams.quantized.values:  # computed before the weight was changed
        values[layer.weight_node] = rounded


@torch.no_grad()
def collect_rows(
    streams: Streams, node: Node, reader: Reader, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What a layer reads at some positions, (G, M, D), and what it should give, (G, M, K)."""
    twin = streams.twin(node)
    assert twin is not None
    source = arguments_of(node)["input"]
    pairs = list(zip(streams.quantized.values, streams.reference.values, strict=True))
    xs, ys = [], []
    for ours, theirs in pairs:
        wanted = theirs[twin]
        axes = wanted.movedim(reader.axis, -1)
        order = torch.randperm(axes[..., 0].numel(), generator=generator).to(wanted.device)
        first = reader.patches(ours[source], order[:1])
        room = min(MAX_ROWS, MAX_VALUES // first.numel()) // len(pairs)
        positions = order[: max(1, room)]
        xs.append(reader.patches(ours[source], positions))
        ys.append(reader.by_group(reader.outputs(wanted, positions)))
    return torch.cat(xs, 1), torch.cat(ys, 1)


def _round_(
    layer: Layer,
    reader: Reader,
    rows: tuple[Tensor, Tensor],
    learning: Learning,
    generator: torch.Generator,
    after: Callable[[], None],
) -> None:
    """Learn the rounding of one layer, and take it where held-out rows say that it helps."""
    x, wanted = rows
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    held_out, fitted = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    if len(held_out) == 0:
        held_out = fitted
    x_mean, y_mean = x[:, fitted].mean(1, keepdim=True), wanted[:, fitted].mean(1, keepdim=True)
    bias = layer.bias
    if bias is None:  # then the mean is not free; a bias that others read stays what it is
        x_mean, y_mean = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
        if layer.fixed_bias is not None:
            y_mean = reader.by_group(layer.fixed_bias[None])
    x, y = x - x_mean, wanted - y_mean

    def error(weight: Tensor, rows: Tensor) -> Tensor:
        return (x[:, rows] @ reader.matrix(weight) - y[:, rows]).square().mean()

    nearest = layer.quantizer(layer.original)
    unit = float(error(nearest, fitted))
    if unit == 0:
        return

    def loss() -> Tensor:
        chosen = torch.randint(
            len(fitted), (min(learning.rows_a_step, len(fitted)),), generator=generator
        )
        return error(rounding.soft(), fitted[chosen.to(fitted.device)]) / unit

    rounding = Rounding(layer.original, layer.quantizer)
    with torch.enable_grad():
        learn_([rounding], loss, learning, after=after)
    weight = min((rounding.hard(), nearest), key=lambda each: float(error(each, held_out)))
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            bias.copy_(reader.ungrouped(y_mean - x_mean @ reader.matrix(weight))[0])
