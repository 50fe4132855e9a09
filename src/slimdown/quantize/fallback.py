"""More bits for the layers that suffer most from quantization, until the outputs are near enough.

Each step gives one layer the next precision: from fewer than 8 bits to 8, from there to float. The
steps are ranked by what they take off the squared error of the outputs when the layer is quantized
alone (`quantize.sensitivity`), and the shortest beginning of the list that is enough is found by
bisection. Choosing bits by the sum of such gains is the integer program of Yao 2021,
arXiv:2011.10680, solved greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from slimdown.core import Json
from slimdown.errors import RecipeError
from slimdown.quantize.assembly import Network
from slimdown.quantize.judge import Judge
from slimdown.quantize.mixing import FLOAT, Mixer
from slimdown.quantize.placement import Placement

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
    mixer: Mixer
    judge: Judge
    after: Callable[[str, int, int], None]
    """Gets what is being done, how much of it is done, and how much there is at most."""

    def __call__(self, errors: Mapping[str, Mapping[int, float]]) -> tuple[Network, Json]:
        """The network that keeps the limit, and what happened; the mixer's own does not keep it.

        `errors` are those of `measure_alone`. Raises RecipeError where nothing would stay
        quantized.
        """
        steps = rank_steps(errors)
        tried = 0

        def attempt(levels: Mapping[str, int]) -> tuple[Network, float]:
            nonlocal tried
            self.after("mixed precision", tried, len(steps).bit_length())
            tried += 1
            mixed = self.mixer(levels)
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

    def _with_reasons(self, placement: Placement, alone: Mapping[str, float]) -> Placement:
        def reason(name: str, why: str) -> str:
            error = alone.get(self.labels[name])
            return why if error is None else f"too sensitive: error {error:.2g} alone"

        reasons = {name: reason(name, why) for name, why in placement.kept_float.items()}
        return replace(placement, kept_float=reasons)

    def _explain(self, errors: Mapping[str, Mapping[int, float]]) -> str:
        layers = {self.labels[name] for name in self.mixer.network.placement.weights}
        least = min(layers, key=lambda label: list(errors[label].values())[-1])
        bits, error = list(errors[least].items())[-1]
        return (
            f"quantize.max_error is {self.limit:g}, and with it every layer would have to stay in "
            f"float: {least} alone, the least sensitive one, has an error of {error:.2g} at {bits} "
            "bits; allow a larger error, or train the quantized network with distill"
        )
