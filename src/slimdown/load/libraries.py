"""Models of libraries, made by name: torchvision's, timm's, transformers' and ultralytics'.

Each maker takes a reference and the recipe's options, imports its library and raises RecipeError
for a name or an option that the library does not know.
"""

from __future__ import annotations

import inspect
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from slimdown.core import Json
from slimdown.errors import BadInput, MissingExtra, RecipeError, SlimdownError, Unsafe
from slimdown.load.reference import Reference
from slimdown.suggest import did_you_mean


def make_torchvision(reference: Reference, options: Json) -> Any:
    import torchvision

    known = torchvision.models.list_models()
    if reference.name not in known:
        raise RecipeError(
            f"torchvision has no model {reference.name!r}{did_you_mean(reference.name, known)}"
        )
    builder = torchvision.models.get_model_builder(reference.name)
    options = dict(options)
    pretrained = options.pop("pretrained", False)
    options.setdefault("weights", "DEFAULT" if pretrained else None)
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        options.setdefault("weights_backbone", None)  # else torchvision fetches them unasked
    with _library_errors(reference, fetches=options["weights"] is not None):
        return torchvision.models.get_model(reference.name, **options)


def make_timm(reference: Reference, options: Json) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtra("timm", "timm") from error
    if not timm.is_model(reference.name):
        close = did_you_mean(reference.name, timm.list_models())
        raise RecipeError(f"timm has no model {reference.name!r}{close}")
    with _library_errors(reference, fetches=bool(options.get("pretrained"))):
        return timm.create_model(reference.name, **options)


# -------------------------------------------------------------------------------- transformers


def make_transformers(reference: Reference, options: Json) -> Any:
    """A checkpoint of the hub or of a folder; or, for a model type, its default configuration.

    A model type is made with random weights and takes the options of its configuration. Neither
    code nor pickles of a checkpoint are read: only safetensors.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "transformers") from error
    name, types = reference.name, transformers.CONFIG_MAPPING
    if name in types and not Path(name).is_dir():
        config = types[name]()
        _check_settings(reference, config, options)
        try:
            config = types[name](**options)
        except Exception as error:  # each kind of configuration checks in its own way
            raise RecipeError(f"model.options do not suit {reference}: {error}") from error
        with _library_errors(reference, fetches=False):
            return _class_for(config)(config)
    if not Path(name).is_dir() and "/" not in name:
        raise RecipeError(
            f"transformers has no model type {name!r}{did_you_mean(name, types)}; a checkpoint is "
            "named by its folder, or as OWNER/NAME on the hub"
        )
    return _load_checkpoint(reference, options)


def _load_checkpoint(reference: Reference, options: Json) -> Any:
    import transformers

    with _library_errors(reference, fetches=True), _only_safetensors(reference):
        config = transformers.AutoConfig.from_pretrained(reference.name, trust_remote_code=False)
        _check_settings(reference, config, options)
        model, loading = _class_for(config).from_pretrained(
            reference.name, use_safetensors=True, output_loading_info=True, **options
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise BadInput(
            f"the checkpoint of {reference} lacks weights of {type(model).__name__}: "
            f"{', '.join(missing[:4])}, …; give one that was trained for this task"
        )
    return model


def _check_settings(reference: Reference, config: Any, options: Json) -> None:
    # transformers takes any name without a word.
    for option in options:
        if not hasattr(config, option):
            raise RecipeError(
                f"model.options do not suit {reference}: there is no "
                f"{option!r}{did_you_mean(option, config.to_dict())}"
            )


def _class_for(config: Any) -> Any:
    """The class that a checkpoint was saved from, or the first task's that has one of its kind."""
    import transformers

    named = (getattr(transformers, name, None) for name in config.architectures or ())
    tasks = (
        transformers.AutoModelForImageClassification,
        transformers.AutoModelForObjectDetection,
        transformers.AutoModelForSemanticSegmentation,
        transformers.AutoModel,
    )
    known = (task._model_mapping.get(type(config), None) for task in tasks)
    for found in (*named, *known):
        kind = found[0] if isinstance(found, tuple) else found  # with and without a teacher, say
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise BadInput(f"transformers has no model for a {type(config).__name__}")


@contextmanager
def _only_safetensors(reference: Reference) -> Iterator[None]:
    """Tell a checkpoint without safetensors from one that is not there."""
    try:
        yield
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise Unsafe(
            f"refused the weights of {reference}: they are no safetensors, and loading pickled "
            "objects can run any code. Where you trust them, load them yourself and save them "
            "with model.save_pretrained(FOLDER)"
        ) from error


# ---------------------------------------------------------------------------------- ultralytics


YOLO_MODELS = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "classify": "ClassificationModel",
}
"""The class of ultralytics.nn.tasks for each task."""


def make_ultralytics(reference: Reference, options: Json) -> Any:
    """A network of one of the configurations that come with ultralytics, with random weights.

    ultralytics is under the AGPL-3.0; nothing of it is imported unless such a model is asked for.
    """
    name = reference.name
    if not name.endswith((".yaml", ".yml")):
        raise Unsafe(
            f"{reference} is no configuration such as yolo11n.yaml. The .pt files of ultralytics "
            "hold Python objects, and loading them can run any code: where you trust one, save "
            "its tensors, safetensors.torch.save_file(YOLO(file).model.state_dict(), "
            "'model.safetensors'), and give them as model.weights beside the configuration"
        )
    with _environment(YOLO_OFFLINE="true", YOLO_VERBOSE="false"):  # asks for no network, no output
        try:
            with _patches_undone():
                from ultralytics.nn import tasks
        except ModuleNotFoundError as error:
            raise MissingExtra("ultralytics", "ultralytics") from error
    config = tasks.yaml_model_load(_configuration(reference))
    task = tasks.guess_model_task(config)
    if task not in YOLO_MODELS:
        raise RecipeError(f"{reference} is for {task}; known are {', '.join(YOLO_MODELS)}")
    with _library_errors(reference, fetches=False):
        return getattr(tasks, YOLO_MODELS[task])(config, verbose=False, **options)


@contextmanager
def _patches_undone() -> Iterator[None]:
    # Imported, ultralytics exchanges these for the whole process; its Image.open installs packages.
    owners = ((Image, "open"), (torch, "save"))
    own = [getattr(owner, name) for owner, name in owners]
    try:
        yield
    finally:
        for (owner, name), function in zip(owners, own, strict=True):
            setattr(owner, name, function)


def _configuration(reference: Reference) -> Path:
    """The path of a configuration of the library's own: a yaml from elsewhere could run code."""
    import ultralytics

    files = (Path(ultralytics.__file__).parent / "cfg" / "models").rglob("*.yaml")
    known = {path.name: path for path in files}
    family = re.sub(
        r"(\d)[nslmx](?=[-.])", r"\1", reference.name
    )  # yolo11n.yaml: scaled yolo11.yaml
    if family not in known:
        close = did_you_mean(reference.name, known)
        raise RecipeError(
            f"ultralytics has no configuration {reference.name!r}{close}; for a configuration of "
            "your own write a function that makes the model, and refer to that"
        )
    return known[family].with_name(reference.name)


# -------------------------------------------------------------------------------------- errors


@contextmanager
def _library_errors(reference: Reference, *, fetches: bool) -> Iterator[None]:
    """Say plainly which option is wrong, or that the official weights cannot be had."""
    try:
        with _tensors_only():
            yield
    except SlimdownError:
        raise
    except pickle.UnpicklingError as error:
        raise Unsafe(
            f"refused the official weights of {reference}: they hold more than tensors"
        ) from error
    except (TypeError, ValueError, KeyError) as error:
        raise RecipeError(f"model.options do not suit {reference}: {error}") from error
    except Exception as error:  # every client has its own ways to say "no connection"
        if not fetches:
            raise BadInput(
                f"{reference} cannot be made: {type(error).__name__}: {error}"
            ) from error
        raise BadInput(
            f"cannot get the official weights of {reference}: {error}. Connect this machine, or "
            "fetch them elsewhere and give the file as model.weights"
        ) from error


def _tensors_only() -> AbstractContextManager[None]:
    # torchvision unpickles what it fetches; torch's own switch makes every torch.load weights_only.
    return _environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
