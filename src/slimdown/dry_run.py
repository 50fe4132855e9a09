"""What a run would do and need: nothing is written, trained or fetched to say it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from slimdown.core import Stage
from slimdown.distill import Distill
from slimdown.errors import BadInput, MissingExtra, RecipeError, SlimdownError
from slimdown.load import DataSource, ModelSource, load_model, runs_user_code
from slimdown.load.reference import parse_reference
from slimdown.measure import count_parameters
from slimdown.plan import plan_steps
from slimdown.prune import Prune
from slimdown.prune.importance.criteria import IMPORTANCE
from slimdown.quantize import Quantize
from slimdown.recipe import Recipe
from slimdown.sparsify import Sparsify
from slimdown.targets import find_target

LIBRARIES = ("timm", "transformers", "ultralytics")
"""Of models, each an extra of its name."""
MADE_TO_COUNT = ("torchvision", "timm", "onnx")
"""Origins of models that are made to know their size; others would fetch or write to make one."""
FETCHING_OPTIONS = {"pretrained", "weights", "weights_backbone", "checkpoint_path"}
"""Options of these libraries that ask for trained weights."""

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
        StepOutlook(
            name=plan.name, needs=tuple(needs_of(plan.stage, recipe.data)), targets=plan.targets
        )
        for plan in planned
    )
    problems = tuple(find_problems(recipe))
    model = _make_untrained(recipe.model)
    return Outlook(
        name=recipe.name,
        folder=folder,
        steps=steps,
        disk_bytes=_estimate_disk(recipe, steps, model),
        runs_code_of=_own_code(recipe),
        problems=(*problems, model) if isinstance(model, SlimdownError) else problems,
    )


def needs_of(stage: Stage | None, data: DataSource | None = None) -> list[str]:
    """What a stage uses beside the model; None is the original, which is only judged."""
    match stage:
        case None if data is not None and data.is_unlabeled:
            return ["one image"]
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
    yield from _missing_runtimes(recipe)
    if recipe.model is not None:
        library = parse_reference(recipe.model.reference).origin
        if library in LIBRARIES and importlib.util.find_spec(library) is None:
            yield MissingExtra(library, library)
    if recipe.model is None or recipe.data is None:
        yield RecipeError("the recipe names no model or no data: give it `model:` and `data:`")
    weights = recipe.model.weights if recipe.model else None
    if weights is not None and not weights.is_file():
        yield BadInput(f"model.weights: there is no file {weights}")
    if recipe.data is not None:
        for key in ("root", "train", "test"):
            path = getattr(recipe.data, key)
            if path is not None and not path.exists():
                yield BadInput(f"data.{key}: there is no {path}")


def _own_code(recipe: Recipe) -> str | None:
    reference = recipe.model.reference if recipe.model else None
    return reference if reference and runs_user_code(reference) else None


def _missing_runtimes(recipe: Recipe) -> Iterator[SlimdownError]:
    """What is wrong with the runtimes to deploy on, and with those to measure a latency on."""
    timed = [each.target for each in recipe.stages if isinstance(each, Prune) and each.target]
    yield from filter(None, map(_missing_runtime, dict.fromkeys((*recipe.targets, *timed))))


def _missing_runtime(target: str) -> SlimdownError | None:
    try:
        find_target(target).check()
    except (MissingExtra, RecipeError) as error:
        return error
    return None


def _estimate_disk(
    recipe: Recipe, steps: tuple[StepOutlook, ...], model: nn.Module | SlimdownError | None
) -> int | None:
    """Every step's weights and artifacts at the size of the original in FP32: no step adds any."""
    file = recipe.model.weights if recipe.model else None
    if file is not None and file.is_file():
        weights = file.stat().st_size
    elif isinstance(model, nn.Module):
        weights = BYTES_OF_FLOAT32 * count_parameters(model)
    else:
        return None
    artifacts = sum(len(step.targets) for step in steps)
    trains = any(isinstance(stage, Distill) for stage in recipe.stages)
    return weights * (len(steps) - 1 + artifacts + CHECKPOINT_COPIES * trains)


def _make_untrained(source: ModelSource | None) -> nn.Module | SlimdownError | None:
    """The model with random weights, or why it cannot be made; None where that is not tried.

    Never fetches, and never runs the user's code.
    """
    if source is None or not (_is_made_to_count(source) or _is_unknown_type(source)):
        return None
    options = {key: value for key, value in source.options.items() if key not in FETCHING_OPTIONS}
    try:
        return load_model(replace(source, weights=None, options=options))
    except MissingExtra:
        return None  # told already
    except SlimdownError as error:
        return error


def _is_made_to_count(source: ModelSource) -> bool:
    return parse_reference(source.reference).origin in MADE_TO_COUNT


def _is_unknown_type(source: ModelSource) -> bool:
    """Whether transformers will refuse the name, before it makes anything."""
    library, _, name = parse_reference(source.reference)
    if library != "transformers" or "/" in name or Path(name).is_dir():
        return False
    if importlib.util.find_spec(library) is None:
        return False
    import transformers

    return name not in transformers.CONFIG_MAPPING


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
