"""What is left of a matplotlib figure."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import matplotlib
import pytest
from matplotlib.figure import Figure

from slimdown.report.svg import AFTER, SETTINGS, inline_svg


@pytest.fixture
def drawn() -> str:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(3, 2))
        axes = figure.add_subplot()
        axes.plot([0, 1, 2], [0, 1, 4], "o-", color=AFTER, alpha=0.5)
        axes.set_title("<b>a$b$ & c</b>")
        return inline_svg(figure, name="test", label='a "label"')


def test_colors_are_variables_and_styles_attributes(drawn: str) -> None:
    assert "var(--after)" in drawn
    assert AFTER not in drawn
    assert "style" not in drawn


def test_no_address_doctype_or_metadata_is_left(drawn: str) -> None:
    for part in ("http", "xmlns", "DOCTYPE", "metadata", "font-family"):
        assert part not in drawn


def test_text_is_text(drawn: str) -> None:
    root = ET.fromstring(drawn)
    assert "<b>a$b$ & c</b>" in [element.text for element in root.iter("text")]
    assert root.attrib["aria-label"] == 'a "label"'


def test_ids_are_those_that_are_used_under_the_given_name(drawn: str) -> None:
    root = ET.fromstring(drawn)
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    used = {element.attrib["href"].removeprefix("#") for element in root.iter("use")}
    assert ids
    assert all(name.startswith("test-") for name in ids)
    assert used <= set(ids)


def test_drawing_leaves_no_global_state() -> None:
    assert matplotlib.rcParams["svg.hashsalt"] is None
    assert matplotlib.rcParams["text.parse_math"] is True
