"""Overrides: which value a key means, and which keys lead nowhere."""

from __future__ import annotations

from typing import Any

import pytest

from slimdown.errors import RecipeError
from slimdown.recipe.document import Document, read_document
from slimdown.recipe.overrides import override

TEXT = """\
stages:
  - prune: {macs: 0.5}
  - distill: {epochs: 3}
  - prune: {macs: 0.8}
seed: 0
"""


def apply(*options: str) -> Document:
    document = read_document(TEXT, name="f")
    for option in options:
        document = override(document, option, kinds=("prune", "distill", "quantize"))
    return document


def value_at(document: Document, *keys: str | int) -> Any:
    value: Any = document.values
    for key in keys:
        value = value[key]
    return value


@pytest.mark.parametrize(
    ("option", "keys", "value"),
    [
        ("distill.epochs=5", ("stages", 1, "distill", "epochs"), 5),
        ("distill[0].epochs=5", ("stages", 1, "distill", "epochs"), 5),
        ("prune[0].macs=0.6", ("stages", 0, "prune", "macs"), 0.6),
        ("prune[1].macs=0.6", ("stages", 2, "prune", "macs"), 0.6),
        ("stages.2.prune.macs=0.6", ("stages", 2, "prune", "macs"), 0.6),
        ("distill={epochs: 9}", ("stages", 1, "distill"), {"epochs": 9}),
        ("seed=7", ("seed",), 7),
        ("name=a=b", ("name",), "a=b"),
        ("budget.max_drop=1e-1", ("budget", "max_drop"), 0.1),
        ("targets=[openvino]", ("targets",), ["openvino"]),
        ("name=", ("name",), None),
    ],
)
def test_a_key_names_one_value(option: str, keys: tuple[str | int, ...], value: object) -> None:
    document = apply(option)
    assert value_at(document, *keys) == value
    assert document.place(keys) == f"-s {option}"


def test_the_last_override_wins_and_the_document_is_left_as_it_was() -> None:
    before = read_document(TEXT, name="f")
    after = override(before, "seed=1", kinds=())
    assert override(after, "seed=2", kinds=()).values["seed"] == 2
    assert before.values["seed"] == 0


def test_what_an_override_replaces_has_no_line_any_more() -> None:
    document = apply("distill={epochs: 9}")
    assert document.place(("stages", 1, "distill", "epochs")) == "-s distill={epochs: 9}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("prune.macs=1", r"2 prune stages: say which one, such as prune\[0\]"),
        ("prune[2].macs=1", r"the last prune stage of this recipe is prune\[1\]"),
        ("quantize.precision=int8", "no quantize stage: add one"),
        ("stages.9.prune.macs=1", "no 9 in stages, a list of 3"),
        ("stages.x=1", "no x in stages, a list of 3"),
        ("seed.x=1", "no x in seed, a single value"),
        ("0=1", "no 0 in the recipe, a mapping"),
        ("seed", "an override is KEY=VALUE"),
        ("=1", "an override is KEY=VALUE"),
        ("a..b=1", "an override is KEY=VALUE"),
        ("prune[x].macs=1", r"\[x\] is no index: stages of a kind are counted from \[0\]"),
        ("prune[-1].macs=1", r"\[-1\] is no index"),
        ("prune[.macs=1", r"is no index"),
        ("seed=[1", "-s seed=.*not valid YAML"),
        ("seed=!!python/name:os.system x", "-s seed=.*refused"),
    ],
)
def test_a_key_that_leads_nowhere_is_an_error(option: str, message: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        apply(option)
