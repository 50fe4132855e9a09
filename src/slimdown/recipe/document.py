"""Plain YAML with the line of every value: what a recipe is read from and written as.

Recipes come from anywhere, so only plain data is read: no tags (they can name code to run), no
aliases (a few lines of them can unfold into gigabytes), no key twice, no bottomless nesting.
Unquoted words follow YAML 1.2: `1e-3` is a number, `no` is a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from slimdown.errors import RecipeError, Unsafe

Keys: TypeAlias = tuple[str | int, ...]
"""Where a value sits: ("stages", 0, "prune", "macs")."""

OPTION = "-s "
"""The option that overrides a value, with which the place of that value begins."""
MAX_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_WORDS = {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"[-+]?(?:0|[1-9][0-9_]{0,99})",  # Python refuses to read thousands of digits
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.inf|\.nan",
}
_RESOLVERS = [(_TAG + kind, re.compile(f"(?:{words})$")) for kind, words in _WORDS.items()]


class _Loader(yaml.SafeLoader):
    """The safe loader, with the unquoted words of YAML 1.2."""

    yaml_implicit_resolvers = {None: _RESOLVERS}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """The safe dumper; it quotes what either version of YAML would take for more than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        **yaml.SafeDumper.yaml_implicit_resolvers,
        None: _RESOLVERS,
    }


@dataclass(frozen=True, kw_only=True)
class Document:
    """Plain values, and where each was written: "a.yaml, line 7", or the option that set it."""

    name: str
    values: dict[str, Any]
    places: dict[Keys, str]

    def place(self, keys: Keys) -> str:
        """Where the value at `keys` was written, or else that which it would belong to."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, self.name)

    def is_overridden(self, keys: Keys) -> bool:
        """Whether the value at `keys` comes from the command line and not from the file."""
        return self.place(keys).startswith(OPTION)


def read_document(content: str | bytes, *, name: str) -> Document:
    """Read a YAML mapping. Raises RecipeError with the line, or Unsafe for tags that name code."""
    node = _compose(content, name)
    if not isinstance(node, yaml.MappingNode):
        given = "nothing" if node is None else _kind_of(node)
        raise RecipeError(f"{name}: a recipe is a mapping such as `stages: [...]`, got {given}")
    places: dict[Keys, str] = {}
    for keys, line in _locate(node, (), name):
        if keys in places:
            raise RecipeError(
                f"{name}, line {line}: {keys[-1]!r} is given twice, first in {places[keys]}: "
                "remove one of them"
            )
        places[keys] = f"{name}, line {line}"
    return Document(name=name, values=_construct(node), places=places)


def read_value(text: str, *, name: str) -> Any:
    """Read one value as a recipe would: `0.5`, `[8, 16]`, `max_drop`. Empty is None."""
    node = _compose(text, name)
    return None if node is None else _construct(node)


def write_document(values: dict[str, Any]) -> str:
    """YAML that `read_document` reads back as equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def _compose(content: str | bytes, name: str) -> yaml.Node | None:
    try:
        _refuse_all_but_plain_data(content, name)
        return yaml.compose(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{name}{line}: not valid YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from error


def _refuse_all_but_plain_data(content: str | bytes, name: str) -> None:
    """Look at the events only: nothing is built, so depth and size cannot hurt."""
    depth = 0
    for event in yaml.parse(content, Loader=_Loader):
        place = f"{name}, line {event.start_mark.line + 1 if event.start_mark else 1}"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"{place}: the alias *{event.anchor} is refused: write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            kind = Unsafe if tag.startswith(_TAG + "python/") else RecipeError
            shown = tag.replace(_TAG, "!!")
            raise kind(f"{place}: the tag {shown} is refused: recipes are plain data")


def _locate(node: yaml.Node, keys: Keys, name: str) -> Iterator[tuple[Keys, int]]:
    """Every value's keys and line, parents first; a mapping's value is where its key is."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != _TAG + "str":
                given = repr(key.value) if isinstance(key, yaml.ScalarNode) else _kind_of(key)
                raise RecipeError(f"{name}, line {line}: a key is a word, got {given}")
            yield (*keys, key.value), line
            yield from _locate(value, (*keys, key.value), name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, index), value.start_mark.line + 1
            yield from _locate(value, (*keys, index), name)


def _kind_of(node: yaml.Node) -> str:
    return f"a {type(node).__name__.removesuffix('Node').lower()}"


def _construct(node: yaml.Node) -> Any:
    return _Loader("").construct_document(node)
