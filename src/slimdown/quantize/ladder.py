"""What is tried to bring a quantized network nearer to the float one: rung by rung.

A rewrite changes the float network's weights so that it computes the same and quantizes better. A
refinement changes the quantized network's weights so that it imitates the float one better. Each
rung is judged on held-out images, and taken back where it does not help.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from torch import Tensor
from torch.fx import GraphModule

from slimdown.core import Json
from slimdown.quantize.assembly import Assembly, Network
from slimdown.quantize.grids import round_biases_
from slimdown.quantize.judge import Judge
from slimdown.quantize.refine.adaround import adaround_
from slimdown.quantize.refine.bias_correction import correct_biases_

Effort: TypeAlias = Literal["fast", "balanced", "best"]

Rewrite: TypeAlias = Callable[[GraphModule, Sequence[Tensor]], GraphModule]
"""The same function with other weights, of tensors of its own, under the same names."""

Refinement: TypeAlias = Callable[..., None]
"""`refine_(quantized, reference, placement, images, after=...)` changes `quantized`."""

REWRITES: dict[str, Rewrite] = {}
REFINEMENTS: dict[str, Refinement] = {
    "bias_correction": correct_biases_,
    "adaround": adaround_,
}

EFFORTS: dict[Effort, tuple[str, ...]] = {
    "fast": (),
    "balanced": ("bias_correction",),
    "best": ("bias_correction", "adaround"),
}
"""The rungs of each effort, in their order: rewrites first."""


def climb(
    start: Network,
    rungs: Sequence[str],
    *,
    assemble: Assembly,
    judge: Judge,
    images: Sequence[Tensor],
    after: Callable[[str], None],
) -> tuple[Network, list[Json]]:
    """Try each rung on the best network so far; return the last best one, and what came of each.

    `images` are what rungs may fit to, and `after` is called with the rung's name while it works.
    """
    best, least = start, judge.error(start.quantized)
    steps: list[Json] = [{"rung": "ranges", "error": least, "kept": True}]
    for name in rungs:
        after(name)
        network = _try(name, best, assemble, images, after)
        error = judge.error(network.quantized)
        is_better = error < least
        if is_better:
            best, least = network, error
        steps.append({"rung": name, "error": error, "kept": is_better})
    return best, steps


def _try(
    name: str,
    network: Network,
    assemble: Assembly,
    images: Sequence[Tensor],
    after: Callable[[str], None],
) -> Network:
    if name in REWRITES:
        return assemble(REWRITES[name](network.reference, images))
    refined, placement = copy.deepcopy(network.quantized), assemble.placement
    REFINEMENTS[name](refined, network.reference, placement, images, after=lambda: after(name))
    round_biases_(refined, placement)
    return replace(network, quantized=refined)
