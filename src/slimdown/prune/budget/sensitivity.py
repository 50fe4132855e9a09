"""How much the output suffers when one group of channels is narrowed, measured group by group.

Label-free: each group alone is pruned to a few widths and the graph run on some images. The error
over the groups' importance tells what a loss of importance costs in each of them, and what is
measured takes the place of what importance alone would say. Li 2017, arXiv:1608.08710, looked at
layers so to choose their widths by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from slimdown.capture import Analysis, has_dynamic_batch
from slimdown.capture.dims import Var
from slimdown.core import Context, Progress, Task
from slimdown.errors import Interrupted, RecipeError
from slimdown.images import as_input, take_images
from slimdown.prune.budget.widths import Choice, keep_most_important, losses
from slimdown.prune.groups import group_channels
from slimdown.prune.probe import relative_error, require_finite
from slimdown.prune.surgery import prune_graph

Weigh: TypeAlias = Callable[[Sequence[Choice]], list[Choice]]
"""Gives choices the damage that each of their widths does."""

SHARES = (0.75, 0.5, 0.25)
"""At which shares of its width each group is tried."""

NUM_IMAGES = 16
"""An error is a mean over all outputs of all images, so that few are enough."""


def find_sensitivity(
    analysis: Analysis, task: Task, context: Context, *, num_images: int = NUM_IMAGES
) -> Sensitivity:
    """The sensitivity of a network on a task's calibration images. Raises RecipeError."""
    taken = take_images(task.calibration_batches(), num_images)
    images = [as_input(batch, analysis.graph_module) for batch in taken]
    if sum(map(len, images)) < 2:
        raise RecipeError(
            "prune.sensitivity looks at the outputs of at least 2 calibration images, and the task "
            "has fewer: give some, or leave it out"
        )

    def show(done: int, total: int) -> None:
        context.show(Progress("prune: measure sensitivity", done, total))
        if context.stop_requested():
            raise Interrupted(
                "stopped while measuring sensitivity; the next run begins this step anew"
            )

    return Sensitivity(analysis, images, show)


@dataclass(frozen=True)
class Sensitivity:
    """Measures choices, and remembers those that it has measured."""

    analysis: Analysis
    images: Sequence[Tensor]
    """(N, C, H, W) each, at least two in all: errors are told over the outputs' spread."""
    show: Callable[[int, int], None]
    """How many groups are done, of how many."""
    measured: dict[tuple[Var, ...], dict[int, float]] = field(default_factory=dict)
    """For each group, or groups that keep equal widths: width -> relative error of the output."""

    def weigh(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices with what was measured as their damage."""
        missing = [choice for choice in choices if _key(choice) not in self.measured]
        if missing:
            reference = self._run(self.analysis.graph_module)
            for output in reference:
                require_finite(output)
        for done, choice in enumerate(missing):
            self.show(done, len(missing))
            self.measured[_key(choice)] = {
                width: self._error(choice, width, reference) for width in tried_widths(choice)
            }
        return [with_damage(choice, self.measured[_key(choice)]) for choice in choices]

    def facts(self) -> dict[str, list[list[float]]]:
        """The first layer of each group -> [fraction kept, relative error of the output], …"""
        names = {leaf: group.name for leaf, group in group_channels(self.analysis).items()}
        return {
            names[leaves[0]]: [[width / leaves[0].size, error] for width, error in curve.items()]
            for leaves, curve in self.measured.items()
        }

    def _error(self, choice: Choice, width: int, reference: Sequence[Any]) -> float:
        kept = keep_most_important([choice], dict.fromkeys(choice.importance, width))
        results = self._run(prune_graph(self.analysis, kept))
        return relative_error(results, reference, sizes=[len(part) for part in self._parts()])

    def _run(self, graph_module: GraphModule) -> list[Any]:
        with torch.no_grad():  # on copies, which the graph may write into
            return [graph_module(part.clone()) for part in self._parts()]

    def _parts(self) -> list[Tensor]:
        is_dynamic = has_dynamic_batch(self.analysis.graph_module)
        return [p for x in self.images for p in ([x] if is_dynamic else torch.split(x, 1))]


def tried_widths(choice: Choice) -> list[int]:
    """The widths nearest to the `SHARES`, falling, without the whole."""
    whole, *narrower = choice.widths
    nearest = (min(narrower, key=lambda w: abs(w - s * whole)) for s in SHARES if narrower)
    return list(dict.fromkeys(nearest))


def with_damage(choice: Choice, errors: Mapping[int, float]) -> Choice:
    """A choice whose damage is the square of the measured error, so that groups add up.

    Between the widths that were tried it rises as the importance that is lost does, and beyond the
    narrowest of them as it did before. An output that is no number any more is the worst of all.
    """
    if not errors:
        return choice
    lost = losses(choice, "channel")
    by_width = dict(zip(choice.widths, lost, strict=True))
    points = [0.0, *(float(by_width[width]) for width in errors)]
    squares = [0.0, *(min(float(np.nan_to_num(e, nan=np.inf)) ** 2, 1e6) for e in errors.values())]
    squares = list(np.maximum.accumulate(squares))
    slope = squares[-1] / points[-1] if points[-1] > 0 else 0.0
    damage = np.interp(lost, points, squares) + slope * np.maximum(lost - points[-1], 0.0)
    return replace(choice, damage=tuple(map(float, damage)))


def _key(choice: Choice) -> tuple[Var, ...]:
    return tuple(choice.importance)
