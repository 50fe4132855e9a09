"""Which steps a recipe leads to: shared while the targets agree, one branch a target after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimdown.core import Stage, Target

ORIGINAL = "00-original"
"""The step of the model that the user brought."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A step to come: its stage (None for the original) and the targets whose way leads over it."""

    name: str
    parent: str | None
    stage: Stage | None
    targets: tuple[str, ...]


def plan_steps(stages: Sequence[Stage], targets: Sequence[Target]) -> list[Planned]:
    """Lay out the steps of all targets, parents first.

    A target's way leaves the common one at the first stage that the target fills in for itself,
    such as a quantization whose placement is the target's; from there its steps bear its name.
    """
    everyone = tuple(target.name for target in targets)
    planned = {ORIGINAL: Planned(name=ORIGINAL, parent=None, stage=None, targets=everyone)}
    for target in targets:
        parent, suffix = ORIGINAL, ""
        for index, stage in enumerate(stages, start=1):
            filled = stage.for_target(target)
            if filled != stage:
                suffix = f"-{target.name}"
            name = f"{index:02d}-{stage.kind}{suffix}"
            shared = planned[name].targets if name in planned else ()
            planned[name] = Planned(
                name=name, parent=parent, stage=filled, targets=(*shared, target.name)
            )
            parent = name
    return list(planned.values())
