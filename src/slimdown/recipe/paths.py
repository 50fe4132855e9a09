"""The paths in a recipe: variables filled in, and made absolute."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimdown.core import Json
from slimdown.errors import RecipeError
from slimdown.recipe.document import Document, Keys
from slimdown.recipe.spec import schemas_at

REFERENCE: Keys = ("model", "reference")
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")


def resolve_paths(document: Document, *, folder: Path) -> Document:
    """Make every path absolute: one in the file starts at `folder`, an override's where we are.

    Raises RecipeError for a variable that is not set and has no default, and for what no path is.
    """

    def resolve(text: str, keys: Keys) -> str:
        place = document.place(keys)
        text = _fill_in(text, place)
        start = Path.cwd() if document.is_overridden(keys) else folder
        # A null byte, the home of nobody, a loop of links.
        try:
            return _absolute(text, keys, start)
        except (ValueError, RuntimeError, OSError) as error:
            raise RecipeError(f"{place}: no path is {text!r}: {error}") from error

    return replace(document, values=_map_paths(document.values, (), resolve))


def make_paths_absolute(values: Json) -> Json:
    """A recipe's plain values, with relative paths told from the root instead of from here."""
    here = Path.cwd()
    absolute: Json = _map_paths(values, (), lambda text, keys: _absolute(text, keys, here))
    return absolute


def _map_paths(value: Any, keys: Keys, change: Callable[[str, Keys], str]) -> Any:
    """A copy of plain values with every path, and the model's reference, changed."""
    if isinstance(value, dict):
        return {key: _map_paths(inner, (*keys, key), change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_map_paths(inner, (*keys, index), change) for index, inner in enumerate(value)]
    if isinstance(value, str) and (keys == REFERENCE or _is_path(keys)):
        return change(value, keys)
    return value


def _is_path(keys: Keys) -> bool:
    return any(schema.get("format") == "path" for schema in schemas_at(keys))


def _fill_in(text: str, place: str) -> str:
    """Replace `${VAR}` and `${VAR:-default}`; as in a shell, empty counts as not set."""

    def value_of(match: re.Match[str]) -> str:
        value = os.environ.get(match["name"]) or match["default"]
        if value is None:
            raise RecipeError(
                f"{place}: the environment has no {match['name']}: set it, or give it a default "
                f"as in ${{{match['name']}:-path}}"
            )
        return value

    return _VARIABLE.sub(value_of, text)


def _absolute(text: str, keys: Keys, folder: Path) -> str:
    """A path from the root; of a reference, that of the file that it names, if it names one."""
    is_whole = keys != REFERENCE or text.endswith(".onnx")
    file, colon, factory = (text, "", "") if is_whole else text.rpartition(":")
    if not is_whole and not file.endswith(".py"):
        return text
    return f"{(folder / Path(file).expanduser()).resolve()}{colon}{factory}"
