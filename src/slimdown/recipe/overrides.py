"""Settings given on the command line: `prune.macs=0.5`, `budget.max_drop=1`, `prune[1].macs=0.7`.

A key that begins with a stage's kind means that stage; where it comes more than once, `[0]` is the
first of its kind. `stages.0.prune.macs` counts all stages. The value is read as YAML.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slimdown.errors import RecipeError
from slimdown.recipe.document import OPTION, Document, Keys, read_value
from slimdown.recipe.entries import find_kind

_PART = re.compile(r"(?P<key>[^\[\].]+)(?:\[(?P<index>\d+)\])?")
_BAD_INDEX = re.compile(r"\[(?!\d+\])[^\]]*\]?")


def override(document: Document, option: str, *, kinds: Sequence[str]) -> Document:
    """Set one value of a recipe's document. Raises RecipeError for a key that leads nowhere.

    `kinds` are the names of the stages.
    """
    place = OPTION + option
    key, equals, text = option.partition("=")
    keys = _parse_keys(key) if equals else ()
    wrong = _BAD_INDEX.search(key) if equals else None
    if wrong is not None:
        raise RecipeError(
            f"{place}: {wrong[0]} is no index: stages of a kind are counted from [0], the first, "
            "as in prune[0].macs=0.5"
        )
    if not keys:
        raise RecipeError(f"{place}: an override is KEY=VALUE, such as prune.macs=0.5")
    if keys[0] in kinds:
        keys = _find_stage(document.values.get("stages"), keys, place)
    values = copy.deepcopy(document.values)
    _set(values, keys, read_value(text, name=place), place)
    made = {keys[:depth]: place for depth in range(1, len(keys))}
    kept = {at: where for at, where in document.places.items() if at[: len(keys)] != keys}
    return replace(document, values=values, places={**made, **kept, keys: place})


def _parse_keys(key: str) -> Keys:
    """Read "prune[1].macs" as ("prune", 1, "macs"); empty where it is not of that form."""
    keys: list[str | int] = []
    for text in key.strip().split("."):
        part = _PART.fullmatch(text)
        if part is None:
            return ()
        keys.append(int(part["key"]) if part["key"].isdecimal() else part["key"])
        if part["index"] is not None:
            keys.append(int(part["index"]))
    return tuple(keys)


def _find_stage(stages: Any, keys: Keys, place: str) -> Keys:
    """Turn ("prune", 1, "macs") into ("stages", 4, "prune", "macs"), in rounds, too."""
    kind, *rest = keys
    found = find_kind(stages, str(kind))
    is_numbered = bool(rest) and isinstance(rest[0], int)
    chosen = int(rest.pop(0)) if is_numbered else 0
    if len(found) > 1 and not is_numbered:
        raise RecipeError(
            f"{place}: this recipe has {len(found)} {kind} stages: say which one, such as "
            f"{kind}[0] for the first or {kind}[{len(found) - 1}] for the last"
        )
    if not found:
        raise RecipeError(f"{place}: this recipe has no {kind} stage: add one to its stages first")
    if chosen >= len(found):
        raise RecipeError(
            f"{place}: the last {kind} stage of this recipe is {kind}[{len(found) - 1}]"
        )
    return ("stages", *found[chosen], kind, *rest)


def _set(values: Any, keys: Keys, value: Any, place: str) -> None:
    """Put `value` at `keys`, making the mappings on the way that the recipe left out."""
    inner = values
    for depth, key in enumerate(keys):
        is_index = isinstance(inner, list) and isinstance(key, int) and key < len(inner)
        if not is_index and not (isinstance(inner, dict) and isinstance(key, str)):
            above = ".".join(map(str, keys[:depth])) or "the recipe"
            raise RecipeError(f"{place}: there is no {key} in {above}, {_describe(inner)}")
        if depth == len(keys) - 1:
            inner[key] = value
        else:
            if not is_index and inner.get(key) is None:
                inner[key] = {}
            inner = inner[key]


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "a mapping" if isinstance(value, dict) else "a single value"
