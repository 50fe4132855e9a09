"""Plain YAML only, every value with its line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdown.errors import RecipeError, Unsafe
from slimdown.recipe.document import read_document, read_value, write_document

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_is_written_reads_back_equal(values: dict[str, Any]) -> None:
    assert read_document(write_document(values), name="f").values == values


def test_every_value_knows_its_line() -> None:
    document = read_document("a: 1\nb:\n  - x\n  - c:\n      d: 2\n", name="f")
    assert document.place(("a",)) == "f, line 1"
    assert document.place(("b", 0)) == "f, line 3"
    assert document.place(("b", 1, "c", "d")) == "f, line 5"
    # What is not there is looked for where it would have been.
    assert document.place(("b", 1, "c", "e")) == "f, line 4"
    assert document.place(()) == "f"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[8, a]", [8, "a"]),
    ],
)
def test_words_are_read_as_yaml_1_2_does(text: str, value: object) -> None:
    read = read_value(text, name="f")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f, line 3: 'a' is given twice, first in f, line 1"),
        ("a: {b: 1,\n b: 2}", "f, line 2: 'b' is given twice"),
        ("a: 1\nb: [1, 2", "f, line 2: not valid YAML"),
        ("a: 1\n\tb: 2", "f, line 2: not valid YAML"),
        ("a: 'x", "f, line 1: not valid YAML"),
        ("a: \x00", "f: not valid YAML"),
        (b"\xff\xff", "f: not valid YAML"),
        ("a: 1\n---\nb: 2", "f, line 2: not valid YAML"),
        ("a: &x 1\nb: *x", r"f, line 2: the alias \*x is refused"),
        ("a: &x [*x]", r"f, line 1: the alias \*x is refused"),
        ("a: " + "[" * 100, "f, line 1: nested deeper than"),
        ("a: !Custom 1", "f, line 1: the tag !Custom is refused"),
        ("a: !!set {b}", "f, line 1: the tag !!set is refused"),
        ("1: 2", "f, line 1: a key is a word, got '1'"),
        ("[a]: 2", "f, line 1: a key is a word, got a sequence"),
        ("", "got nothing"),
        ("# only a comment", "got nothing"),
        ("- 1", "got a sequence"),
        ("text", "got a scalar"),
    ],
)
def test_all_but_plain_mappings_are_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_document(text, name="f")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch owned']",
        "a: !!python/name:os.system",
        "!!python/object/new:type\nargs: []",
        "a: !<tag:yaml.org,2002:python/module:os> x",
        "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system",
    ],
)
def test_tags_that_name_code_are_unsafe(text: str) -> None:
    with pytest.raises(Unsafe, match=r"line \d+: the tag !!python"):
        read_document(text, name="f")
