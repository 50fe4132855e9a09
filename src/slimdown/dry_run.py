"""What a run would do and need: nothing is written, trained or fetched to say it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slimdown.core import Stage
from slimdown.distill import Distill
from slimdown.errors import BadInput, MissingExtra, RecipeError, SlimdownError
from slimdown.load import ModelSource, load_model, runs_user_code
from slimdown.measure import count_parameters
from slimdown.plan import plan_steps
from slimdown.prune import Prune
from slimdown.prune.importance.criteria import IMPORTANCE
from slimdown.quantize import Quantize
from slimdown.recipe import Recipe
from slimdown.sparsify import Sparsify
from slimdown.targets import find_target

BYTES_OF_FLOAT32 = 4
CHECKPOINT_COPIES = 4
"""A training checkpoint holds the weights, their average, and two moments of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class StepOutlook:
    """A step to come."""

    name: str
    needs: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A run to come."""

    name: str
    folder: Path
    steps: tuple[StepOutlook, ...]
    disk_bytes: int | None
    """At most; None where the size of the model is not known without making it."""
    runs_code_of: str | None
    """The reference whose file or module the run executes."""
    problems: tuple[SlimdownError, ...]
    """What would stop the run at its beginning."""

    @property
    def exit_code(self) -> int:
        """The exit code that the run would end with, as far as is known."""
        return self.problems[0].exit_code if self.problems else 0


def look_ahead(recipe: Recipe, *, folder: Path) -> Outlook:
    """Lay out a run; what would stop it is listed, not raised."""
    targets = [find_target(name) for name in recipe.targets]
    planned = plan_steps(recipe.stages, targets)
    steps = tuple(
        StepOutlook(name=plan.name, needs=tuple(needs_of(plan.stage)), targets=plan.targets)
        for plan in planned
    )
    return Outlook(
        name=recipe.name,
        folder=folder,
        steps=steps,
        disk_bytes=_estimate_disk(recipe, steps),
        runs_code_of=_own_code(recipe),
        problems=tuple(find_problems(recipe)),
    )


def needs_of(stage: Stage | None) -> list[str]:
    """What a stage uses beside the model; None is the original, which is only judged."""
    match stage:
        case None:
            return ["test images with labels"]
        case Prune(importance="taylor" | "fisher"):
            return [f"{stage.num_images} training images with labels"]
        case Prune() if _looks_at_images(stage):
            return [f"{stage.num_images} calibration images"]
        case Prune():
            return ["one image"]
        case Distill(alpha=0.0):
            return ["training images", "the original as teacher"]
        case Distill(alpha=1.0):
            return ["training images with labels"]
        case Distill():
            return ["training images with labels", "the original as teacher"]
        case Sparsify(method="magnitude"):
            return ["one image"]
        case Sparsify():
            return [f"{stage.num_images} calibration images"]
        case Quantize(precision="int8"):
            return [f"{stage.num_images} calibration images"]
        case Quantize():
            return ["one image"]
    return ["its own needs: it is no stage of slimdown's"]


def _looks_at_images(stage: Prune) -> bool:
    needs = IMPORTANCE[stage.importance].needs
    return (
        stage.compensate
        or stage.sensitivity
        or stage.depth > 0
        or not {"noise", "weights", "scales"}.issuperset(needs)
    )


def find_problems(recipe: Recipe) -> Iterator[SlimdownError]:
    """What a run would meet before its first step: missing extras first."""
    yield from filter(None, map(_missing_extra, recipe.targets))
    if recipe.model is None or recipe.data is None:
        yield RecipeError("the recipe names no model or no data: give it `model:` and `data:`")
    if recipe.model is not None:
        is_timm = recipe.model.reference.startswith("timm:")
        if is_timm and importlib.util.find_spec("timm") is None:
            yield MissingExtra("timm", "timm")
        if recipe.model.weights is not None and not recipe.model.weights.is_file():
            yield BadInput(f"model.weights: there is no file {recipe.model.weights}")
    if recipe.data is not None:
        for key in ("root", "train", "test"):
            path = getattr(recipe.data, key)
            if path is not None and not path.exists():
                yield BadInput(f"data.{key}: there is no {path}")


def _own_code(recipe: Recipe) -> str | None:
    reference = recipe.model.reference if recipe.model else None
    return reference if reference and runs_user_code(reference) else None


def _missing_extra(target: str) -> MissingExtra | None:
    try:
        find_target(target).check()
    except MissingExtra as error:
        return error
    return None


def _estimate_disk(recipe: Recipe, steps: tuple[StepOutlook, ...]) -> int | None:
    """Every step's weights and artifacts at the size of the original in FP32: no step adds any."""
    weights = None if recipe.model is None else _weights_bytes(recipe.model)
    if weights is None:
        return None
    artifacts = sum(len(step.targets) for step in steps)
    trains = any(isinstance(stage, Distill) for stage in recipe.stages)
    return weights * (len(steps) - 1 + artifacts + CHECKPOINT_COPIES * trains)


def _weights_bytes(source: ModelSource) -> int | None:
    if source.weights is not None and source.weights.is_file():
        return source.weights.stat().st_size
    if not source.reference.startswith(("torchvision:", "timm:")):
        return None  # to know it, the user's code would have to run
    options = {key: value for key, value in source.options.items() if key != "pretrained"}
    try:
        model = load_model(replace(source, weights=None, options=options))
    except SlimdownError:
        return None  # the run itself will tell
    return BYTES_OF_FLOAT32 * count_parameters(model)


def render_outlook(outlook: Outlook) -> RenderableType:
    """Draw what is to come for the terminal."""
    table = Table("step", "needs", "deployed on", box=None, pad_edge=False)
    for step in outlook.steps:
        table.add_row(step.name, ", ".join(step.needs), ", ".join(step.targets))
    disk = "not known before the model is made"
    if outlook.disk_bytes is not None:
        disk = (
            f"at most about {outlook.disk_bytes / 1e6:.1f} MB (each step and artifact counted at "
            "the size of the original in FP32), and less than 1 MB for the report"
        )
    lines = [f"Disk: {disk}", f"Folder: {outlook.folder} (nothing was written)"]
    if outlook.runs_code_of is not None:
        lines.append(f"Code: the run executes {outlook.runs_code_of}")
    lines += [f"Missing: {problem}" for problem in outlook.problems]
    return Group(Text(f"Plan of {outlook.name}"), table, Text("\n".join(lines)))
