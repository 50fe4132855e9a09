"""Models on disk: `save` what a stage made, and `load` that or any step of a run again.

A model is saved as what was done to the user's own: a plan and tensors, never a pickle. Loading it
takes the model as it was before, with any weights, and does the same to it.

    folder/
        plan.json          what rebuilds the module's structure
        model.safetensors  its weights
        graph.pt2          the same as one file that torch.export.load reads without slimdown,
                           where the model came back as a graph and torch.export can write it
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.core import Json, Stage, StageResult, Step
from slimdown.errors import BadInput
from slimdown.files import disk_errors, replacing
from slimdown.load import load_model
from slimdown.plan import ORIGINAL
from slimdown.prune import Prune
from slimdown.recipe import load_recipe
from slimdown.recipe.spec import STAGES
from slimdown.store import StepFolder

PLAN, TENSORS, GRAPH = "plan.json", "model", "graph.pt2"


def save(pruned: StageResult, folder: Path | str) -> None:
    """Save what `Prune` made: `load(folder, model=...)` gives it again. Raises BadInput."""
    if "delivery" not in pruned.structure:
        raise BadInput(
            "save takes what Prune made, with its plan; other stages' results are saved by a run: "
            "compress(model, task, recipe, folder=...)"
        )
    store = StepFolder(Path(folder), key="")
    store.save_record(PLAN, pruned.structure)
    store.save_tensors(TENSORS, pruned.model.state_dict())
    with disk_errors(store.path):
        (store.path / GRAPH).unlink(missing_ok=True)  # that of an earlier model
    if isinstance(pruned.model, GraphModule):
        save_graph(pruned.model, pruned.structure["input"], Path(folder) / GRAPH)


def save_graph(module: nn.Module, input_shape: list[int], path: Path) -> bool:
    """Save a module as torch.export does, for inference; say whether torch.export could.

    `input_shape` (C, H, W); the batch size is dynamic.
    """
    tensor = next(iter(module.state_dict().values()), torch.empty(0))
    example = torch.zeros(2, *input_shape, device=tensor.device)
    example = example.to(tensor.dtype if tensor.is_floating_point() else torch.float32)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                copy.deepcopy(module).eval(), (example,), dynamic_shapes=dynamic, strict=False
            )
    except Exception:  # torch.export raises many kinds; the plan and the tensors are whole
        return False
    with replacing(path) as temporary:
        torch.export.save(program, temporary)
    return True


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The module of a saved model or of a run's step, "runs/x/01-prune", in eval mode.

    `model` is what it was made from, before any stage: with any weights, left as it was. Without
    one, the run's recipe is asked for it. Raises BadInput where they do not belong together, naming
    the first difference.
    """
    folder = Path(folder)
    if (folder / "step.json").is_file():
        return _load_step(folder, model)
    if not (folder / PLAN).is_file():
        steps = sorted(path.parent.name for path in folder.glob("*/step.json"))
        hint = f"; name one of its steps: {', '.join(steps)}" if steps else ""
        raise BadInput(f"{folder} holds no saved model: there is no {PLAN}{hint}")
    if model is None:
        raise BadInput(
            f"{folder} holds what was done to a model, and not the model itself: "
            f'load("{folder}", model=MyModel())'
        )
    structure = _read_plan(folder)
    example = torch.zeros(1, *structure.get("input", ()))
    return _redo(Prune(macs=1), folder, model, example)


def _load_step(folder: Path, model: nn.Module | None) -> nn.Module:
    """Redo every step from the original to this one."""
    run = folder.parent
    example = _read_tensors(run / ORIGINAL / "example.safetensors")["input"]
    module = copy.deepcopy(model if model is not None else _load_original(run)).eval()
    for step in reversed(list(_lineage(folder))):
        if step.parent is not None:
            stage = _stage_of(step, run)
            module = _redo(stage, run / step.name, module, example)
    return module


def _lineage(folder: Path) -> Iterator[Step]:
    """A step, its parent, and so on to the original."""
    name: str | None = folder.name
    while name is not None:
        here = folder.parent / name
        if not (here / "DONE").is_file():
            raise BadInput(f"{here} is missing or not whole: run the recipe again to make it")
        step = StepFolder(here, key="").load_record("step.json", Step)
        yield step
        name = step.parent


def _load_original(run: Path) -> nn.Module:
    source = load_recipe(run / "recipe.yaml").model
    if source is None:
        raise BadInput(
            f"the recipe of {run} names no model, since it was handed over in Python: hand it over "
            "again, load(folder, model=MyModel())"
        )
    return load_model(source)


def _stage_of(step: Step, run: Path) -> Stage:
    if step.kind not in STAGES:
        raise BadInput(
            f"{run / step.name} was made by a stage {step.kind!r}, which this slimdown does not "
            f"know; it knows {', '.join(STAGES)}"
        )
    try:
        stage: Stage = TypeAdapter(STAGES[step.kind]).validate_python(step.settings)
    except ValidationError as error:
        raise BadInput(
            f"the settings in {run / step.name / 'step.json'} are not those of a {step.kind}: "
            f"{error.errors()[0]['msg']}; run the recipe again"
        ) from error
    return stage


def _redo(stage: Stage, folder: Path, model: nn.Module, example: Tensor) -> nn.Module:
    """What a stage once made of `model`, with its weights from `folder`."""
    module = stage.rebuild(model, _read_plan(folder), example)
    state = _read_tensors(folder / f"{TENSORS}.safetensors")
    _check_state(module.state_dict(), state, folder)
    module.load_state_dict(state)
    return module.eval()


def _check_state(own: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> None:
    """Raise BadInput that names the first tensor in which a module and saved weights differ."""
    for name in dict.fromkeys((*own, *state)):
        ours, saved = own.get(name), state.get(name)
        if ours is None or saved is None or ours.shape != saved.shape:
            found, here = (
                "missing" if tensor is None else str(tuple(tensor.shape))
                for tensor in (saved, ours)
            )
        elif ours.dtype != saved.dtype:
            found, here = str(saved.dtype), str(ours.dtype)
        else:
            continue
        raise BadInput(
            f"the weights in {folder} are not those of this model: {name} is {found} there and "
            f"{here} in the model; give the model that it was made from, in the same precision"
        )


def _read_plan(folder: Path) -> Json:
    try:
        structure = json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / PLAN} is missing or damaged: {error}") from error
    if not isinstance(structure, dict):
        raise BadInput(f"{folder / PLAN} is damaged: it holds a {type(structure).__name__}")
    return structure


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is missing or damaged: {error}") from error
