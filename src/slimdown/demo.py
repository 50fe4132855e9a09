"""The demo: everything that slimdown does, on embedded digits, in minutes and without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from slimdown.core import Context, Progress, Report
from slimdown.distill import Distill, seed_everything
from slimdown.load import load_model, load_task
from slimdown.pipeline import run_recipe
from slimdown.recipe import Recipe, load_recipe
from slimdown.store import StepFolder, fingerprint_task, key_of, settings_of
from slimdown.version import __version__

TEACHER_TRAINING = Distill(alpha=1.0, epochs=6)
"""Plain supervised training: the labels have all the weight, so there is no teacher."""
_QUIET = Context()


def run_demo(
    folder: Path | str,
    *,
    targets: Sequence[str] = ("onnxruntime",),
    show: Callable[[Progress], None] = _QUIET.show,
    stop_requested: Callable[[], bool] = _QUIET.stop_requested,
) -> Report:
    """Train a teacher in `folder/teacher`, then run the demo's recipe on it in `folder`."""
    recipe = replace(load_demo_recipe(), targets=tuple(targets))
    context = Context(seed=recipe.seed, show=show, stop_requested=stop_requested)
    weights = train_teacher(recipe, Path(folder) / "teacher", context=context)
    assert recipe.model is not None
    recipe = replace(recipe, model=replace(recipe.model, weights=weights))
    return run_recipe(recipe, folder=folder, show=show, stop_requested=stop_requested)


def load_demo_recipe() -> Recipe:
    """The recipe that comes with slimdown; the weights of its model are still to be trained."""
    with resources.as_file(resources.files("slimdown") / "demo.yaml") as path:
        return load_recipe(path)


def train_teacher(recipe: Recipe, folder: Path, *, context: Context) -> Path:
    """Train the recipe's model from scratch, once; the file of its weights.

    Goes on from its checkpoint after a stop, as the stages of a run do.
    """
    assert recipe.model is not None
    assert recipe.data is not None
    seed_everything(context.seed)  # the weights that training starts from are random
    model, task = load_model(recipe.model), load_task(recipe.data)
    key = key_of(
        __version__,
        recipe.model.reference,
        fingerprint_task(task),
        context.seed,
        settings_of(TEACHER_TRAINING),
    )
    step = StepFolder(folder, key)
    step.begin()
    if not step.is_done:
        training = replace(
            context,
            save_checkpoint=step.save_checkpoint,
            load_checkpoint=step.load_checkpoint,
            show=lambda progress: context.show(progress._replace(label="train a teacher")),
        )
        result = TEACHER_TRAINING(model, task, training)
        step.save_tensors("model", result.model.state_dict())
        step.finish()
    return folder / "model.safetensors"
