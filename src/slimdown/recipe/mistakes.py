"""What is wrong with a recipe, in words: its place, the key, what was given, how to mend it."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from slimdown.errors import RecipeError
from slimdown.recipe.document import Document, Keys
from slimdown.recipe.spec import STAGES, schemas_at
from slimdown.suggest import advise


def explain(error: ValidationError, document: Document) -> RecipeError:
    """Tell every mistake that pydantic found on a line of its own."""
    found = [(_keys_of(each["loc"], document.values), each) for each in error.errors()]
    lines = [
        _describe(keys, [each for _, each in same], document)
        for keys, same in groupby(found, key=lambda pair: pair[0])
    ]
    return RecipeError("\n".join(lines))


def _keys_of(loc: tuple[str | int, ...], values: Any) -> Keys:
    """The part of pydantic's location that is in the recipe; it also names branches of unions."""
    keys: list[str | int] = []
    for part in loc:
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if in_list or (isinstance(values, dict) and part in values):
            keys.append(part)
            values = values[part]
    return tuple(keys)


def _describe(keys: Keys, errors: list[ErrorDetails], document: Document) -> str:
    """One mistake; several errors of one value are what the branches of a union say of it."""
    first = errors[0]
    place = document.place(keys)
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        # Our own checks are of a whole section, but name the setting, whose line is nearer.
        inside = ((*keys, word) for word in re.findall(r"\w+", message))
        nearest = next((each for each in inside if each in document.places), keys)
        return f"{document.place(nearest)}: {message}"
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        return f"{place}: {_describe_unknown(keys)}"
    if first["type"] == "missing":
        missing = [_dotted((*keys, each["loc"][-1])) for each in errors]
        return f"{place}: {' and '.join(missing)} must be given"
    wanted = " or ".join(_in_yaml(each["msg"]) for each in errors)
    return f"{place}: {_dotted(keys)} {wanted}, got {_given(first['input'])}"


def _in_yaml(message: str) -> str:
    """Pydantic speaks of JSON: "Input should be an object", "List should have at least 1 item"."""
    message = message[message.find("should be ") :] if "should be " in message else message
    for theirs, yamls in (("an object", "a mapping"), ("a valid array", "a list")):
        message = message.replace(theirs, yamls)
    return message


def _describe_unknown(keys: Keys) -> str:
    *above, key = keys
    known = sorted({name for schema in schemas_at(above) for name in schema.get("properties", {})})
    near = advise(str(key), known, otherwise="")
    advice = near or f"known are {', '.join(known)}"
    stage = advise(str(key), STAGES, otherwise="", noun="the stage ")
    if not near and not above and stage:
        advice = f"{stage} Stages are listed below `stages`"
    if not STAGES.keys() <= set(known):
        return f"unknown key {key!r} in {_dotted(above)}: {advice}"
    if not near:
        advice += "; the settings of a stage are indented below its name"
    return f"unknown stage {key!r} in {_dotted(above)}: {advice}"


def _dotted(keys: Any) -> str:
    return ".".join(map(str, keys)) or "the recipe"


def _given(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return json.dumps(value, ensure_ascii=False)
