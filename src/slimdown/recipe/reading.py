"""Recipe files: YAML and overrides to a `Recipe`, every mistake told with its line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from slimdown.errors import RecipeError
from slimdown.recipe.document import Document, read_document, write_document
from slimdown.recipe.entries import ITERATE, name_entries
from slimdown.recipe.mistakes import explain
from slimdown.recipe.overrides import override
from slimdown.recipe.paths import make_paths_absolute, resolve_paths
from slimdown.recipe.spec import RECIPE, STAGES, Recipe, recipe_to_json


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, and set what `overrides` such as "prune.macs=0.5" say.

    Relative paths in it start at its own folder, and `${VAR}` and `${VAR:-default}` in them are
    filled in from the environment. Raises RecipeError for anything that is not as it should be,
    and Unsafe for YAML that names code to run.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    document = read_document(content, name=str(path))
    document = replace(document, values={"name": path.stem, **document.values})
    return make_recipe(complete(document, overrides, folder=path.absolute().parent))


def complete(document: Document, overrides: Iterable[str], *, folder: Path) -> Document:
    """Set what `overrides` say, and make paths absolute, where those in the document start at
    `folder`. Raises RecipeError for a key that leads nowhere, or what no path is.
    """
    document = _name_stages(document)
    for option in overrides:
        document = _name_stages(override(document, option, kinds=(*STAGES, ITERATE)))
    return resolve_paths(document, folder=folder)


def make_recipe(document: Document) -> Recipe:
    """Check a complete document. Raises RecipeError that tells the place of every mistake."""
    try:
        # In strict mode, JSON rather than Python values: a list may become a tuple, text a path.
        return RECIPE.validate_json(json.dumps(document.values))
    except ValidationError as error:
        raise explain(error, document) from error


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that can be read from anywhere, with every default spelled out.

    `load_recipe` reads it back as equal, relative paths aside: they become absolute.
    """
    return write_document(make_paths_absolute(recipe_to_json(recipe)))


def _name_stages(document: Document) -> Document:
    """Write out the stages that are given by their names alone."""
    if "stages" not in document.values:
        return document
    values = {**document.values, "stages": name_entries(document.values["stages"])}
    return replace(document, values=values)
