"""The report as Markdown: what goes into a pull request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import yaml

from slimdown.core import Report
from slimdown.report import formats
from slimdown.report.compare import Comparison, Row, compare_targets
from slimdown.report.summary import (
    describe_audit,
    describe_conditions,
    describe_faster_float,
    describe_notes,
    describe_run,
    summarize,
)


def render_markdown(report: Report) -> str:
    """Write the tables of the report, without its charts."""
    lines = [f"# {escape(report.name)}", "", escape(" · ".join(describe_run(report))), ""]
    if report.verdicts:
        lines += [f"**Budget {'met' if report.budget_met else 'not met'}.**", ""]
    for comparison in compare_targets(report):
        lines += [f"## {escape(comparison.runtime)}", "", escape(describe_conditions(comparison))]
        lines += ["", *_before_after(comparison), "", *_steps(comparison), ""]
        if (audit := describe_audit(comparison.after)) is not None:
            lines += [f"{audit}.", ""]
        if (slower := describe_faster_float(comparison)) is not None:
            lines += [f"**{escape(slower)}**", ""]
        for said in describe_notes(comparison):
            lines += [f"Note: {escape(said)}.", ""]
    recipe = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)
    pairs = formats.describe_pairs(report.environment)
    lines += ["## Recipe", "", *_code_block(recipe, "yaml"), ""]
    lines += ["## Environment", "", *_table(["", ""], pairs, align="ll")]
    return "\n".join(lines) + "\n"


def escape(text: object) -> str:
    """Text that means itself in Markdown, in a table cell too."""
    one_line = " ".join(str(text).split())
    quoted = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", quoted)


def _before_after(comparison: Comparison) -> Iterator[str]:
    rows = []
    for line in summarize(comparison):
        verdict = line.verdict
        mark = "" if verdict is None else "✓ " if verdict.met else "✕ "
        held = "" if verdict is None else mark + formats.describe_verdict(verdict)
        rows.append((line.subject, line.before, line.after, line.gain, held))
    return _table(["", "Original", "Result", "Change", "Budget"], rows, align="lrrll")


def _steps(comparison: Comparison) -> Iterator[str]:
    heads = ["Step", comparison.metric, "Change", "Step alone", "Size", "Median", "MACs", "Took"]
    return _table(heads, map(_step_cells, comparison.rows), align="lrrrrrrr")


def _step_cells(row: Row) -> tuple[str, ...]:
    is_original = row.step.parent is None
    return (
        row.label,
        formats.format_value(row.score),
        formats.format_points(row.change),
        formats.DASH if is_original else formats.format_points(row.own_change),
        formats.format_bytes(row.measured.size_bytes),
        formats.format_ms(row.median_ms),
        formats.format_count(row.step.macs),
        formats.DASH if is_original else formats.format_seconds(row.step.seconds),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, align: str) -> Iterator[str]:
    yield _cells(heads)
    yield _cells([{"l": "---", "r": "---:"}[side] for side in align])
    for row in rows:
        yield _cells([escape(cell) for cell in row])


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _code_block(text: str, language: str) -> list[str]:
    # A fence must be longer than any run of backticks inside it.
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, text.rstrip("\n"), fence]
