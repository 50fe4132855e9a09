"""The whole way of a model: stages, then deployment, then measurement, then the report.

Every step has a folder of its own under `runs/<name>/` and is made once: one that is whole and was
made from the same inputs is loaded instead. That is how a run resumes, how changed settings redo
just what follows from them, and how targets share the steps that they have in common.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from slimdown.core import Context, Progress, Report, Target, Task
from slimdown.distill import seed_everything
from slimdown.errors import RecipeError
from slimdown.files import disk_errors, locked, write_bytes
from slimdown.load import check_model, load_model, load_task
from slimdown.plan import plan_steps
from slimdown.recipe import Recipe, dump_recipe, recipe_to_json
from slimdown.report import write_report
from slimdown.steps import Made, Run
from slimdown.targets import find_target
from slimdown.verdict import judge

QUIET = Context()


def run_recipe(
    recipe: Recipe,
    *,
    folder: Path | str,
    show: Callable[[Progress], None] = QUIET.show,
    stop_requested: Callable[[], bool] = QUIET.stop_requested,
) -> Report:
    """Load the recipe's own model and data, then `compress`."""
    if recipe.model is None or recipe.data is None:
        raise RecipeError(
            "this recipe names no model or no data: give it `model:` and `data:`, "
            "or call compress(model, task, recipe, folder=...)"
        )
    targets_of(recipe)  # a missing extra is told before anything is loaded
    seed_everything(recipe.seed)  # what a model without weights is made of
    model, task = load_model(recipe.model), load_task(recipe.data)
    return compress(model, task, recipe, folder=folder, show=show, stop_requested=stop_requested)


def compress(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    folder: Path | str,
    show: Callable[[Progress], None] = QUIET.show,
    stop_requested: Callable[[], bool] = QUIET.stop_requested,
) -> Report:
    """Run `recipe` on a trained model; write steps, artifacts and report into `folder`.

    `model` is left as it was. Run again with the same arguments, what is whole is not made again.
    Raises a `SlimdownError` for what the user can mend, and `Interrupted` at a clean point once
    `stop_requested` answers true. A budget that is not met is no error: see `Report.budget_met`.
    """
    targets = targets_of(recipe)
    original = copy.deepcopy(model).eval()
    check_model(original, task)
    folder = Path(folder)
    with locked(folder):
        write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
        context = Context(
            original=original, seed=recipe.seed, show=show, stop_requested=stop_requested
        )
        run = Run(folder=folder, task=task, context=context)

        planned = plan_steps(recipe.stages, targets)
        made: dict[str, Made] = {}
        for plan in planned:
            made[plan.name] = run.take(original) if plan.stage is None else run.make(plan, made)
        measurements = [run.measure_in_torch(step) for step in made.values()]
        for target in targets:
            branch = [made[plan.name] for plan in planned if target.name in plan.targets]
            measurements += run.measure_on(target, branch, recipe.measure)

        report = Report(
            name=recipe.name,
            recipe=recipe_to_json(recipe),
            environment=run.environment(targets[0]),
            steps=tuple(each.step for each in made.values()),
            measurements=tuple(measurements),
        )
        report = replace(report, verdicts=judge(report, recipe.budget))
        _mark_missed(report, folder)
        write_report(report, folder)
        return report


def targets_of(recipe: Recipe) -> list[Target]:
    """The recipe's targets, each of them installed. Raises RecipeError or MissingExtra."""
    targets = [find_target(name) for name in recipe.targets]
    for target in targets:
        target.check()
    return targets


def _mark_missed(report: Report, folder: Path) -> None:
    """Leave a note beside each final artifact that missed the budget, and none beside the others.

    The artifact itself is kept: it may serve, and how it came about is worth a look.
    """
    for target in dict.fromkeys(verdict.target for verdict in report.verdicts):
        missed = [v for v in report.verdicts if v.target == target and not v.met]
        note = folder / "deploy" / target / report.final_step(target).name / "BUDGET_NOT_MET"
        lines = [f"{v.limit}: allowed {v.allowed:g}, found {_tell(v.found)}\n" for v in missed]
        if lines:
            write_bytes(note, "".join(lines).encode())
        else:
            with disk_errors(note):
                note.unlink(missing_ok=True)


def _tell(found: float | None) -> str:
    return "not measured" if found is None else f"{found:g}"
