"""Block reconstruction: the roundings of a whole block are learned together, block after block.

The quantized block, fed by the quantized blocks before it, is to give what the float block gives in
the float network (BRECQ: Li 2021, arXiv:2102.05426). While it learns, values are taken at random
from the float network's input instead, and activations at random are not rounded (QDrop: Wei 2022,
arXiv:2203.05740). Layers that lie in no block, as where a U-Net's shortcuts leave no single tensor
to cut at, are rounded one by one as AdaRound does it. Biases are learned with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from slimdown.capture.call import arguments_of
from slimdown.prune.compensation.readers import Reader, reader_of
from slimdown.prune.running import Run
from slimdown.quantize.fake_quantize import FakeQuantizePerTensor
from slimdown.quantize.fold import layer_tensors
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine.adaround import HELD_OUT, round_layer_
from slimdown.quantize.refine.blocks import Block, find_blocks
from slimdown.quantize.refine.layers import Layer, find_layers
from slimdown.quantize.refine.rounding import Learning, Rounding, learn_
from slimdown.quantize.refine.streams import Streams

FLOAT_SHARE = 0.5
"""Of the values of a block's input, and of each activation in it, while the block learns."""
IMAGES_A_STEP = 8
"""Each has many positions to learn from; more images make a step slower."""

Values = dict[Node, Any]
"""What nodes gave for one batch."""


def reconstruct_(
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
    blocks = find_blocks(reference.graph, {node.name for node in layers})
    by_start = {block.start: block for block in blocks}
    in_blocks = {name for block in blocks for name in block.layers}
    streams = Streams(quantized, reference, images, at_once=IMAGES_A_STEP)
    for node in quantized.graph.nodes:
        with torch.no_grad():
            streams.step_reference(node)
        if node in layers and node.name not in in_blocks:
            round_layer_(layers[node], streams, learning, generator, after=after)
        with torch.no_grad():
            streams.step_quantized(node)
        if node.name in by_start:
            stretch = Stretch.between(by_start[node.name], quantized, streams, layers)
            _reconstruct_(stretch, learning, generator, after)
        after()


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One batch in front of a block: what both networks have computed, and what is wanted."""

    ours: Values
    theirs: Tensor
    """The float network's input of the block."""
    wanted: Tensor
    """The float block's output."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A block of the quantized graph with all that it learns from."""

    module: GraphModule
    start: Node
    nodes: list[Node]
    layers: list[Layer]
    samples: list[Sample]

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        block: Block,
        quantized: GraphModule,
        streams: Streams,
        layers: Mapping[Node, Layer],
    ) -> Stretch:
        """The block whose start both streams have just computed."""
        start, *nodes = _slice(streams.quantized.graph, block)
        twin, *twins = _slice(streams.reference.graph, block)
        run = streams.reference
        samples = [
            Sample(
                ours=mine,
                theirs=other[twin],
                wanted=_replay(run, twins, {**other, twin: other[twin].clone()}),
            )
            for mine, other in zip(streams.quantized.values, streams.reference.values, strict=True)
        ]
        return cls(
            module=quantized,
            start=start,
            nodes=nodes,
            layers=[layers[node] for node in nodes if node in layers],
            samples=samples,
        )

    def error(self, run: Run, sample: Sample, source: Tensor, weights: Values) -> Tensor:
        """The mean squared error of the block on `source`, with `weights` in their nodes' place."""
        result = _replay(run, self.nodes, {**sample.ours, **weights, self.start: source.clone()})
        return (result - sample.wanted).square().mean()

    @torch.no_grad()
    def deployed_error(self, samples: Sequence[Sample]) -> float:
        """The mean error with the weights as they are and all quantizers at work."""
        run = Run(self.module)
        errors = [float(self.error(run, each, each.ours[self.start], {})) for each in samples]
        return sum(errors) / len(errors)

    @torch.no_grad()
    def mean_patch(self, layer: Layer, reader: Reader, samples: Sequence[Sample]) -> Tensor:
        """The mean of what a layer of the block reads with the weights as they are, (G, 1, D)."""
        run, means = Run(self.module), []
        upto = self.nodes[: self.nodes.index(layer.node) + 1]
        for sample in samples:
            values = {**sample.ours, self.start: sample.ours[self.start].clone()}
            given = _replay(run, upto, values)
            read = values[arguments_of(layer.node)["input"]]
            positions = given.movedim(reader.axis, -1)[0, ..., 0]  # of one image
            every = torch.arange(positions.numel(), device=given.device)
            means.append(reader.patches(read.mean(0, keepdim=True), every).mean(1, keepdim=True))
        return torch.stack(means).mean(0)


class DroppingRun(Run):
    """Runs a quantized graph, but some values of each activation stay as they are."""

    def __init__(self, module: GraphModule, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(module)
        self.mix = mix

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        is_activation = isinstance(self.fetch_attr(target), FakeQuantizePerTensor)
        return self.mix(result, args[0]) if is_activation else result


class Draft:
    """The weight and the bias of a layer while they are learned.

    The bias makes up for what the weight changes in the mean output, and is learned beyond that:
    what layers read has a mean, often a large one, and weights would learn of little else.
    """

    def __init__(self, layer: Layer, reader: Reader, mean: Tensor) -> None:
        """`mean` (G, 1, D) is that of the patches which the layer reads."""
        self.layer, self.reader, self.mean = layer, reader, mean
        self.before = layer.quantizer(layer.weight)
        self.rounding = Rounding(layer.original, layer.quantizer)
        # In steps of the weight's grid, so that the rate of the roundings suits it.
        self.shift = torch.zeros_like(layer.quantizer.scale, requires_grad=layer.bias is not None)

    def soft(self) -> Values:
        """What the nodes of the weight and of an own bias give for now."""
        weight, (_, bias_node) = self.rounding.soft(), layer_tensors(self.layer.node)
        bias = self._bias(weight)
        own = {} if bias is None or bias_node is None else {bias_node: bias}
        return {self.layer.weight_node: weight, **own}

    @torch.no_grad()
    def hard(self) -> list[tuple[Tensor, Tensor]]:
        """The graph's tensors, each with its new value."""
        weight = self.rounding.hard()
        bias = self._bias(weight)
        own = [] if bias is None or self.layer.bias is None else [(self.layer.bias, bias)]
        return [(self.layer.weight, weight), *own]

    def _bias(self, weight: Tensor) -> Tensor | None:
        """The bias (K,) to a weight; None where the layer has no own one."""
        if self.layer.bias is None:
            return None
        gained = self.mean @ (self.reader.matrix(weight) - self.reader.matrix(self.before))
        shift = self.shift * self.layer.quantizer.scale
        return self.layer.bias - self.reader.ungrouped(gained)[0] + shift


def _reconstruct_(
    stretch: Stretch,
    learning: Learning,
    generator: torch.Generator,
    after: Callable[[], None],
) -> None:
    """Learn the roundings and biases of a block, kept where held-out batches say that they help."""
    held_out = stretch.samples[HELD_OUT - 1 :: HELD_OUT] or stretch.samples[-1:]
    fitted = [each for each in stretch.samples if each not in held_out] or held_out
    unit = stretch.deployed_error(fitted)
    if unit == 0:
        return
    drafts = []
    for layer in stretch.layers:
        reader = reader_of(layer.node, layer.original)
        drafts.append(Draft(layer, reader, stretch.mean_patch(layer, reader, fitted)))
    device = stretch.samples[0].wanted.device
    noise = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))

    def mix(rounded: Tensor, exact: Tensor) -> Tensor:
        drawn = torch.rand(rounded.shape, generator=noise, device=device)
        return exact.lerp(rounded, (drawn >= FLOAT_SHARE).to(exact.dtype))  # where() is slow here

    run = DroppingRun(stretch.module, mix)

    def loss() -> Tensor:
        sample = fitted[int(torch.randint(len(fitted), (), generator=generator))]
        source = mix(sample.ours[stretch.start], sample.theirs)
        weights = {node: value for draft in drafts for node, value in draft.soft().items()}
        return stretch.error(run, sample, source, weights) / unit

    with torch.enable_grad():
        shifts = [draft.shift for draft in drafts if draft.shift.requires_grad]
        learn_([draft.rounding for draft in drafts], loss, learning, others=shifts, after=after)
    _keep_better_(stretch, [pair for draft in drafts for pair in draft.hard()], held_out)


@torch.no_grad()
def _keep_better_(
    stretch: Stretch, changed: Sequence[tuple[Tensor, Tensor]], held_out: Sequence[Sample]
) -> None:
    """Copy the new values into their tensors, and the old ones back where those are better."""
    before = [tensor.clone() for tensor, _ in changed]
    least = stretch.deployed_error(held_out)
    for tensor, value in changed:
        tensor.copy_(value)
    if stretch.deployed_error(held_out) >= least:
        for (tensor, _), value in zip(changed, before, strict=True):
            tensor.copy_(value)


def _slice(graph: Graph, block: Block) -> list[Node]:
    """The nodes of a graph from the start of a block to its end."""
    nodes = list(graph.nodes)
    first, last = (
        next(index for index, node in enumerate(nodes) if node.name == name)
        for name in (block.start, block.end)
    )
    return nodes[first : last + 1]


def _replay(run: Run, nodes: Sequence[Node], values: Values) -> Tensor:
    """Compute the nodes that have no value yet; the value of the last of them.

    The values of `values` stay as they are, whatever the graph writes into its activations.
    """
    run.env = values
    for node in nodes:
        if node not in values:
            values[node] = run.run_node(node)
    result: Tensor = values[nodes[-1]]
    return result
