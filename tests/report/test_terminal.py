"""What a rich console shows."""

# ruff: noqa: RUF001 - the signs are those of typography, and meant

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from slimdown.core import Report
from slimdown.report import render_terminal


def show(report: Report, width: int = 110) -> str:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(render_terminal(report))
    return capture.get()


def test_before_after_steps_and_verdicts_are_shown(report: Report) -> None:
    shown = show(report)
    for text in (
        "onnxruntime 1.32.0",
        "92.4 (90.6 – 93.9)",
        "0.9 points lost (−1.8 … 0.0)",
        "6.6× smaller",
        "3 Quantize",
        "INT8 kernels: 31 of 32 layers",
        "budget not met",
        "openvino: 1.8 is over the 1.5 points allowed",
    ):
        assert text in shown


def test_what_was_not_measured_is_never_a_zero(report: Report) -> None:
    bare = tuple(replace(m, accuracy=None, latency=None) for m in report.measurements)
    shown = show(replace(report, measurements=bare, verdicts=()))
    assert "not measured" in shown
    assert "0.0" not in shown
    assert "budget" not in shown.splitlines()[-1]


def test_names_are_no_markup(report: Report) -> None:
    steps = tuple(replace(step, kind="[red]x[/red]") for step in report.steps)
    assert "[red]x[/red]" in show(replace(report, steps=steps))


def test_a_budget_that_is_met_is_said_so(report: Report) -> None:
    met = tuple(replace(verdict, met=True) for verdict in report.verdicts)
    assert "✓ budget met" in show(replace(report, verdicts=met))


def test_the_faster_file_is_offered_where_int8_is_slower(report: Report) -> None:
    assert "not faster" not in show(report)
    slow = tuple(
        replace(m, latency=m.latency and replace(m.latency, median_ms=5.0))
        if m.step.startswith("03")
        else m
        for m in report.measurements
    )
    shown = show(replace(report, measurements=slow), width=200)
    assert "5.00 ms, and 1.4" in shown
    assert "the faster file: deploy/onnxruntime/02-distill/model.onnx" in shown
    assert "the faster file: deploy/openvino/02-distill/model.xml" in shown


def test_notes_stand_behind_the_figures(report: Report) -> None:
    assert "note:" not in show(report)
    steps = tuple(
        replace(step, facts={**step.facts, "notes": ["most values become zero"]})
        if step.kind == "quantize"
        else step
        for step in report.steps
    )
    assert "note: most values become zero" in show(replace(report, steps=steps))
