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
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine.adaround import adaround_
from slimdown.quantize.refine.bias_correction import correct_biases_
from slimdown.quantize.refine.reconstruction import reconstruct_
from slimdown.quantize.rewrites.equalization import equalize, smooth

Effort: TypeAlias = Literal["fast", "balanced", "best"]

Rewrite: TypeAlias = Callable[[GraphModule, Sequence[Tensor], Placement], GraphModule]
"""`rewrite(reference, images, placement)`: the same function with other weights, same names.

The reference itself where nothing is to be changed.
"""

Refinement: TypeAlias = Callable[..., None]
"""`refine_(quantized, reference, placement, images, after=...)` changes `quantized`."""

REWRITES: dict[str, Rewrite] = {
    "equalization": equalize,
    "smoothing": smooth,
}
REFINEMENTS: dict[str, Refinement] = {
    "bias_correction": correct_biases_,
    "adaround": adaround_,
    "block_reconstruction": reconstruct_,
}

EFFORTS: dict[Effort, tuple[str, ...]] = {
    "fast": (),
    "balanced": ("equalization", "smoothing", "bias_correction"),
    "best": ("equalization", "smoothing", "bias_correction", "adaround", "block_reconstruction"),
}
"""The rungs of each effort, in their order: rewrites first.

AdaRound and block reconstruction both begin from the float weights: the better one is kept. With
4-bit weights that was the latter on a ResNet-20 and the former on a small ViT.
"""


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
    placement = assemble.placement
    if name in REWRITES:
        rewritten = REWRITES[name](network.reference, images, placement)
        return network if rewritten is network.reference else assemble(rewritten)
    refined = copy.deepcopy(network.quantized)
    REFINEMENTS[name](refined, network.reference, placement, images, after=lambda: after(name))
    round_biases_(refined)
    return replace(network, quantized=refined)
