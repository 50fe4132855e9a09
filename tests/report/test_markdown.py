"""Tables that stay tables whatever the names are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slimdown.core import Report
from slimdown.report.markdown import escape, render_markdown


def test_every_row_of_a_table_has_its_columns(report: Report) -> None:
    name = "a|b`c*<script>\n# d"
    report = replace(report, name=name, environment={name: name})
    rows = [line for line in render_markdown(report).splitlines() if line.startswith("|")]
    assert rows
    widths = [row.replace(r"\|", "").count("|") for row in rows]
    # each table's separator line tells how many columns all its rows have
    for width, row, following in zip(widths, rows, rows[1:], strict=False):
        if "---" in following:
            assert width == following.count("|"), row


def test_text_means_itself() -> None:
    assert escape("<b>*x*\n[a](b)|c") == r"&lt;b&gt;\*x\* \[a\](b)\|c"


@pytest.mark.parametrize("recipe", [{"note": "```\n<script>"}, {"note": "````"}])
def test_a_recipe_cannot_leave_its_code_block(report: Report, recipe: dict[str, str]) -> None:
    text = render_markdown(replace(report, recipe=recipe))
    block = text.split("## Recipe\n\n")[1].split("\n\n## Environment")[0].splitlines()
    fence = block[-1]
    assert block[0] == fence + "yaml"
    assert all(fence not in line for line in block[1:-1])


def test_the_verdict_is_told(report: Report) -> None:
    text = render_markdown(report)
    assert "**Budget not met.**" in text
    assert "INT8 kernels: 31 of 32 layers." in text
    assert "✕ 302 kB is over the 300 kB allowed" in text
