"""Which layers to give more bits first: what is gained by it, over what it costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.quantize.families import LAYERS, family_of
from slimdown.quantize.fold import attributes_of, layer_tensors
from slimdown.quantize.mixing import FLOAT
from slimdown.quantize.placement import label_of

LARGEST = 1e12
"""Squared errors are cut off here, so that infinite ones can be told apart from nothing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """More bits for one layer."""

    label: str
    bits: int
    """What it has from here on; `FLOAT`: it is not quantized."""
    gain: float
    """The squared error of the outputs that this takes away, judged by the layer alone."""
    cost: float
    """The bit operations that it adds for an image: operations times the square of bits. Of
    Baskin 2018, arXiv:1804.10969."""
    error: float
    """Of the outputs with the layer alone as it was quantized first."""


def count_operations(graph_module: GraphModule, nodes: Iterable[Node]) -> dict[str, int]:
    """What nodes compute for an image, by their labels: MACs of layers, values of sums."""
    attributes = attributes_of(graph_module)
    found: dict[str, int] = defaultdict(int)
    for node in nodes:
        operations = math.prod(map(int, node.meta["val"].shape[1:]))
        if family_of(node) in LAYERS:
            weight = attributes[str(layer_tensors(node)[0].target)]
            assert isinstance(weight, Tensor)
            operations *= math.prod(weight.shape[1:])
        found[label_of(node)] += operations
    return dict(found)


def rank_steps(
    errors: Mapping[str, Mapping[int, float]], operations: Mapping[str, int]
) -> list[Step]:
    """All steps up to a network in float, the largest gain for its cost first.

    `errors`: label -> bits, rising -> error alone. A layer goes right to float where that gains
    more for its cost than 8 bits do: a list in order of such ratios has no place between.
    """
    steps: list[Step] = []
    for label, by_bits in errors.items():
        bits = [*by_bits, FLOAT]
        if len(bits) == 3:
            eight, on = (_step(label, by_bits, operations[label], *ends) for ends in pairwise(bits))
            if on.gain / on.cost >= eight.gain / eight.cost:
                bits = [bits[0], FLOAT]
        steps += [_step(label, by_bits, operations[label], *ends) for ends in pairwise(bits)]
    return sorted(steps, key=lambda step: -step.gain / step.cost)  # stable: 8 bits before float


def _step(label: str, by_bits: Mapping[int, float], operations: int, start: int, end: int) -> Step:
    before, after = (min(by_bits.get(bits, 0.0) ** 2, LARGEST) for bits in (start, end))
    return Step(
        label=label,
        bits=end,
        gain=before - after,
        cost=operations * (end**2 - start**2),
        error=next(iter(by_bits.values())),
    )


def levels_after(steps: Sequence[Step]) -> dict[str, int]:
    """Label -> bits, of the layers that steps change."""
    return {step.label: step.bits for step in steps}


def spare(steps: Sequence[Step], gain: float) -> list[Step]:
    """The steps to take back so that no more than `gain` is lost, beginning with the last but one.

    The last one stays: what comes before it is known not to be enough. A layer that goes on to
    float keeps its step to 8 bits.
    """
    spared: list[Step] = []
    kept = {steps[-1].label}
    for step in reversed(steps[:-1]):
        if step.label not in kept and step.gain <= gain:
            gain -= max(step.gain, 0.0)
            spared.append(step)
        else:
            kept.add(step.label)
    return spared
