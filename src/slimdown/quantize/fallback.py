"""More bits for the layers that suffer most from quantization, until the outputs are near enough.

Each step gives one layer the next precision: from fewer than 8 bits to 8, from there to float. The
steps are ranked by what they take off the squared error of the outputs when the layer is quantized
alone (`quantize.sensitivity`), over the work that they add. The shortest beginning of the list that
is enough is found by bisection, and what it does not need is taken back. This is the integer
program of Yao 2021, arXiv:2011.10680, solved greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from slimdown.core import Json
from slimdown.errors import RecipeError
from slimdown.quantize.assembly import Network
from slimdown.quantize.judge import Judge
from slimdown.quantize.mixing import Mixer
from slimdown.quantize.placement import Placement
from slimdown.quantize.steps import Step, levels_after, rank_steps, spare

ErrorAfter: TypeAlias = Callable[[Sequence[Step]], float]
"""The error of the network in which these steps are taken."""


def shortest_beginning(
    steps: Sequence[Step], limit: float, error_after: ErrorAfter
) -> list[Step] | None:
    """The shortest beginning of `steps` with an error of at most `limit`, found by bisection.

    Without any step the error is above the limit. None where it takes all of them: then nothing is
    quantized any more.
    """
    too_few, enough = 0, len(steps)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if error_after(steps[:middle]) <= limit:
            enough = middle
        else:
            too_few = middle
    return None if enough == len(steps) else list(steps[:enough])


def without_spare(steps: Sequence[Step], limit: float, error_after: ErrorAfter) -> list[Step]:
    """The steps but those that are not needed: small ones before a large one that was.

    How many are spared is halved until the error is at most `limit`.
    """
    spared = spare(steps, limit**2 - error_after(steps) ** 2)
    while spared:
        rest = [step for step in steps if step not in spared]
        if error_after(rest) <= limit:
            return rest
        spared = spared[: len(spared) // 2]
    return list(steps)


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

    def __call__(
        self, errors: Mapping[str, Mapping[int, float]], operations: Mapping[str, int]
    ) -> tuple[Network, Json]:
        """The network that keeps the limit, and what happened; the mixer's own does not keep it.

        `errors` are those of `measure_alone`, `operations` those of `count_operations`. Raises
        RecipeError where nothing would stay quantized.
        """
        steps = rank_steps(errors, operations)

        tried: dict[frozenset[Step], float] = {}

        def error_after(taken: Sequence[Step]) -> float:
            key = frozenset(taken)
            if key not in tried:
                self.after("mixed precision", len(tried), 2 * len(steps).bit_length())
                tried[key] = self.judge.error(self.mixer(levels_after(taken)).quantized)
            return tried[key]

        taken = shortest_beginning(steps, self.limit, error_after)
        if taken is None:
            raise RecipeError(self._explain(errors))
        taken = without_spare(taken, self.limit, error_after)
        mixed, error = self.mixer(levels_after(taken)), error_after(taken)
        if not mixed.placement.weights:
            raise RecipeError(self._explain(errors))
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
