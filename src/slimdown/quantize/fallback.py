"""More bits for the layers that suffer most from quantization, until the outputs are near enough.

Each step gives one layer the next precision: from fewer than 8 bits to 8, from there to float. The
steps are ranked by what they take off the squared error of the outputs when the layer is quantized
alone (`quantize.sensitivity`), and the shortest beginning of the list that is enough is found by
bisection. Choosing bits by the sum of such gains is the integer program of Yao 2021,
arXiv:2011.10680, solved greedily.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule

from slimdown.core import Json
from slimdown.errors import RecipeError
from slimdown.quantize.assembly import Network, insert_with_grids
from slimdown.quantize.calibrate import Calibration
from slimdown.quantize.grids import round_biases_
from slimdown.quantize.judge import Judge
from slimdown.quantize.placement import Placement
from slimdown.quantize.refine.bias_correction import correct_biases_
from slimdown.quantize.refine.layers import find_layers
from slimdown.quantize.sensitivity import FLOAT, Plan, ranges_for

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
    error: float
    """Of the outputs with the layer alone as it was quantized first."""


def rank_steps(errors: Mapping[str, Mapping[int, float]]) -> list[Step]:
    """All steps up to a network in float, the largest gain first.

    `errors`: label -> bits, rising -> error alone. A layer goes right to float where 8 bits would
    gain less than float does after them: then a list in order of gains has no place between.
    """
    steps = []
    for label, by_bits in errors.items():
        bits = [*by_bits, FLOAT]
        squares = [*(min(error**2, LARGEST) for error in by_bits.values()), 0.0]
        gains = [before - after for before, after in pairwise(squares)]
        if len(gains) == 2 and gains[1] >= gains[0]:
            bits, gains = [bits[0], FLOAT], [sum(gains)]
        first = next(iter(by_bits.values()))
        steps += [
            Step(label=label, bits=to, gain=gain, error=first)
            for to, gain in zip(bits[1:], gains, strict=True)
        ]
    return sorted(steps, key=lambda step: -step.gain)  # stable: 8 bits come before float


def levels_after(steps: Sequence[Step]) -> dict[str, int]:
    """Label -> bits, of the layers that steps change."""
    return {step.label: step.bits for step in steps}


def fall_back(
    steps: Sequence[Step],
    limit: float,
    *,
    attempt: Callable[[Mapping[str, int]], tuple[Network, float]],
) -> tuple[Network, float, list[Step]] | None:
    """The network after the fewest steps with an error of at most `limit`; its error and steps.

    `attempt` makes the network with these bits and tells its error; with no steps it is above the
    limit. None where it takes all steps: then nothing is quantized any more.
    """
    found = None
    too_few, enough = 0, len(steps)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        network, error = attempt(levels_after(steps[:middle]))
        if error <= limit:
            enough, found = middle, (network, error, list(steps[:middle]))
        else:
            too_few = middle
    return found


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """Gives layers of a network more bits until the error of its outputs is at most `limit`."""

    limit: float
    labels: Mapping[str, str]
    """Name of a node -> what users call it."""
    plan: Plan
    calibration: Calibration
    judge: Judge
    fitted: Sequence[Tensor]
    """Images, (N, C, H, W) each, that biases are corrected with."""
    after: Callable[[str, int, int], None]
    """Gets what is being done, how much of it is done, and how much there is at most."""

    def __call__(
        self, network: Network, errors: Mapping[str, Mapping[int, float]], *, is_refined: bool
    ) -> tuple[Network, Json]:
        """The network that keeps the limit, and what happened; `network` does not keep it.

        `errors` are those of `measure_alone`. `is_refined`: the weights or biases of `network` are
        not those of its reference. Raises RecipeError where nothing would stay quantized.
        """
        steps = rank_steps(errors)
        tried = 0

        def attempt(levels: Mapping[str, int]) -> tuple[Network, float]:
            nonlocal tried
            self.after("mixed precision", tried, len(steps).bit_length())
            tried += 1
            mixed = self._give_bits(network, levels, is_refined=is_refined)
            return mixed, self.judge.error(mixed.quantized)

        found = fall_back(steps, self.limit, attempt=attempt)
        if found is None or not found[0].placement.weights:
            raise RecipeError(self._explain(errors))
        mixed, error, taken = found
        alone = {step.label: step.error for step in taken}
        changes = [
            {"layer": label, "bits": bits, "error_alone": alone[label]}
            for label, bits in levels_after(taken).items()
        ]
        mixed = replace(mixed, placement=self._with_reasons(mixed.placement, alone))
        return mixed, {"rung": "mixed_precision", "error": error, "kept": True, "changes": changes}

    def _give_bits(
        self, network: Network, levels: Mapping[str, int], *, is_refined: bool
    ) -> Network:
        """The network with these bits. What was refined stays where the bits stay."""
        placement = self.plan(levels)
        ranges = ranges_for(placement, network)
        reference = network.reference
        quantized = insert_with_grids(copy.deepcopy(reference), placement, ranges, self.calibration)
        if is_refined:
            copy_refined_(quantized, placement, network)
            correct_biases_(quantized, reference, placement, self.fitted)
        round_biases_(quantized)
        return replace(network, quantized=quantized, placement=placement, ranges=ranges)

    def _with_reasons(self, placement: Placement, alone: Mapping[str, float]) -> Placement:
        def reason(name: str, why: str) -> str:
            error = alone.get(self.labels[name])
            return why if error is None else f"too sensitive: error {error:.2g} alone"

        reasons = {name: reason(name, why) for name, why in placement.kept_float.items()}
        return replace(placement, kept_float=reasons)

    def _explain(self, errors: Mapping[str, Mapping[int, float]]) -> str:
        least = min(errors, key=lambda label: list(errors[label].values())[-1])
        bits, error = list(errors[least].items())[-1]
        return (
            f"quantize.max_error is {self.limit:g}, and with it every layer would have to stay in "
            f"float: {least} alone, the least sensitive one, has an error of {error:.2g} at {bits} "
            "bits; allow a larger error, or train the quantized network with distill"
        )


@torch.no_grad()
def copy_refined_(quantized: GraphModule, placement: Placement, refined: Network) -> None:
    """Give layers whose weights have the levels they had the weights that were refined."""
    olds = {
        node.name: layer
        for node, layer in find_layers(
            refined.quantized, refined.reference, refined.placement
        ).items()
    }
    for node, new in find_layers(quantized, refined.reference, placement).items():
        name = node.name
        if placement.weight_ranges[name] != refined.placement.weight_ranges[name]:
            continue
        old = olds[name]
        new.weight.copy_(old.weight)
        new.quantizer.scale.copy_(old.quantizer.scale)
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
