"""Model references -> modules: a library's by name, the user's own by factory or as ONNX."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from slimdown.core import Json
from slimdown.errors import BadInput, RecipeError, SlimdownError
from slimdown.load.libraries import (
    make_timm,
    make_torchvision,
    make_transformers,
    make_ultralytics,
)
from slimdown.load.reference import Reference, parse_reference
from slimdown.load.source import ModelSource
from slimdown.load.weights import load_weights_
from slimdown.suggest import did_you_mean


def load_model(source: ModelSource) -> nn.Module:
    """Make the model, with its weights, in eval mode and float32.

    Runs the user's code where `runs_user_code(source.reference)`. Raises RecipeError for a name or
    an option that does not exist, BadInput for a model or weights that cannot be used, Unsafe for
    weights that are more than tensors, MissingExtra without the library.
    """
    reference = parse_reference(source.reference)
    model = MAKERS[reference.origin](reference, source.options)
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"{source.reference} must return a torch.nn.Module, got {type(model).__name__}"
        )
    model = model.float()
    if source.weights is not None:
        load_weights_(model, source.weights)
    return model.eval()


# --------------------------------------------------------------------------- the user's own code


def _make_users(reference: Reference, options: Json) -> Any:
    """Call the user's factory. EXECUTES the module or file that it lives in."""
    is_file = reference.origin == "file"
    if is_file and not Path(reference.place).is_file():
        raise BadInput(f"there is no file {reference.place} for the model {reference}")
    with _importable_from(Path(reference.place).parent if is_file else Path.cwd()):
        module = _run_file(reference) if is_file else _import_module(reference)
        factory = _find_factory(module, reference)
        _check_options(factory, reference, options)
        with _users_errors(reference, "calling it"):
            return factory(**options)


def _import_module(reference: Reference) -> ModuleType:
    with _users_errors(reference, "importing it"):
        try:
            importlib.invalidate_caches()
            return importlib.import_module(reference.place)
        except ModuleNotFoundError as error:
            # Only where the module itself is absent; an absent import inside it is another matter.
            if error.name is None or not f"{reference.place}.".startswith(f"{error.name}."):
                raise
            raise RecipeError(
                f"there is no module {error.name!r} for the model {reference}: install it, start "
                "from the folder that holds it, or name its file, path/to/file.py:factory"
            ) from error


def _run_file(reference: Reference) -> ModuleType:
    path = Path(reference.place).resolve()
    place = hashlib.sha256(bytes(path)).hexdigest()[:8]  # files of one name stay apart
    spec = importlib.util.spec_from_file_location(f"slimdown_user_{path.stem}_{place}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.export look a class's module up there
    with _users_errors(reference, "running it"):
        spec.loader.exec_module(module)
    return module


def _find_factory(module: ModuleType, reference: Reference) -> Callable[..., Any]:
    found = getattr(module, reference.name, None)
    if found is None:
        known = [name for name, value in vars(module).items() if callable(value)]
        raise RecipeError(
            f"{reference.place} has no {reference.name!r}{did_you_mean(reference.name, known)}"
        )
    if isinstance(found, nn.Module) or not callable(found):
        raise BadInput(
            f"{reference} is a {type(found).__name__}: name the function or class that makes the "
            "model, so that it can be made again"
        )
    factory: Callable[..., Any] = found
    return factory


def _check_options(
    factory: Callable[..., Any], reference: Reference, options: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise RecipeError(
            f"model.options do not suit {reference}{signature}: {error}, got {dict(options)}"
        ) from error


@contextmanager
def _users_errors(reference: Reference, doing: str) -> Iterator[None]:
    try:
        yield
    except SlimdownError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise BadInput(
            f"the model {reference} failed, {doing}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    # As `python FILE` and `python -m MODULE` do, but only while the model is made.
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove(place)


def _make_onnx(reference: Reference, options: Json) -> nn.Module:
    if options:
        raise RecipeError(
            f"model.options are arguments of what makes a model, and {reference} is one already: "
            f"leave them out, got {options}"
        )
    from slimdown.load.onnx import load_onnx  # heavy, as onnx itself is

    return load_onnx(Path(reference.place))


MAKERS: dict[str, Callable[[Reference, Json], Any]] = {
    "torchvision": make_torchvision,
    "timm": make_timm,
    "transformers": make_transformers,
    "ultralytics": make_ultralytics,
    "module": _make_users,
    "file": _make_users,
    "onnx": _make_onnx,
}
