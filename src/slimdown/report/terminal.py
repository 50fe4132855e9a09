"""The report in a terminal: before and after, what each step did, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slimdown.core import Report, Verdict
from slimdown.report import formats
from slimdown.report.compare import Comparison, compare_targets
from slimdown.report.summary import (
    describe_audit,
    describe_conditions,
    describe_faster_float,
    describe_notes,
    summarize,
)


def render_terminal(report: Report) -> RenderableType:
    """What a run found, as something that a rich console prints.

    Names are put in as plain text, so that one with brackets in it is no markup.
    """
    parts: list[RenderableType] = []
    for comparison in compare_targets(report):
        parts += [Text(comparison.runtime, style="bold"), Text(describe_conditions(comparison))]
        parts += [_before_after(comparison), _steps(comparison)]
        if (audit := describe_audit(comparison.after)) is not None:
            parts += [Text(audit)]
        if (slower := describe_faster_float(comparison)) is not None:
            parts += [Text(f"✕ {slower}", style="bold yellow")]
        parts += [Text(f"note: {said}", style="yellow") for said in describe_notes(comparison)]
        parts += [Text()]
    parts += list(_budget(report))
    return Group(*parts)


def _before_after(comparison: Comparison) -> Table:
    table = _table("", "original", "result", "change", "budget")
    for line in summarize(comparison):
        cells = [line.subject, line.before, line.after, line.gain]
        table.add_row(*map(_cell, cells), _mark(line.verdict))
    return table


def _steps(comparison: Comparison) -> Table:
    table = _table("step", comparison.metric, "change", "step alone", "size", "median", "took")
    for row in comparison.rows:
        is_original = row.step.parent is None
        cells = (
            row.label,
            formats.format_value(row.score),
            formats.format_points(row.change),
            formats.DASH if is_original else formats.format_points(row.own_change),
            formats.format_bytes(row.measured.size_bytes),
            formats.format_ms(row.median_ms),
            formats.DASH if is_original else formats.format_seconds(row.step.seconds),
        )
        table.add_row(*map(_cell, cells))
    return table


def _budget(report: Report) -> Iterator[Text]:
    if not report.verdicts:
        return
    broken = [verdict for verdict in report.verdicts if not verdict.met]
    if not broken:
        yield Text("✓ budget met", style="bold green")
        return
    yield Text("✕ budget not met", style="bold red")
    for verdict in broken:
        yield Text(f"  {verdict.target}: {formats.describe_verdict(verdict)}", style="red")


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if index == 0 else "right")
    return table


def _cell(text: str) -> Text:
    return Text(text, style="dim" if text == formats.NOT_MEASURED else "")


def _mark(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text()
    return Text("✓", style="green") if verdict.met else Text("✕", style="bold red")
